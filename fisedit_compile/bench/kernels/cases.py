"""The cases of ``bench kernels``: each is a row kernel, its dense counterpart, and the least work that it must do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

import fisedit_compile.kernels.ops  # noqa: F401  (registers torch.ops.fisedit)
from fisedit_compile.bench.kernels.timing import Roof, microseconds
from fisedit_compile.ir.taps import Taps
from fisedit_compile.masks.sample_masks import square_mask
from fisedit_compile.planning.edit_plan import row_of_pixels
from fisedit_compile.planning.neighbour_table import neighbour_table

#: Samples of every case: one picture under classifier-free guidance.
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
#: Groups of their group norms.
_NORM_GROUPS = 32


@dataclass(frozen=True)
class Case:
    """One kernel at one shape and edit size.

    Attributes:
        kernel: the name of the kernel and what is fused into it.
        shape: its sizes, for people.
        edit_size: the share of the picture that was asked for.
        rows: how many rows the kernel computes.
        run: calls the kernel.
        dense: calls the dense counterpart.
        bytes, macs: the least bytes that ``run`` moves and the multiply-accumulates that it does.
    """

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
    """The microseconds of a case: of the kernel, of its dense counterpart, and the least that the device allows."""

    kernel: str
    shape: str
    edit_size: float
    rows: int
    us: float
    dense_us: float
    floor_us: float


@dataclass(frozen=True)
class Mask:
    """The index tensors of a batch whose samples all have the same square mask."""

    index: Tensor  # int64 [M]
    sample: Tensor  # int64 [M]
    offsets: Tensor  # int32 [BATCH + 1]


def square(edit_size: float, side: int, device: torch.device) -> Mask:
    """The index tensors that a plan makes of a square of ``edit_size`` in a map of ``side`` x ``side`` pixels."""
    active = square_mask(edit_size, (side, side)).expand(BATCH, -1, -1).to(device)
    index = active.flatten().nonzero().flatten()
    count = index.shape[0] // BATCH
    offsets = torch.arange(0, (BATCH + 1) * count, count, dtype=torch.int32, device=device)
    return Mask(index, index // (side * side), offsets)


def convolution_inputs(mask: Mask, side: int, channels: int, filters: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The rows, halo rows, weight, bias and neighbour table of a 3x3 convolution, with random values."""
    device = mask.index.device
    taps = Taps((side, side), (side, side), (3, 3), (1, 1), (1, 1), (1, 1))
    table, halo = neighbour_table(taps, mask.index, mask.index, BATCH)
    assert halo is not None
    rows, halo_rows = (normal(len(t), channels, device=device, dtype=dtype) for t in (mask.index, halo))
    weight = normal(filters, 9 * channels, device=device, dtype=dtype) / (9 * channels) ** 0.5
    return rows, halo_rows, weight, normal(filters, device=device, dtype=dtype), table


