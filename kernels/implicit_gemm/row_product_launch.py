"""How a product of rows is launched: which tile or library, how many splits, and the epilogue in it or behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton

from fisedit_compile.kernels.implicit_gemm.conv2d_rows import check_beside
from fisedit_compile.kernels.implicit_gemm.epilogue import check_epilogue
from fisedit_compile.kernels.implicit_gemm.row_product_finish_triton import finish_kernel
from fisedit_compile.kernels.implicit_gemm.row_product_layer_norm_triton import finish_layer_norm_kernel
from fisedit_compile.kernels.implicit_gemm.row_product_tiles import Library, Tile, choose_tile
from fisedit_compile.kernels.implicit_gemm.row_product_triton import row_product_kernel
from fisedit_compile.kernels.launch.semaphores import semaphores
from fisedit_compile.kernels.launch.triton_launch import aligned, check_dtypes, input_precision, launch

# Tiles of rows that run one after the other over all filters: together they read a few MB, which stay in L2.
_GROUP = 8
# Of a sum that a thread holds beside what its epilogue reads.
_REGISTERS = 64
# Of a program of the second kernel.
_FINISH_ROWS, _FINISH_FILTERS = 8, 128
_FINISH_VALUES = 4096  # where it needs whole rows


@dataclass(frozen=True)
class LayerNorm:
    """A layer norm of the result."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


