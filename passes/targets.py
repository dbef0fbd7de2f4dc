"""The operators that the passes know: ATen's by what they do to a spatial value, and our own on rows."""

from __future__ import annotations

import operator

import torch

import fisedit_compile.kernels.ops  # noqa: F401 - registers torch.ops.fisedit

aten = torch.ops.aten

#: One value in, the same shape out, every element on its own.
UNARY = frozenset({
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default,
    aten.leaky_relu.default, aten.mish.default, aten.hardswish.default, aten.elu.default, aten.softplus.default,
    aten.neg.default, aten.exp.default, aten.abs.default, aten.sqrt.default, aten.rsqrt.default, aten.square.default,
    aten.clamp.default, aten.to.dtype, aten._to_copy.default,
    aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar, aten.pow.Tensor_Scalar,
})  # fmt: skip

#: The same values, laid out anew: rows have one order only.
COPY = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default})

#: Two operands that broadcast.
BINARY = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})

VIEW = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
                  aten.unflatten.int})  # fmt: skip
PERMUTE = frozenset({aten.permute.default, aten.transpose.int})
CAT = frozenset({aten.cat.default, aten.concat.default})
CHUNK = frozenset({aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default})
GETITEM = operator.getitem

CONV = aten.conv2d.default
LINEAR = aten.linear.default
GROUP_NORM = aten.group_norm.default
LAYER_NORM = aten.layer_norm.default
ATTENTION = aten.scaled_dot_product_attention.default
UPSAMPLE = aten.upsample_nearest2d.vec

GATHER_ROWS = torch.ops.fisedit.gather_rows.default
PACK_ROWS = torch.ops.fisedit.pack_rows.default
SCATTER_ROWS = torch.ops.fisedit.scatter_rows.default
CONV2D_ROWS = torch.ops.fisedit.conv2d_rows.default
CONV2D_ROWS_AND_NORM = torch.ops.fisedit.conv2d_rows_and_norm.default
LINEAR_ROWS = torch.ops.fisedit.linear_rows.default
LINEAR_ROWS_AND_NORM = torch.ops.fisedit.linear_rows_and_norm.default
LINEAR_ROWS_AND_LAYER_NORM = torch.ops.fisedit.linear_rows_and_layer_norm.default
LAYER_NORM_ROWS = torch.ops.fisedit.layer_norm_rows.default
CAT_NORM_ROWS = torch.ops.fisedit.cat_norm_rows.default
GROUP_NORM_WHOLE = torch.ops.fisedit.group_norm_whole.default
GROUP_NORM_STATISTICS = torch.ops.fisedit.group_norm_statistics.default
TILE_MOMENTS = torch.ops.fisedit.tile_moments.default
FOLLOWED_STATISTICS = torch.ops.fisedit.followed_statistics.default
GROUP_NORM_ROWS = torch.ops.fisedit.group_norm_rows.default
ATTENTION_ROWS = torch.ops.fisedit.attention_rows.default
CONTROLLED_ROWS = torch.ops.fisedit.controlled_rows.default
ATTENTION_CACHED = torch.ops.fisedit.attention_cached.default

#: A product of rows -> the product that also returns its result before norm and activation.
WITH_NORM = {CONV2D_ROWS: CONV2D_ROWS_AND_NORM, LINEAR_ROWS: LINEAR_ROWS_AND_NORM}
CONVOLUTIONS_OF_ROWS = frozenset({CONV2D_ROWS, CONV2D_ROWS_AND_NORM})
LINEARS_OF_ROWS = frozenset({LINEAR_ROWS, LINEAR_ROWS_AND_NORM, LINEAR_ROWS_AND_LAYER_NORM})
#: What multiplies rows with a weight; see ``row_product``.
ROW_PRODUCTS = CONVOLUTIONS_OF_ROWS | LINEARS_OF_ROWS
