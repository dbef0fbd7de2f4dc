"""The cases of ``bench kernels``: a row kernel, its dense counterpart, and what both must move and multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

import fisedit_compile.kernels.ops  # noqa: F401  (registers torch.ops.fisedit)
from fisedit_compile.kernels.group_norm_rows_triton import group_norm_rows_triton
from fisedit_compile.neighbour_table import Taps, neighbour_table
from fisedit_compile.sample_masks import square_mask

#: Measured on an H200: a large device-to-device copy, bytes read and written; a large bf16 matrix product.
BYTES_PER_US = 4.3e6
MACS_PER_US = 790e6 / 2

BATCH = 2
#: (side of the map, input channels, output channels) of 3x3 convolutions of Stable Diffusion 2 at 768x768.
CONVOLUTIONS = (
    (96, 320, 320),
    (96, 960, 320),
    (48, 640, 640),
    (48, 1280, 640),
    (24, 1280, 1280),
    (24, 2560, 1280),
)
#: (side of the map, channels, heads) of its norms and transformer blocks.
MAPS = ((96, 320, 5), (48, 640, 10), (24, 1280, 20))
_GROUPS = 32


@dataclass(frozen=True)
class Case:
    """``run`` and ``dense`` are the two calls; ``bytes`` and ``macs`` are the least that ``run`` needs."""

    kernel: str
    shape: str
    edit_size: float
    rows: int
    run: Callable[[], object]
    dense: Callable[[], object]
    bytes: float
    macs: float


@dataclass(frozen=True)
class Measured:
    """Microseconds of a case."""

    kernel: str
    shape: str
    edit_size: float
    rows: int
    us: float
    dense_us: float
    floor_us: float


@dataclass(frozen=True)
class Mask:
    """The active pixels of a batch whose samples share a square mask."""

    active: Tensor  # bool [BATCH, side, side]
    index: Tensor  # int64 [M]
    sample: Tensor  # int64 [M]
    offsets: Tensor  # int32 [BATCH + 1]


def square(edit_size: float, side: int, device: torch.device) -> Mask:
    """The mask and the index tensors that a plan makes of it."""
    active = square_mask(edit_size, (side, side)).expand(BATCH, -1, -1).to(device)
    index = active.flatten().nonzero().flatten()
    count = index.shape[0] // BATCH
    offsets = torch.arange(0, (BATCH + 1) * count, count, dtype=torch.int32, device=device)
    return Mask(active, index, index // (side * side), offsets)


def convolution_inputs(mask: Mask, side: int, channels: int, filters: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """rows, halo, weight, bias and table of a 3x3 convolution."""
    device = mask.index.device
    taps = Taps((side, side), (side, side), (3, 3), (1, 1), (1, 1), (1, 1))
    table, halo = neighbour_table(taps, mask.index, mask.active, BATCH)
    assert halo is not None
    rows, halo_rows = (normal(len(t), channels, device=device, dtype=dtype) for t in (mask.index, halo))
    weight = normal(filters, 9 * channels, device=device, dtype=dtype) / (9 * channels) ** 0.5
    return rows, halo_rows, weight, normal(filters, device=device, dtype=dtype), table


def normal(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random values: zeros would run faster."""
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def microseconds(run: Callable[[], object], warmup: int = 10, rep: int = 50) -> float:
    """Median time of a CUDA graph's replay: without the gaps of Python between launches, with a cold L2 cache."""
    run()  # compiles, and lets cuDNN choose
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return 1e3 * float(triton.testing.do_bench(graph.replay, warmup=warmup, rep=rep, return_mode="median"))


# A dense counterpart is timed once, not at every edit size; keys are (kernel, shape).
_dense_times: dict[tuple[str, str], float] = {}


def measure(case: Case) -> Measured:
    """Time a case and its dense counterpart."""
    key = (case.kernel, case.shape)
    if key not in _dense_times:
        _dense_times[key] = microseconds(case.dense)
    floor = max(case.bytes / BYTES_PER_US, case.macs / MACS_PER_US)
    return Measured(
        case.kernel, case.shape, case.edit_size, case.rows, microseconds(case.run), _dense_times[key], floor
    )


