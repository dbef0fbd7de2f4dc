"""What the launchers of the Triton kernels share: dtypes, precision of fp32 products, the device of a launch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

#: What the kernels take. fp64 stays with the references: there is nothing to gain from Triton.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Of the GPU that a launch under the interpreter is planned for, so that it takes the same tiles.
_INTERPRETED_MULTIPROCESSORS = 132

_compile_alone: ContextVar[bool] = ContextVar("compile_alone", default=False)


def check_dtypes(op: str, *tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless all tensors have one and the same of ``DTYPES``."""
    found = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(found) != 1 or not found <= set(DTYPES):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise ValueError(f"{op} on CUDA got {names}; give all tensors one dtype of float16, bfloat16, float32")


def input_precision(dtype: torch.dtype) -> str:
    """``tf32`` for fp32 where torch allows it for matrix products, else ``ieee``.

    ``torch.backends.cuda.matmul.fp32_precision`` also follows ``allow_tf32`` and ``set_float32_matmul_precision``;
    reading those raises once a program has used the newer setting.
    """
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def aligned(width: int, *tensors: torch.Tensor | None) -> bool:
    """Whether all rows of ``width`` elements in contiguous tensors start at a multiple of 16 bytes."""
    return all(
        tensor is None or (tensor.data_ptr() % 16 == 0 and width * tensor.element_size() % 16 == 0)
        for tensor in tensors
    )


def launch(kernel: Any, grid: tuple[int, ...], tensor: torch.Tensor) -> Callable[..., None]:
    """What launches ``kernel`` with the arguments that it is given, on the device of ``tensor``.

    Triton launches on the current device. Inside :func:`compiling_alone` the kernel is compiled and not launched.
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
    """Kernels that are launched inside are compiled instead, side by side on all processors; results are undefined.

    A step has some hundred distinct kernels, which take a minute one after the other.
    """
    from triton import AsyncCompileMode

    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool):
        token = _compile_alone.set(True)
        try:
            yield
        finally:
            _compile_alone.reset(token)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return _multiprocessors(device) if device.type == "cuda" else _INTERPRETED_MULTIPROCESSORS


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
