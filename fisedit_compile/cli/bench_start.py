"""``fisedit-compile bench start``: times what a fresh process does until its sparse steps run at full speed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fisedit_compile.bench.progress import say
from fisedit_compile.cli.edit_options import add_attention
from fisedit_compile.cli.json_file import add_json_option, check_json_path, write_json
from fisedit_compile.cli.model_options import add_model_options, image_size
from fisedit_compile.cli.runtime import add_runtime_options, describe, share, start

#: The environment variables that say where Inductor, Triton and the driver keep the kernels that they compile.
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "FISEDIT_COMPILE_CACHE")

_METHOD = """\
Two processes run one after the other: the first with empty caches of compiled kernels (in a temporary folder), the
second with what the first left there. Weights are random and made on the device, so neither reads a checkpoint.
"total" is the whole process as its parent sees it."""


def add_parser(what: Any) -> None:
    """Add the subcommand to those of ``bench``."""
    parser = what.add_parser(
        "start",
        help="start-up of a process, with empty and with filled caches",
        description="Time the start of a process up to its second sparse step, with empty and with filled caches.",
        epilog=_METHOD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--edit-size", type=share, default=0.15, metavar="SHARE", help="share of the picture edited (default: 0.15)"
    )
    add_attention(parser)
    add_runtime_options(parser, cuda_dtype="bf16")
    add_json_option(parser)
    parser.set_defaults(run=run_start)


def run_start(args: argparse.Namespace) -> None:
    """Run both processes, print the table, write the file."""
    check_json_path(args.json)
    device, dtype = start(args)

    from fisedit_compile.architectures import latent_size

    settings = {
        "arch": args.arch,
        "size": image_size(args),
        "batch": args.batch,
        "edit_size": args.edit_size,
        "attention": args.attention,
        "compile_sparse": args.compile,
    }
    latent_size(settings["size"], settings["size"])  # raises for a bad size before a process is started
    conditions = {"command": args.command_line, **settings, **describe(device, dtype)}
    wanted = {**settings, **{name: conditions[name] for name in ("device", "dtype", "threads")}}
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, caches in (("first", "empty"), ("second", "filled")):
            say(f"{name} process, {caches} caches ...")
            seconds[name] = _process(wanted, Path(folder))
    print(
        f"{settings['size']}x{settings['size']}, {args.arch}, batch {args.batch}, {conditions['dtype']}, "
        f"{conditions['device_name']}, torch {conditions['versions']['torch']}; seconds"
    )
    rows = [["", "empty caches", "filled caches"]]
    rows += [[stage, *(f"{seconds[name][stage]:.2f}" for name in seconds)] for stage in seconds["first"]]
    print(tabulate(rows, tablefmt="plain", stralign="right", colalign=("left",), disable_numparse=True))
    write_json(args.json, {**conditions, "seconds": seconds})


def _process(wanted: dict[str, Any], caches: Path) -> dict[str, float]:
    """Run a fresh process with its caches in ``caches``, and return the seconds of each of its stages.

    Raises:
        ValueError: the process failed; its own error is on stderr.
    """
    environment = {**os.environ, **{name: str(caches / name.lower()) for name in _CACHES}}
    command = [sys.executable, "-m", "fisedit_compile.bench.startup.stages", json.dumps(wanted)]
    begin = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    total = time.perf_counter() - begin
    if done.returncode:
        raise ValueError(f"the process to be timed ended with status {done.returncode}; its error is above")
    return {**json.loads(done.stdout.splitlines()[-1]), "total": total}
