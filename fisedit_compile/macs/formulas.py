"""How many multiply-accumulates (MACs) each operator does: this file has every formula that the counters use.

A formula takes the operator's result and then the operator's arguments. It looks at shapes only, so that real, fake and
meta tensors do alike. One fused multiply-add is one MAC; biases, norms, activations and softmax are not counted, which
is the convention of the paper's tables (FISEdit, Yu et al. 2023, section B.2) and of fvcore.

The formulas of our own operators are also registered with torch's ``FlopCounterMode``, at 2 FLOPs a MAC.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

import fisedit_compile.kernels.ops  # noqa: F401  (defines torch.ops.fisedit)
from fisedit_compile.passes.arguments import named_arguments

OpKind = Literal["convolution", "linear", "attention"]

#: All kinds of operators, in the order in which reports list them.
OP_KINDS: tuple[OpKind, ...] = ("convolution", "linear", "attention")


class OpFormula(NamedTuple):
    """The kind that an operator is counted under, and its formula ``macs(out, *args, **kwargs)``."""

    kind: OpKind
    macs: Callable[..., int]


def conv2d(out: Tensor, x: Tensor, weight: Tensor, *_: Any) -> int:
    """out [B, Cout, H, W], weight [Cout, Cin / groups, kh, kw]; taps that fall on the padding are counted, too."""
    return prod(out.shape) * prod(weight.shape[1:])


def convolution(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *_: Any,
) -> int:
    """As :func:`conv2d`; transposed, each pixel of x is multiplied by the whole weight [Cin, Cout / groups, kh, kw]."""
    return conv2d(x if transposed else out, x, weight)


def linear(out: Tensor, x: Tensor, weight: Tensor, *_: Any) -> int:
    """x [..., Cin], weight [Cout, Cin]."""
    return prod(out.shape) * weight.shape[-1]


def mm(out: Tensor, a: Tensor, b: Tensor) -> int:
    """a [..., n, k], b [..., k, m], batched or not."""
    return prod(out.shape) * a.shape[-1]


def addmm(out: Tensor, bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """As :func:`mm`; the addition is not counted."""
    return mm(out, a, b)


def attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """q [..., n, d], k [..., m, d], v [..., m, e]: both products. A mask, causal or not, saves nothing."""
    return prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def conv2d_rows(out: Any, *args: Any, **kwargs: Any) -> int:
    """table [M, K], rows [R, Cin], weight [Cout, K * Cin]: M * K * Cin * Cout; a shortcut's M * Cin * Cout on top.

    Every tap counts, one outside the picture (entry -1) too: the dense convolution's padding is counted as well, so
    that the ratio of the two is that of their active pixels.
    """
    product = named_arguments(torch.ops.fisedit.conv2d_rows.default, args, kwargs)
    weights = [product[name] for name in ("weight", "shortcut_weight") if product[name] is not None]
    return int(product["table"].shape[0]) * sum(prod(weight.shape) for weight in weights)


def linear_rows(out: Any, rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """rows [M, Cin], weight [Cout, Cin]: M * Cin * Cout, whatever the epilogue makes of the product."""
    return rows.shape[0] * prod(weight.shape)


def attention_rows(out: Tensor, q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, *_: Any) -> int:
    """q [M, heads, d], k [Mk, heads, d], v [Mk, heads, e]: the queries of a sample meet that sample's keys only.

    The count is exact if the offsets have values, or if all samples have equally many queries or equally many keys, as
    in cross-attention or with one mask for the whole batch. Otherwise all samples are taken to have equally many of
    both, which gives at most the true count where samples with more queries have more keys, as in self-attention
    (Chebyshev's sum inequality).
    """
    q_rows, k_rows = _row_counts(q_offsets), _row_counts(k_offsets)
    if q_rows is not None and k_rows is not None:
        pairs = sum(a * b for a, b in zip(q_rows, k_rows, strict=True))
    else:
        pairs = q.shape[0] * k.shape[0] // max(q_offsets.shape[0] - 1, 1)
    return pairs * q.shape[1] * (q.shape[2] + v.shape[2])


def controlled_rows(out: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *_: Any) -> int:
    """q [M, heads, d], k and v [B * T, heads, d]: each query meets the T tokens of its sample of B.

    What control adds, where a step has it, is not counted: one product of the kept tokens' shares with a table of ones.
    """
    tokens = k.shape[0] // (offsets.shape[0] - 1)
    return q.shape[0] * tokens * q.shape[1] * (q.shape[2] + v.shape[2])


def attention_cached(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, base_k: Tensor, base_v: Tensor, index: Any, offsets: Tensor, *_: Any
) -> int:
    """q [M, heads, d], base_k and base_v [P, heads, d]: a query meets the P / B pixels of its own sample, of B samples.

    B is ``len(offsets) - 1``. New keys take the place of cached ones, so that their number does not matter.
    """
    pixels = base_k.shape[0] // (offsets.shape[0] - 1)
    return q.shape[0] * pixels * q.shape[1] * (q.shape[2] + base_v.shape[2])


def _row_counts(offsets: Tensor) -> list[int] | None:
    """How many rows each sample has; None if the offsets are a tensor without values."""
    if offsets.device.type == "meta" or isinstance(offsets, FakeTensor):
        return None
    return offsets.diff().tolist()


#: The formula of each operator by its qualified name, which FX has as ``target._schema.name`` and a TorchScript trace
#: as ``node.kind()``.
FORMULAS: dict[str, OpFormula] = {
    "aten::conv2d": OpFormula("convolution", conv2d),
    "aten::convolution": OpFormula("convolution", convolution),
    "aten::_convolution": OpFormula("convolution", convolution),
    "aten::linear": OpFormula("linear", linear),
    "aten::mm": OpFormula("linear", mm),
    "aten::addmm": OpFormula("linear", addmm),
    # A U-Net has batched products only where attention is written out instead of being one operator.
    "aten::bmm": OpFormula("attention", mm),
    "aten::baddbmm": OpFormula("attention", addmm),
    "aten::scaled_dot_product_attention": OpFormula("attention", attention),
    "fisedit::conv2d_rows": OpFormula("convolution", conv2d_rows),
    "fisedit::conv2d_rows_and_norm": OpFormula("convolution", conv2d_rows),
    "fisedit::linear_rows": OpFormula("linear", linear_rows),
    "fisedit::linear_rows_and_norm": OpFormula("linear", linear_rows),
    "fisedit::linear_rows_and_layer_norm": OpFormula("linear", linear_rows),
    "fisedit::attention_rows": OpFormula("attention", attention_rows),
    "fisedit::attention_cached": OpFormula("attention", attention_cached),
    "fisedit::controlled_rows": OpFormula("attention", controlled_rows),
}

_UNKNOWN_PRODUCTS = (
    "matmul", "einsum", "tensordot", "bilinear", "mv", "dot", "vdot", "inner", "addmv", "addbmm", "conv_tbc",
    "conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip

#: Operators that multiply and accumulate but have no formula here; a counter must refuse them instead of counting zero.
REFUSED = (
    {f"aten::{name}" for name in _UNKNOWN_PRODUCTS} | {str(target).replace(".", "::", 1) for target in flop_registry}
) - set(FORMULAS)


#: Operators of this project that count nothing, because they only move values or compute a norm.
UNCOUNTED = {
    "fisedit::gather_rows", "fisedit::scatter_rows", "fisedit::pack_rows", "fisedit::cat_norm_rows",
    "fisedit::group_norm_rows", "fisedit::group_norm_whole", "fisedit::group_norm_statistics",
    "fisedit::tile_moments", "fisedit::followed_statistics",
    "fisedit::layer_norm_rows",
}  # fmt: skip


def is_refused(name: str) -> bool:
    """Whether an operator may do work that no formula counts, as any of this project's that is not listed here may."""
    return name in REFUSED or (name.startswith("fisedit::") and name not in FORMULAS and name not in UNCOUNTED)


def _register_with_torch() -> None:
    """Teach ``FlopCounterMode`` the operators of this project, and attention on the CPU, which torch counts as 0."""
    packets: dict[Any, Callable[..., int]] = {
        torch.ops.fisedit.conv2d_rows: conv2d_rows,
        torch.ops.fisedit.conv2d_rows_and_norm: conv2d_rows,
        torch.ops.fisedit.linear_rows: linear_rows,
        torch.ops.fisedit.linear_rows_and_norm: linear_rows,
        torch.ops.fisedit.linear_rows_and_layer_norm: linear_rows,
        torch.ops.fisedit.attention_rows: attention_rows,
        torch.ops.fisedit.attention_cached: attention_cached,
        torch.ops.fisedit.controlled_rows: controlled_rows,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    }
    for packet, macs in packets.items():
        if packet not in flop_registry:
            register_flop_formula([packet], get_raw=True)(_flops(macs))


def _flops(macs: Callable[..., int]) -> Callable[..., int]:
    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 2 * macs(out_val, *args, **kwargs)

    return flops


_register_with_torch()
