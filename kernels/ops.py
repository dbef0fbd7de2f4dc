"""Registers the row operators with PyTorch as ``torch.ops.fisedit.*``: schema, kernels and fake (shape) functions.

Importing this module registers them; importing it again changes nothing. It never imports Triton: the first call of an
operator on CUDA does, if the operator has a Triton kernel. Values in fp64 go to the reference on CUDA as well. Tracing
does not look into the operators: torch.export and torch.compile see one node each, with the shape that its fake
function gives, whatever the number of rows. The docstrings of the reference functions describe the arguments.

**Padding.** A CUDA graph has fixed shapes, so that on a GPU rows are padded to one of a few sizes. ``count``, int32 [1]
on the device, says how many rows are real; None means that all are. Kernels do not compute padded rows, whose results
are unspecified; references compute every row. No real row ever reads a padded one: no neighbour table names it, and it
lies outside the offsets of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from fisedit_compile.ir.layout import inverse_permutation
from fisedit_compile.kernels.attention.attention_rows import attention_cached_reference, attention_rows_reference
from fisedit_compile.kernels.attention.controlled_rows import controlled_rows_reference
from fisedit_compile.kernels.implicit_gemm.conv2d_rows import conv2d_rows_and_norm_reference, conv2d_rows_reference
from fisedit_compile.kernels.implicit_gemm.linear_rows import (
    linear_rows_and_layer_norm_reference,
    linear_rows_and_norm_reference,
    linear_rows_reference,
)
from fisedit_compile.kernels.implicit_gemm.row_product_arguments import EPILOGUE_SCHEMA, SHORTCUT_SCHEMA
from fisedit_compile.kernels.indexing.gather_scatter import gather_rows_reference, scatter_rows_reference
from fisedit_compile.kernels.indexing.packed_rows import pack_rows_reference
from fisedit_compile.kernels.indexing.row_format import RowFormat
from fisedit_compile.kernels.norms.cat_norm_rows import cat_norm_rows_reference
from fisedit_compile.kernels.norms.followed_statistics import followed_statistics_reference
from fisedit_compile.kernels.norms.group_norm_rows import (
    group_norm_rows_reference,
    group_norm_statistics_reference,
    group_norm_whole_reference,
)
from fisedit_compile.kernels.norms.layer_norm_rows import layer_norm_rows_reference
from fisedit_compile.kernels.norms.tile_moments import moments_dtype, tile_moments_reference

NAMESPACE = "fisedit"

Tensors = torch.Tensor | tuple[torch.Tensor, ...]


def _register(
    name: str,
    arguments: str,
    kernel: Callable[..., Tensors],
    fake: Callable[..., Tensors],
    cuda: Callable[..., Tensors] | None = None,
    results: str = "Tensor",
) -> None:
    if hasattr(getattr(torch.ops, NAMESPACE), name):
        return  # imported again: PyTorch keeps the first registration and refuses a second
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, f"({arguments}) -> {results}", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "cpu", kernel)
    torch.library.impl(qualified, "cuda", cuda or kernel)
    torch.library.register_fake(qualified, fake)


def _launcher(module: str, name: str, reference: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """A function that calls the launcher ``name`` of the module ``kernels/{module}``, or for fp64 the reference.

    The module is imported at the first call.
    """

    def kernel(first: torch.Tensor, *others: Any) -> Tensors:
        if first.dtype == torch.float64:
            return reference(first, *others)
        launch = getattr(import_module(f"fisedit_compile.kernels.{module}"), name)
        result: Tensors = launch(first, *others)
        return result

    return kernel


def _gather_rows(x: torch.Tensor, index: torch.Tensor, order: Sequence[int], pixel_dims: int) -> torch.Tensor:
    return x.new_empty([index.shape[0], *(x.shape[dim] for dim in order[pixel_dims:])])


def _scatter_rows(
    rows: torch.Tensor,
    base: torch.Tensor,
    index: torch.Tensor,
    shape: Sequence[int],
    order: Sequence[int],
    pixel_dims: int,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    return base.new_empty([shape[dim] for dim in order]).permute(inverse_permutation(order))


def _product(rows: torch.Tensor, weight: torch.Tensor, count: int | torch.SymInt, epilogue: Sequence[Any]) -> Any:
    return rows.new_empty(count, weight.shape[0] // (2 if "geglu" in epilogue[6:7] else 1))


def _conv2d_rows(
    rows: torch.Tensor, halo: Any, weight: torch.Tensor, bias: Any, table: torch.Tensor, *epilogue: Any
) -> torch.Tensor:
    return _product(rows, weight, table.shape[0], epilogue)


def _conv2d_rows_and_norm(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return _conv2d_rows(*arguments), _conv2d_rows(*arguments)


def _linear_rows(rows: torch.Tensor, weight: torch.Tensor, bias: Any, *epilogue: Any) -> torch.Tensor:
    return _product(rows, weight, rows.shape[0], epilogue)


def _linear_rows_and_norm(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return _linear_rows(*arguments), _linear_rows(*arguments)


def _linear_rows_and_layer_norm(rows: torch.Tensor, weight: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return _product(rows, weight, rows.shape[0], ()), _product(rows, weight, rows.shape[0], ())


def _cat_norm_rows(left: torch.Tensor, right: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    joined = left.new_empty(left.shape[0], left.shape[1] + right.shape[1])
    return joined, torch.empty_like(joined)


def _group_norm_statistics(rows: torch.Tensor, samples: int, *_: Any) -> tuple[torch.Tensor, ...]:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    scale, shift = (rows.new_empty(samples, rows.shape[1], dtype=dtype) for _ in range(2))
    return scale, shift


def _tile_moments(rows: torch.Tensor, tiles: torch.Tensor, groups: int) -> torch.Tensor:
    return rows.new_empty(tiles.shape[0], groups, 2, dtype=moments_dtype(rows.dtype))


def _followed_statistics(*arguments: Any) -> tuple[torch.Tensor, ...]:
    scale, shift = arguments[4:6]
    return torch.empty_like(scale), torch.empty_like(shift)


def _pack_rows(rows: torch.Tensor, bits: int) -> torch.Tensor:
    nbytes = RowFormat(tuple(rows.shape[1:]), rows.dtype, bits).nbytes
    return rows.new_empty(rows.shape[0], nbytes, dtype=torch.uint8)


def _like_rows(rows: torch.Tensor, *_: Any) -> torch.Tensor:
    return rows.new_empty(rows.shape)


_register("gather_rows", "Tensor x, Tensor index, int[] order, int pixel_dims", gather_rows_reference, _gather_rows)
_register(
    "scatter_rows",
    "Tensor rows, Tensor base, Tensor index, SymInt[] shape, int[] order, int pixel_dims, Tensor? count=None",
    scatter_rows_reference,
    _scatter_rows,
    _launcher("indexing.scatter_rows_triton", "scatter_rows_triton", scatter_rows_reference),
)
_register(
    "pack_rows",
    "Tensor rows, int bits",
    pack_rows_reference,
    _pack_rows,
    _launcher("indexing.pack_rows_triton", "pack_rows_triton", pack_rows_reference),
)
_CONV2D_ROWS = (
    f"Tensor rows, Tensor? halo, Tensor weight, Tensor? bias, Tensor table, {EPILOGUE_SCHEMA}, {SHORTCUT_SCHEMA}"
)
_register(
    "conv2d_rows",
    _CONV2D_ROWS,
    conv2d_rows_reference,
    _conv2d_rows,
    _launcher("implicit_gemm.conv2d_rows_triton", "conv2d_rows_triton", conv2d_rows_reference),
)
_register(
    "conv2d_rows_and_norm",
    _CONV2D_ROWS,
    conv2d_rows_and_norm_reference,
    _conv2d_rows_and_norm,
    _launcher("implicit_gemm.conv2d_rows_triton", "conv2d_rows_and_norm_triton", conv2d_rows_and_norm_reference),
    results="(Tensor, Tensor)",
)
_LINEAR_ROWS = f"Tensor rows, Tensor weight, Tensor? bias, {EPILOGUE_SCHEMA}"
_register(
    "linear_rows",
    _LINEAR_ROWS,
    linear_rows_reference,
    _linear_rows,
    _launcher("implicit_gemm.linear_rows_triton", "linear_rows_triton", linear_rows_reference),
)
_register(
    "linear_rows_and_norm",
    _LINEAR_ROWS,
    linear_rows_and_norm_reference,
    _linear_rows_and_norm,
    _launcher("implicit_gemm.linear_rows_triton", "linear_rows_and_norm_triton", linear_rows_and_norm_reference),
    results="(Tensor, Tensor)",
)
_register(
    "linear_rows_and_layer_norm",
    "Tensor rows, Tensor weight, Tensor? bias, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "Tensor? count=None",
    linear_rows_and_layer_norm_reference,
    _linear_rows_and_layer_norm,
    _launcher(
        "implicit_gemm.linear_rows_triton", "linear_rows_and_layer_norm_triton", linear_rows_and_layer_norm_reference
    ),
    results="(Tensor, Tensor)",
)
_register(
    "group_norm_rows",
    "Tensor rows, Tensor sample, Tensor scale, Tensor shift, bool silu=False, Tensor? count=None",
    group_norm_rows_reference,
    _like_rows,
    _launcher("norms.group_norm_rows_triton", "group_norm_rows_triton", group_norm_rows_reference),
)
_register(
    "group_norm_whole",
    "Tensor rows, int samples, int groups, Tensor? weight, Tensor? bias, float eps, bool silu=False",
    group_norm_whole_reference,
    _like_rows,
    _launcher("norms.group_norm_whole_triton", "group_norm_whole_triton", group_norm_whole_reference),
)
_register(
    "group_norm_statistics",
    "Tensor rows, int samples, int groups, Tensor? weight, Tensor? bias, float eps",
    group_norm_statistics_reference,
    _group_norm_statistics,
    _launcher("norms.group_norm_statistics_triton", "group_norm_statistics_triton", group_norm_statistics_reference),
    results="(Tensor, Tensor)",
)
_register(
    "tile_moments",
    "Tensor rows, Tensor tiles, int groups",
    tile_moments_reference,
    _tile_moments,
    _launcher("norms.tile_moments_triton", "tile_moments_triton", tile_moments_reference),
)
_register(
    "followed_statistics",
    "Tensor moments, Tensor tile_ids, Tensor tile_sizes, Tensor base, Tensor scale, Tensor shift, "
    "Tensor? weight, Tensor? bias, float eps",
    followed_statistics_reference,
    _followed_statistics,
    _launcher("norms.followed_statistics_triton", "followed_statistics_triton", followed_statistics_reference),
    results="(Tensor, Tensor)",
)
_register(
    "layer_norm_rows",
    "Tensor rows, Tensor? weight, Tensor? bias, float eps, Tensor? count=None",
    layer_norm_rows_reference,
    _like_rows,
    _launcher("norms.layer_norm_rows_triton", "layer_norm_rows_triton", layer_norm_rows_reference),
)
_register(
    "cat_norm_rows",
    "Tensor left, Tensor right, Tensor sample, Tensor scale, Tensor shift, bool silu=False, Tensor? count=None",
    cat_norm_rows_reference,
    _cat_norm_rows,
    _launcher("norms.cat_norm_rows_triton", "cat_norm_rows_triton", cat_norm_rows_reference),
    results="(Tensor, Tensor)",
)
_register(
    "attention_rows",
    "Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor k_offsets, float? scale",
    attention_rows_reference,
    _like_rows,
    _launcher("attention.attention_rows_triton", "attention_rows_triton", attention_rows_reference),
)
_register(
    "attention_cached",
    "Tensor q, Tensor k, Tensor v, Tensor base_k, Tensor base_v, Tensor row_of, Tensor offsets, float? scale",
    attention_cached_reference,
    _like_rows,
    _launcher("attention.attention_cached_triton", "attention_cached_triton", attention_cached_reference),
)
_register(
    "controlled_rows",
    "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor index, Tensor maps, Tensor span, Tensor mapper, "
    "Tensor keep, Tensor weight, int pixels, float? scale",
    controlled_rows_reference,
    _like_rows,
    _launcher("attention.controlled_rows_triton", "controlled_rows_triton", controlled_rows_reference),
)
