"""Launches a product of rows on the GPU: chooses its tile or cuBLAS, its splits, and which kernel does the epilogue.

A product takes one kernel, or two. One that is split, and whose programs do not add their partial sums themselves,
leaves them to a second kernel, which adds them and does the epilogue. The same kernel does the epilogue of a product
that cuBLAS multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton

from fisedit_compile.kernels.implicit_gemm.row_product_arguments import check_epilogue, check_shortcut
from fisedit_compile.kernels.implicit_gemm.row_product_finish_triton import finish_kernel
from fisedit_compile.kernels.implicit_gemm.row_product_layer_norm_triton import finish_layer_norm_kernel
from fisedit_compile.kernels.implicit_gemm.row_product_tiles import Library, Tile, choose_tile
from fisedit_compile.kernels.implicit_gemm.row_product_triton import row_product_kernel
from fisedit_compile.kernels.launch.semaphores import semaphores, zero_row
from fisedit_compile.kernels.launch.triton_launch import aligned, check_dtypes, input_precision, launch

# Tiles of rows that are computed for all filters before the next tiles of rows begin. What they read, a few MB, stays
# in the L2 cache meanwhile.
_GROUP = 8
# Accumulator registers a thread above which the epilogue runs in two halves, one after the other.
_ACCUMULATORS = 64
# Rows and filters that a program of the second kernel computes.
_FINISH_ROWS, _FINISH_FILTERS = 8, 128
# Values that a program of the second kernel computes where a layer norm needs whole rows.
_LAYER_NORM_VALUES = 4096


@dataclass(frozen=True)
class LayerNorm:
    """The layer norm that follows a product: weight and bias ``[filters]`` or None, and eps."""

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
    shortcut: torch.Tensor | None = None,
    shortcut_weight: torch.Tensor | None = None,
    *,
    keep_raw: bool,
    tile: Tile | Library | None,
    layer_norm: LayerNorm | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Compute a product of rows: ``conv2d_rows``, or without a table ``linear_rows``, whose references describe it.

    Args:
        op: the operator's name, for errors.
        keep_raw: return the result before norm and activation as well.
        tile: what computes it; None takes the fastest of the nearest size that was measured.
        layer_norm: a layer norm that follows. The epilogue has no norm and no activation then, and ``keep_raw`` is set.

    Returns:
        The result before norm and activation (None unless ``keep_raw``) and the result.

    Raises:
        ValueError: arguments that do not fit, or dtypes that differ or that the kernel does not take.
    """
    check_dtypes(op, rows, halo, weight, bias, sample_bias, residual, shortcut, shortcut_weight)
    check_epilogue(op, sample, sample_bias, residual, scale, shift, activation)
    (active, channels), filters = rows.shape, weight.shape[0]
    padded, taps = (active, 1) if table is None else table.shape
    if weight.shape[1] != taps * channels or (halo is not None and halo.shape[1] != channels):
        raise ValueError(
            f"{op}: weight [{filters}, {weight.shape[1]}] does not fit rows of {channels} channels and {taps} taps; "
            f"give [Cout, {taps * channels}], and a halo with the channels of the rows"
        )
    if weight.numel() >= 2**31:
        raise ValueError(f"{op}: a weight of {weight.numel()} values, which has to have fewer than {2**31}")
    check_shortcut(op, shortcut, shortcut_weight, outputs=padded, filters=filters)
    shortcut_channels = 0
    if shortcut is not None and shortcut_weight is not None:
        if table is None:
            raise ValueError(f"{op}: a shortcut needs the neighbour table of a convolution")
        shortcut_channels = shortcut.shape[1]
        shortcut, shortcut_weight = shortcut.contiguous(), shortcut_weight.contiguous()
    geglu = activation == "geglu"
    if geglu and keep_raw:
        raise ValueError(f"{op}: geglu has another width than what it reads; use the operator without a norm")
    width = filters // 2 if geglu else filters
    epilogue = (bias, sample, sample_bias, residual, scale, shift)
    finish = _Finish(padded, width, rows, count, epilogue, activation, keep_raw, layer_norm)
    if finish.out.numel() == 0:
        return finish.raw, finish.out
    if tile is None:
        tile = choose_tile(
            padded, taps, channels, width, rows.dtype, shortcut_channels=shortcut_channels, geglu=geglu,
            linear=table is None, plain=finish.plain, second_kernel=layer_norm is not None,
        )  # fmt: skip
    if isinstance(tile, Library):
        product = F.linear(rows, weight, bias)  # cuBLAS adds the bias in an epilogue of its own
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
    steps = taps * triton.cdiv(channels, tile.channels) + triton.cdiv(shortcut_channels, tile.channels)
    span = triton.cdiv(steps, tile.splits)
    splits = triton.cdiv(steps, span)  # fewer than the tile's where the last splits would have no step
    tiles = triton.cdiv(padded, tile.rows) * triton.cdiv(width, tile.filters)
    parts = arrived = None
    second_kernel = layer_norm is not None or (splits > 1 and (tile.second_kernel or tile.more_rows > 0))
    if second_kernel:
        parts = rows.new_empty(splits * (1 + geglu), padded, width, dtype=_dtype_of_parts(rows.dtype))
    elif splits > 1:
        parts = rows.new_empty(tiles * splits * (1 + geglu), tile.rows, tile.filters, dtype=_dtype_of_parts(rows.dtype))
        arrived = semaphores(rows.device, tiles)
    launch(row_product_kernel, (tiles, splits), rows)(
        rows,
        halo,
        shortcut,
        None if table is None else zero_row(rows, channels),
        weight,
        shortcut_weight,
        table,
        count,
        *([None] * len(finish.epilogue) if second_kernel else finish.epilogue),
        None if second_kernel else finish.raw,
        finish.out,
        parts,
        arrived,
        padded,
        active,
        channels,
        shortcut_channels,
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
        WHOLE=channels % tile.channels == 0 and shortcut_channels % tile.channels == 0,
        ALIGNED=aligned(channels, halo, weight)
        and aligned(rows.stride(0), rows)
        and aligned(shortcut_channels, shortcut, shortcut_weight),
        SPLITS=2 if second_kernel else splits,
        HALVES=not second_kernel and tile.rows * tile.filters > _ACCUMULATORS * 32 * tile.warps,
        SILU=activation == "silu" and not second_kernel,
        GEGLU=geglu,
        PRECISION=input_precision(rows.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if second_kernel:
        finish.launch(parts, splits, part_stride=width, to_gate=splits * padded * width)
    return finish.raw, finish.out


def _dtype_of_parts(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial sums in memory: the rows' own where torch allows that for its own products, else fp32.

    Half as many bytes are written and read again. What it costs is one more rounding, of the size of the result's own.
    """
    matmul = torch.backends.cuda.matmul
    allowed = {
        torch.float16: matmul.allow_fp16_reduced_precision_reduction,
        torch.bfloat16: matmul.allow_bf16_reduced_precision_reduction,
    }
    return dtype if allowed.get(dtype) else torch.float32


class _Finish:
    """The results of a product, the arguments of its epilogue, and how the second kernel is launched.

    Attributes:
        out: [padded, width], the result.
        raw: [padded, width], the result before norm and activation; None unless it is kept.
        epilogue: bias, sample, sample_bias, residual, scale and shift, contiguous or None.
        plain: nothing but a bias follows the product.
    """

    def __init__(
        self,
        padded: int,
        width: int,
        rows: torch.Tensor,
        count: torch.Tensor | None,
        epilogue: tuple[torch.Tensor | None, ...],
        activation: str,
        keep_raw: bool,
        layer_norm: LayerNorm | None,
    ) -> None:
        self.out = rows.new_empty(padded, width)
        self.raw = torch.empty_like(self.out) if keep_raw else None
        self.epilogue: list[Any] = [None if each is None else each.contiguous() for each in epilogue]
        self.plain = (
            layer_norm is None and activation == "none" and not keep_raw and all(each is None for each in epilogue[1:])
        )
        self._count, self._activation, self._layer_norm = count, activation, layer_norm

    def launch(self, parts: torch.Tensor | None, splits: int, *, part_stride: int, to_gate: int) -> None:
        """Add the partial sums of ``splits`` splits, or take the one product that cuBLAS computed, and finish it.

        Args:
            parts: [splits, padded, width] partial sums, or [padded, filters].
            part_stride: elements from a row of parts to the next.
            to_gate: elements from a value to its gate; for geglu.
        """
        padded, width = self.out.shape
        if self._layer_norm is not None:
            bias, _, _, residual, _, _ = self.epilogue
            whole = triton.next_power_of_2(width)
            height = max(1, _LAYER_NORM_VALUES // whole)
            launch(finish_layer_norm_kernel, (triton.cdiv(padded, height),), self.out)(
                parts,
                self._count,
                bias,
                residual,
                self._layer_norm.weight,
                self._layer_norm.bias,
                self.raw,
                self.out,
                padded,
                self._layer_norm.eps,
                C=width,
                BM=height,
                BC=whole,
                SPLITS=splits,
                num_warps=4,
            )
            return
        block = _FINISH_ROWS if splits > 1 else 2 * _FINISH_ROWS
        launch(finish_kernel, (triton.cdiv(padded, block), triton.cdiv(width, _FINISH_FILTERS)), self.out)(
            parts,
            self._count,
            *self.epilogue,
            self.raw,
            self.out,
            padded,
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