def launch_row_product(
    op: str,
    rows: torch.Tensor,
    halo: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    count: torch.Tensor | None = None,
    sample: torch.Tensor | None = None,
    sample_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    activation: str = "none",
    beside: torch.Tensor | None = None,
    beside_weight: torch.Tensor | None = None,
    *,
    keep_raw: bool,
    tile: Tile | Library | None,
    layer_norm: LayerNorm | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Launch the kernel for ``conv2d_rows``, or without a table for ``linear_rows``.

    Args:
        layer_norm: of the result, which has no norm or activation then and is kept (``keep_raw``).

    Returns:
        The result before norm and activation (None unless ``keep_raw``) and the result.

    Raises:
        ValueError: arguments that do not fit, or dtypes that differ or that the kernel does not take.
    """
    check_dtypes(op, rows, halo, weight, bias, sample_bias, residual, beside, beside_weight)
    check_epilogue(op, sample, sample_bias, residual, scale, shift, activation)
    (active, channels), filters = rows.shape, weight.shape[0]
    there, taps = (active, 1) if table is None else table.shape
    if weight.shape[1] != taps * channels or (halo is not None and halo.shape[1] != channels):
        raise ValueError(
            f"{op}: weight [{filters}, {weight.shape[1]}] does not fit rows of {channels} channels and {taps} taps; "
            f"give [Cout, {taps * channels}], and a halo with the channels of the rows"
        )
    check_beside(op, beside, beside_weight, outputs=there, filters=filters)
    side_channels = 0
    if beside is not None and beside_weight is not None:
        if table is None:
            raise ValueError(f"{op}: rows beside a convolution need its neighbour table")
        side_channels = beside.shape[1]
        beside, beside_weight = beside.contiguous(), beside_weight.contiguous()
    geglu = activation == "geglu"
    if geglu and keep_raw:
        raise ValueError(f"{op}: geglu has another width than what it reads; use the operator without a norm")
    width = filters // 2 if geglu else filters
    epilogue = (bias, sample, sample_bias, residual, scale, shift)
    finish = _Finish(there, width, rows, count, epilogue, activation, keep_raw, layer_norm)
    if finish.out.numel() == 0:
        return finish.raw, finish.out
    if tile is None:
        tile = choose_tile(
            there, taps, channels, width, rows.dtype, side_channels=side_channels, geglu=geglu, linear=table is None,
            plain=finish.plain, apart=layer_norm is not None,
        )  # fmt: skip
    if isinstance(tile, Library):
        product = F.linear(rows, weight, bias)  # its own epilogue adds the bias
        if finish.plain:
            return None, product
        finish.epilogue[0] = None
        finish.launch(product, 1, part_stride=filters, to_gate=width)
        return finish.raw, finish.out

    if geglu and tile.more_rows:
        raise ValueError(f"{op}: a tile of {tile.rows} rows, two parts, cannot do geglu; give a power of two")
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    weight, table = weight.contiguous(), None if table is None else table.contiguous()
    halo = halo.contiguous() if halo is not None and halo.numel() else None
    steps = taps * triton.cdiv(channels, tile.channels) + triton.cdiv(side_channels, tile.channels)
    span = triton.cdiv(steps, tile.splits)
    splits = triton.cdiv(steps, span)  # none without a step
    tiles = triton.cdiv(there, tile.rows) * triton.cdiv(width, tile.filters)
    parts = arrived = None
    apart = layer_norm is not None or (splits > 1 and (tile.second_kernel or tile.more_rows > 0))
    if apart:
        parts = rows.new_empty(splits * (1 + geglu), there, width, dtype=_dtype_of_parts(rows.dtype))
    elif splits > 1:
        parts = rows.new_empty(tiles * splits * (1 + geglu), tile.rows, tile.filters, dtype=_dtype_of_parts(rows.dtype))
        arrived = semaphores(rows.device, tiles)
    launch(row_product_kernel, (tiles, splits), rows)(
        rows,
        halo,
        beside,
        weight,
        beside_weight,
        table,
        count,
        *([None] * len(finish.epilogue) if apart else finish.epilogue),
        None if apart else finish.raw,
        finish.out,
        parts,
        arrived,
        there,
        active,
        channels,
        side_channels,
        width,
        rows.stride(0),
        span,
        TAPS=taps,
        BM=tile.rows - tile.more_rows,
        MORE=tile.more_rows,
        BN=tile.filters,
        BK=tile.channels,
        ACROSS=tile.across,
        GROUP=_GROUP,
        WHOLE=channels % tile.channels == 0 and side_channels % tile.channels == 0,
        ALIGNED=aligned(channels, halo, weight)
        and aligned(rows.stride(0), rows)
        and aligned(side_channels, beside, beside_weight),
        SPLITS=2 if apart else splits,
        HALVES=not apart and tile.rows * tile.filters > _REGISTERS * 32 * tile.warps,
        SILU=activation == "silu" and not apart,
        GEGLU=geglu,
        PRECISION=input_precision(rows.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if apart:
        finish.launch(parts, splits, part_stride=width, to_gate=splits * there * width)
    return finish.raw, finish.out


def _dtype_of_parts(dtype: torch.dtype) -> torch.dtype:
    """Of partial sums in memory: that of the rows where torch allows it for its own products, else fp32.

    They are read and written once more, and their rounding is of the size of the result's own.
    """
    matmul = torch.backends.cuda.matmul
    allowed = {
        torch.float16: matmul.allow_fp16_reduced_precision_reduction,
        torch.bfloat16: matmul.allow_bf16_reduced_precision_reduction,
    }
    return dtype if allowed.get(dtype) else torch.float32


class _Finish:
    """The results of a product, the arguments of its epilogue, and its launch as a kernel of its own."""

    def __init__(
        self,
        there: int,
        width: int,
        rows: torch.Tensor,
        count: torch.Tensor | None,
        epilogue: tuple[torch.Tensor | None, ...],
        activation: str,
        keep_raw: bool,
        layer_norm: LayerNorm | None,
    ) -> None:
        self.out = rows.new_empty(there, width)
        self.raw = torch.empty_like(self.out) if keep_raw else None
        self.epilogue: list[Any] = [None if each is None else each.contiguous() for each in epilogue]
        self.plain = (
            layer_norm is None and activation == "none" and not keep_raw and all(each is None for each in epilogue[1:])
        )
        self._count, self._activation, self._layer_norm = count, activation, layer_norm

    def launch(self, parts: torch.Tensor | None, splits: int, *, part_stride: int, to_gate: int) -> None:
        there, width = self.out.shape
        if self._layer_norm is not None:
            bias, _, _, residual, _, _ = self.epilogue
            whole = triton.next_power_of_2(width)
            height = max(1, _FINISH_VALUES // whole)
            launch(finish_layer_norm_kernel, (triton.cdiv(there, height),), self.out)(
                parts,
                self._count,
                bias,
                residual,
                self._layer_norm.weight,
                self._layer_norm.bias,
                self.raw,
                self.out,
                there,
                self._layer_norm.eps,
                C=width,
                BM=height,
                BC=whole,
                SPLITS=splits,
                num_warps=4,
            )
            return
        block = _FINISH_ROWS if splits > 1 else 2 * _FINISH_ROWS
        launch(finish_kernel, (triton.cdiv(there, block), triton.cdiv(width, _FINISH_FILTERS)), self.out)(
            parts,
            self._count,
            *self.epilogue,
            self.raw,
            self.out,
            there,
            width,
            part_stride,
            to_gate,
            BM=block,
            BN=_FINISH_FILTERS,
            SPLITS=splits,
            SILU=self._activation == "silu",
            GEGLU=self._activation == "geglu",
            num_warps=4,
        )
