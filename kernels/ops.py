"""Registers the row operators with PyTorch as ``torch.ops.fisedit.*``: schema, kernels and fake (shape) functions.

Importing this module is all it takes; a second import changes nothing. It never imports Triton: on CUDA the first call
of an operator that has a Triton kernel does, and fp64 stays with the reference there too. The operators are
opaque to tracing: torch.export and torch.compile see one node with the shape that its fake function gives, for any
number of rows. The arguments are described beside the reference functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from fisedit_compile.kernels.attention_rows import attention_cached_reference, attention_rows_reference
from fisedit_compile.kernels.conv2d_rows import conv2d_rows_reference
from fisedit_compile.kernels.gather_scatter import (
    gather_rows_reference,
    inverse_permutation,
    scatter_rows_reference,
)
from fisedit_compile.kernels.group_norm_rows import group_norm_rows_reference

NAMESPACE = "fisedit"


def _register(
    name: str,
    arguments: str,
    kernel: Callable[..., torch.Tensor],
    fake: Callable[..., torch.Tensor],
    cuda: Callable[..., torch.Tensor] | None = None,
) -> None:
    if hasattr(getattr(torch.ops, NAMESPACE), name):
        return  # imported again: PyTorch keeps the first registration and refuses a second
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, f"({arguments}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "cpu", kernel)
    torch.library.impl(qualified, "cuda", cuda or kernel)
    torch.library.register_fake(qualified, fake)


def _launcher(module: str, name: str, reference: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Calls the launcher ``name`` of a module beside this, imported at the first call; fp64 goes to the reference."""

    def kernel(first: torch.Tensor, *others: Any) -> torch.Tensor:
        if first.dtype == torch.float64:
            return reference(first, *others)
        launch = getattr(import_module(f"fisedit_compile.kernels.{module}"), name)
        result: torch.Tensor = launch(first, *others)
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
) -> torch.Tensor:
    return base.new_empty([shape[dim] for dim in order]).permute(inverse_permutation(order))


def _conv2d_rows(
    rows: torch.Tensor,
    halo: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
) -> torch.Tensor:
    return rows.new_empty(table.shape[0], weight.shape[0])


def _group_norm_rows(rows: torch.Tensor, *_: Any) -> torch.Tensor:
    return rows.new_empty(rows.shape)


def _attention(q: torch.Tensor, *_: Any) -> torch.Tensor:
    return q.new_empty(q.shape)


_register("gather_rows", "Tensor x, Tensor index, int[] order, int pixel_dims", gather_rows_reference, _gather_rows)
_register(
    "scatter_rows",
    "Tensor rows, Tensor base, Tensor index, SymInt[] shape, int[] order, int pixel_dims",
    scatter_rows_reference,
    _scatter_rows,
)
_register(
    "conv2d_rows",
    "Tensor rows, Tensor? halo, Tensor weight, Tensor? bias, Tensor table",
    conv2d_rows_reference,
    _conv2d_rows,
    _launcher("conv2d_rows_triton", "conv2d_rows_triton", conv2d_rows_reference),
)
_register(
    "group_norm_rows",
    "Tensor rows, Tensor sample, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias",
    group_norm_rows_reference,
    _group_norm_rows,
    _launcher("group_norm_rows_triton", "group_norm_rows_triton", group_norm_rows_reference),
)
_register(
    "attention_rows",
    "Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor k_offsets, float? scale",
    attention_rows_reference,
    _attention,
    _launcher("attention_rows_triton", "attention_rows_cuda", attention_rows_reference),
)
_register(
    "attention_cached",
    "Tensor q, Tensor k, Tensor v, Tensor base_k, Tensor base_v, Tensor index, Tensor offsets, float? scale",
    attention_cached_reference,
    _attention,
    _launcher("attention_cached_triton", "attention_cached_triton", attention_cached_reference),
)
