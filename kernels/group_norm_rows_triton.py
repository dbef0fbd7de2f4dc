"""GroupNorm of rows with given statistics in one pass on the GPU, with SiLU after it where a caller asks for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fisedit_compile.kernels.triton_launch import check_dtypes, launch_on

_TILE = 2048  # elements of a program: 16 a thread, two 16-byte loads of 2-byte values


@triton.jit(do_not_specialize=["count"])
def _group_norm_rows_kernel(
    rows: tl.tensor,  # [count, channels]
    sample: tl.tensor,  # int64 [count]
    mean: tl.tensor,  # [B, groups], fp32 or fp64
    rstd: tl.tensor,  # [B, groups]
    weight: tl.tensor,  # [channels] or None
    bias: tl.tensor,  # [channels] or None
    out: tl.tensor,  # [count, channels]
    count: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    BM: tl.constexpr,
    BC: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    inside, valid = m < count, c < channels
    mask = inside[:, None] & valid[None, :]
    at = m.to(tl.int64)[:, None] * channels + c[None, :]  # [BM, BC]
    x = tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)
    owner = tl.load(sample + m, mask=inside, other=0).to(tl.int32)
    statistic = owner[:, None] * groups + (c // (channels // groups))[None, :]  # [BM, BC]
    # Subtracted before it is scaled: the mean may be large beside the deviation, and this cancels exactly in fp32.
    y = x - tl.load(mean + statistic, mask=mask, other=0.0).to(tl.float32)
    y *= tl.load(rstd + statistic, mask=mask, other=0.0).to(tl.float32)
    if weight is not None:
        y *= tl.load(weight + c, mask=valid, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + c, mask=valid, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


def group_norm_rows_triton(
    rows: torch.Tensor,
    sample: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    silu: bool = False,
) -> torch.Tensor:
    """Normalise rows; arguments as of the reference in ``group_norm_rows``, on one GPU.

    ``silu`` applies ``y * sigmoid(y)`` to the result. Statistics are read as they are and used in fp32.

    Returns:
        [M, C] in the dtype of ``rows``, contiguous.

    Raises:
        ValueError: a dtype that the kernel does not take, or channels that are no multiple of the groups.
    """
    check_dtypes("group_norm_rows", rows)
    (count, channels), groups = rows.shape, mean.shape[1]
    if channels % groups or mean.shape != rstd.shape:
        raise ValueError(
            f"group_norm_rows: {channels} channels, mean {list(mean.shape)}, rstd {list(rstd.shape)}; give statistics "
            "[B, G] of one shape, with G a divisor of the channels"
        )
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    # The largest power of two in the channels: 64 for 320, 512 for 2560; no lane idles and rows stay whole lines.
    block = max(16, min(512, channels & -channels))
    height = _TILE // block
    with launch_on(rows):
        _group_norm_rows_kernel[(triton.cdiv(count, height), triton.cdiv(channels, block))](
            rows.contiguous(),
            sample.contiguous(),
            mean.contiguous(),
            rstd.contiguous(),
            weight,
            bias,
            out,
            count,
            channels,
            groups,
            BM=height,
            BC=block,
            SILU=silu,
            num_warps=4,
        )
    return out
