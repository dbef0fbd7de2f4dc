"""What the launchers of the Triton kernels share: dtypes, the precision of fp32 products, the launch itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

#: The dtypes that kernels take. Operators compute fp64 by their references, as Triton could not make it faster.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Values that a program of a pointwise kernel computes: 16 a thread, two loads of 16 bytes where a value has 2.
POINTWISE_VALUES = 2048

#: Multiprocessors that are assumed under Triton's interpreter: those of an H100, so that tiles are the same as there.
_INTERPRETED_MULTIPROCESSORS = 132

_compile_alone: ContextVar[bool] = ContextVar("compile_alone", default=False)


def check_dtypes(op: str, *tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless all tensors have the same dtype, one of :data:`DTYPES`; ``op`` names the operator."""
    found = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(found) != 1 or not found <= set(DTYPES):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise ValueError(f"{op} on CUDA got {names}; give all tensors one dtype of float16, bfloat16, float32")


def input_precision(dtype: torch.dtype) -> str:
    """The precision of a kernel's products: ``tf32`` for fp32 if torch allows it for matrix products, else ``ieee``.

    ``torch.backends.cuda.matmul.fp32_precision`` follows ``allow_tf32`` and ``set_float32_matmul_precision`` as well.
    Reading these two instead raises an error once a program has used the newer setting.
    """
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def aligned(width: int, *tensors: torch.Tensor | None) -> bool:
    """Whether every row, ``width`` elements behind the one before, starts at a multiple of 16 bytes in every tensor."""
    return all(
        tensor is None or (tensor.data_ptr() % 16 == 0 and width * tensor.element_size() % 16 == 0)
        for tensor in tensors
    )


def launch(kernel: Any, grid: tuple[int, ...], tensor: torch.Tensor) -> Callable[..., None]:
    """A function that launches ``kernel`` with the arguments that it is given, on the device of ``tensor``.

    Triton itself launches on the current device, whatever device the arguments are on. Inside :func:`compiling_alone`
    the kernel is compiled and not launched.
    """

    def run(*args: Any, **options: Any) -> None:
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            if _compile_alone.get():
                kernel.warmup(*args, grid=grid, **options)
            else:
                kernel[grid](*args, **options)

    return run


@contextlib.contextmanager
def compiling_alone() -> Iterator[None]:
    """A context in which kernels are compiled instead of launched, side by side on all processors.

    What they would have computed is undefined. A step has some hundred distinct kernels, which take a minute to compile
    one after the other.
    """
    from triton import AsyncCompileMode

    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool):
        token = _compile_alone.set(True)
        try:
            yield
        finally:
            _compile_alone.reset(token)


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; under the interpreter those of an H100."""
    return _multiprocessors(device) if device.type == "cuda" else _INTERPRETED_MULTIPROCESSORS


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