def all_cases(edit_sizes: Sequence[float], device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every kernel at every shape and edit size, one after the other, so that inputs are freed."""
    torch.manual_seed(0)
    for side, channels, filters in CONVOLUTIONS:
        for edit_size in edit_sizes:
            yield _convolution(edit_size, side, channels, filters, device, dtype)
    for side, channels, heads in MAPS:
        for edit_size in edit_sizes:
            mask = square(edit_size, side, device)
            yield _group_norm(edit_size, mask, side, channels, dtype)
            yield from _gather_and_scatter(edit_size, mask, side, channels, dtype)
            yield from _attention(edit_size, mask, side, channels, heads, dtype)


def _convolution(
    edit_size: float, side: int, channels: int, filters: int, device: torch.device, dtype: torch.dtype
) -> Case:
    inputs = convolution_inputs(square(edit_size, side, device), side, channels, filters, dtype)
    rows, halo, weight, bias, table = inputs
    x = normal(BATCH, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = weight.view(filters, 3, 3, channels).permute(0, 3, 1, 2)  # channels_last, as cuDNN likes it
    count = table.shape[0]
    values = rows.numel() + halo.numel() + weight.numel() + count * filters
    return Case(
        "conv2d_rows", f"{side}x{side} {channels}->{filters}", edit_size, count,
        run=lambda: torch.ops.fisedit.conv2d_rows(*inputs), dense=lambda: F.conv2d(x, kernel, bias, padding=1),
        bytes=values * dtype.itemsize + table.numel() * 4, macs=count * 9 * channels * filters,
    )  # fmt: skip


def _group_norm(edit_size: float, mask: Mask, side: int, channels: int, dtype: torch.dtype) -> Case:
    device, count = mask.index.device, mask.index.shape[0]
    rows, x = (normal(n, channels, device=device, dtype=dtype) for n in (count, BATCH * side * side))
    dense = x.view(BATCH, side, side, channels).permute(0, 3, 1, 2)
    mean, rstd = (normal(BATCH, _GROUPS, device=device, dtype=torch.float32) for _ in range(2))
    weight, bias = (normal(channels, device=device, dtype=dtype) for _ in range(2))
    return Case(
        "group_norm_rows + silu", f"{side}x{side} {channels}", edit_size, count,
        run=lambda: group_norm_rows_triton(rows, mask.sample, mean, rstd, weight, bias, silu=True),
        dense=lambda: F.silu(F.group_norm(dense, _GROUPS, weight, bias)),
        bytes=2 * rows.numel() * dtype.itemsize + 8 * count, macs=0,
    )  # fmt: skip


def _gather_and_scatter(edit_size: float, mask: Mask, side: int, channels: int, dtype: torch.dtype) -> Iterator[Case]:
    device, count = mask.index.device, mask.index.shape[0]
    rows, base = (normal(n, channels, device=device, dtype=dtype) for n in (count, BATCH * side * side))
    shape = [BATCH, channels, side, side]
    dense = base.view(BATCH, side, side, channels).permute(0, 3, 1, 2)
    common: dict[str, Any] = {
        "shape": f"{side}x{side} {channels}", "edit_size": edit_size, "rows": count, "dense": base.clone, "macs": 0
    }  # fmt: skip
    moved = 2 * rows.numel() * dtype.itemsize + 8 * count
    gather, scatter = torch.ops.fisedit.gather_rows, torch.ops.fisedit.scatter_rows
    order = [0, 2, 3, 1]
    yield Case(kernel="gather_rows / copy", run=lambda: gather(dense, mask.index, order, 3), bytes=moved, **common)
    yield Case(
        kernel="scatter_rows / copy", run=lambda: scatter(rows, base, mask.index, shape, order, 3),
        bytes=moved + 2 * (base.numel() - rows.numel()) * dtype.itemsize, **common,
    )  # fmt: skip


def _attention(
    edit_size: float, mask: Mask, side: int, channels: int, heads: int, dtype: torch.dtype
) -> Iterator[Case]:
    device, count = mask.index.device, mask.index.shape[0]
    pixels, width = side * side, channels // heads
    q, k, v = (normal(count, heads, width, device=device, dtype=dtype) for _ in range(3))
    base_k, base_v = (normal(BATCH * pixels, heads, width, device=device, dtype=dtype) for _ in range(2))
    whole_q, whole_k, whole_v = (normal(BATCH, heads, pixels, width, device=device, dtype=dtype) for _ in range(3))
    common: dict[str, Any] = {
        "shape": f"{pixels} x {heads} heads of {width}", "edit_size": edit_size, "rows": count,
        "dense": lambda: F.scaled_dot_product_attention(whole_q, whole_k, whole_v),
    }  # fmt: skip
    size = dtype.itemsize
    yield Case(
        "attention_rows", run=lambda: torch.ops.fisedit.attention_rows(q, k, v, mask.offsets, mask.offsets, None),
        bytes=4 * q.numel() * size, macs=2 * count * (count // BATCH) * channels, **common,
    )  # fmt: skip
    inputs = (q, k, v, base_k, base_v, mask.index, mask.offsets, None)
    yield Case(
        "attention_cached", run=lambda: torch.ops.fisedit.attention_cached(*inputs),
        bytes=(2 * q.numel() + 2 * base_k.numel()) * size, macs=2 * count * pixels * channels, **common,
    )  # fmt: skip
