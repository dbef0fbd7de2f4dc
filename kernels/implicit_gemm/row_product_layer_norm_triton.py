"""The second kernel of a product of rows where a layer norm reads the result: whole rows, stored before and after it.

A layer norm needs all channels of a row, and the programs of a product have some of them. A kernel of its own for each
of the 48 in a Stable Diffusion U-Net takes 2.6 us, of which it computes for less than one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fisedit_compile.kernels.implicit_gemm.row_product_finish_triton import sum_of_parts
from fisedit_compile.kernels.norms.layer_norm_rows_triton import normalised


@triton.jit(do_not_specialize=["there"])
def finish_layer_norm_kernel(
    parts: tl.tensor,  # [SPLITS, there, C]: partial sums, or a whole product
    count: tl.tensor,  # int32 [1] or None: how many of the rows are real
    bias: tl.tensor,  # [C] or None
    residual: tl.tensor,  # [there, C] or None
    norm_weight: tl.tensor,  # [C] or None
    norm_bias: tl.tensor,  # [C] or None
    raw: tl.tensor,  # [there, C]: the sum, bias and residual
    out: tl.tensor,  # [there, C]: raw, normalised
    there: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,  # C, rounded up to a power of two
    SPLITS: tl.constexpr,
) -> None:
    real = there
    if count is not None:
        real = tl.minimum(there, tl.load(count))
    if tl.program_id(0) * BM >= real:
        return
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    c = tl.arange(0, BC)  # [BC]
    valid = (c < C)[None, :]
    inside = (m < real)[:, None] & valid
    # Rows past the last read a real one, which is not stored.
    at = tl.minimum(m, real - 1).to(tl.int64)[:, None] * C + c[None, :]  # [BM, BC]
    total = sum_of_parts(parts + at, there.to(tl.int64) * C, valid, SPLITS)
    if bias is not None:
        total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        total += tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
    stored = total.to(raw.dtype.element_ty)
    tl.store(raw + at, stored, mask=inside)
    x = tl.where(valid, stored.to(tl.float32), 0.0)  # what others read of it
    y = normalised(x, c, norm_weight, norm_bias, eps, C)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
