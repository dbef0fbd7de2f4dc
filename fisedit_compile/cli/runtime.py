"""Options that say where a subcommand runs, types of numbers for options, and the conditions that reports name."""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: The names that ``--dtype`` takes, and torch's names for them.
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

_PACKAGES = ("torch", "diffusers", "transformers", "triton", "numpy")


def add_runtime_options(parser: argparse.ArgumentParser, *, cuda_dtype: str = "fp16") -> None:
    """Add ``--device``, ``--dtype`` and ``--threads`` for :func:`start`; ``cuda_dtype`` is the default on CUDA."""
    parser.set_defaults(cuda_dtype=cuda_dtype)
    group = parser.add_argument_group("where it runs")
    group.add_argument(
        "--device", default="auto", metavar="auto|cpu|cuda", help="auto takes CUDA where there is one (default: auto)"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help=f"dtype of weights and activations; auto is fp32 on the CPU and {cuda_dtype} on CUDA (default: auto)",
    )
    group.add_argument(
        "--threads", type=whole_number(1), metavar="N", help="threads of torch on the CPU (default: torch's own choice)"
    )


def start(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Set torch's number of threads, and return the device and dtype that ``args`` ask for.

    Raises:
        ValueError: the device is unknown or not there.
    """
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA device(s); use --device cpu")
    dtype = args.dtype if args.dtype != "auto" else (getattr(args, "cuda_dtype", "fp16") if kind == "cuda" else "fp32")
    return torch.device(name), getattr(torch, DTYPES[dtype])


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The conditions of a measurement for its report: device, dtype, threads and versions."""
    import torch

    from fisedit_compile import __version__

    versions = {"fisedit-compile": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # triton exists for Linux alone
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": str(device),
        "device_name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes an int of at least ``least``, and at most ``most``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            range_ = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {range_}")
        return int(text)

    return parse


def finite(text: str) -> float:
    """The type of an option that takes a float, neither infinite nor nan."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def share(text: str) -> float:
    """The type of an option that takes a float in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and up to 1, such as 0.15")
    return value


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