def normal(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random values, because zeros would run faster."""
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


#: Microseconds of dense counterparts by (kernel, shape), so that each is timed once and not at every edit size.
_dense_times: dict[tuple[str, str], float] = {}


def measure(case: Case, roof: Roof) -> Measured:
    """Time a case and its dense counterpart."""
    key = (case.kernel, case.shape)
    if key not in _dense_times:
        _dense_times[key] = microseconds(case.dense)
    floor = max(case.bytes / roof.bytes_per_us, case.macs / roof.macs_per_us)
    return Measured(
        case.kernel, case.shape, case.edit_size, case.rows, microseconds(case.run), _dense_times[key], floor
    )


def all_cases(edit_sizes: Sequence[float], device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every kernel at every shape and edit size. Cases are made one by one, so that few inputs are alive."""
    torch.manual_seed(0)
    for side, channels, filters in CONVOLUTIONS:
        for edit_size in edit_sizes:
            yield from _convolution(edit_size, side, channels, filters, device, dtype)
    for side, channels, heads in MAPS:
        for edit_size in edit_sizes:
            mask = square(edit_size, side, device)
            yield _group_norm(edit_size, mask, side, channels, dtype)
            yield from _linear(edit_size, mask, side, channels, dtype)
            yield from _gather_and_scatter(edit_size, mask, side, channels, dtype)
            yield from _attention(edit_size, mask, side, channels, heads, dtype)


def _convolution(
    edit_size: float, side: int, channels: int, filters: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    mask = square(edit_size, side, device)
    inputs = convolution_inputs(mask, side, channels, filters, dtype)
    rows, halo, weight, bias, table = inputs
    x = normal(BATCH, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = weight.view(filters, 3, 3, channels).permute(0, 3, 1, 2)  # channels_last, as cuDNN likes it
    count = table.shape[0]
    values = rows.numel() + halo.numel() + weight.numel() + count * filters
    moved = values * dtype.itemsize + table.numel() * 4
    common: dict[str, Any] = {
        "shape": f"{side}x{side} {channels}->{filters}", "edit_size": edit_size, "rows": count,
        "macs": count * 9 * channels * filters,
    }  # fmt: skip
    yield Case(
        kernel="conv2d_rows", run=lambda: torch.ops.fisedit.conv2d_rows(*inputs),
        dense=lambda: F.conv2d(x, kernel, bias, padding=1), bytes=moved, **common,
    )  # fmt: skip
    time = normal(BATCH, filters, device=device, dtype=dtype)
    residual = normal(count, filters, device=device, dtype=dtype)
    scale, shift = (normal(BATCH, filters, device=device, dtype=torch.float32) for _ in range(2))
    whole = torch.empty_like(F.conv2d(x, kernel, bias, padding=1)).normal_()

    def dense() -> Tensor:
        raw = F.conv2d(x, kernel, bias, padding=1) + time[:, :, None, None] + whole
        return F.silu(F.group_norm(raw, _NORM_GROUPS, bias, bias))

    fused = partial(torch.ops.fisedit.conv2d_rows_and_norm, *inputs, None, mask.sample)
    yield Case(
        kernel="conv2d_rows + time + residual + norm + silu",
        run=lambda: fused(time, residual, scale, shift, "silu"), dense=dense,
        bytes=moved + 2 * residual.numel() * dtype.itemsize + 8 * count, **common,
    )  # fmt: skip


def _group_norm(edit_size: float, mask: Mask, side: int, channels: int, dtype: torch.dtype) -> Case:
    device, count = mask.index.device, mask.index.shape[0]
    rows, x = (normal(n, channels, device=device, dtype=dtype) for n in (count, BATCH * side * side))
    dense = x.view(BATCH, side, side, channels).permute(0, 3, 1, 2)
    scale, shift = (normal(BATCH, channels, device=device, dtype=torch.float32) for _ in range(2))
    weight, bias = (normal(channels, device=device, dtype=dtype) for _ in range(2))
    return Case(
        "group_norm_rows + silu", f"{side}x{side} {channels}", edit_size, count,
        run=lambda: torch.ops.fisedit.group_norm_rows(rows, mask.sample, scale, shift, True),
        dense=lambda: F.silu(F.group_norm(dense, _NORM_GROUPS, weight, bias)),
        bytes=2 * rows.numel() * dtype.itemsize + 8 * count, macs=0,
    )  # fmt: skip


def _linear(edit_size: float, mask: Mask, side: int, channels: int, dtype: torch.dtype) -> Iterator[Case]:
    device, count = mask.index.device, mask.index.shape[0]
    op, pixels = torch.ops.fisedit.linear_rows, BATCH * side * side
    for name, wide, out, geglu in (
        ("qkv", channels, 3 * channels, False),
        ("out + residual", channels, channels, False),
        ("geglu", channels, 4 * channels, True),
        ("4C->C + residual", 4 * channels, channels, False),
    ):
        filters = out * (2 if geglu else 1)
        rows, x = (normal(n, wide, device=device, dtype=dtype) for n in (count, pixels))
        weight, bias = (
            normal(filters, wide, device=device, dtype=dtype) / wide**0.5,
            normal(filters, device=device, dtype=dtype),
        )
        residual = normal(count, out, device=device, dtype=dtype) if "residual" in name else None
        activation = "geglu" if geglu else "none"
        yield Case(
            f"linear_rows {name} / cuBLAS", f"{side}x{side} {wide}->{out}", edit_size, count,
            run=partial(op, rows, weight, bias, residual=residual, activation=activation),
            dense=partial(F.linear, x, weight, bias),
            bytes=(rows.numel() + weight.numel() + count * out * (2 if residual is not None else 1)) * dtype.itemsize,
            macs=count * wide * filters,
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
    if dtype.itemsize == 2:  # varlen_attn wants the longest sequence on the host: all rows is a safe bound
        offsets, same = mask.offsets, {"shape": f"{count} x {heads} heads of {width}"}
        op = torch.ops.fisedit.attention_rows
        yield Case(
            "attention_rows / varlen_attn", run=lambda: op(q, k, v, offsets, offsets, None),
            bytes=4 * q.numel() * size, macs=2 * count * (count // BATCH) * channels,
            **(common | same | {"dense": lambda: varlen_attn(q, k, v, offsets, offsets, count, count)}),
        )  # fmt: skip
    inputs = (q, k, v, base_k, base_v, row_of_pixels(mask.index, len(base_k)), mask.offsets, None)
    yield Case(
        "attention_cached", run=lambda: torch.ops.fisedit.attention_cached(*inputs),
        bytes=(2 * q.numel() + 2 * base_k.numel()) * size, macs=2 * count * pixels * channels, **common,
    )  # fmt: skip
