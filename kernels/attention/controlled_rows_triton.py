"""Cross-attention of rows under Prompt-to-Prompt control on the GPU, as ``kernels/ops.py`` calls it.

A text is short, so that a program has the scores of all its tokens at hand at once, and exchanges maps in registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fisedit_compile.kernels.attention.attention_launch import head_last
from fisedit_compile.kernels.attention.attention_tiles import head_width
from fisedit_compile.kernels.attention.attention_triton import block_of_queries
from fisedit_compile.kernels.attention.controlled_attention import LEAST_SHARE
from fisedit_compile.kernels.launch.triton_launch import check_dtypes, input_precision, launch

#: Tokens of the base that one product takes to those of the edit: the least that a matrix unit multiplies.
_BASE_TOKENS = 16

#: Bytes of keys, and of values, that a program has in shared memory at a time.
_TEXT_BYTES = 2**16

#: Tokens of a text whose scores a program can hold.
_MOST_TOKENS = 512


@triton.jit(do_not_specialize=["samples", "pixels"])
def _controlled_rows_kernel(
    q: tl.tensor,  # [M, heads, HD]
    k: tl.tensor,  # [B * tokens, heads, HD]
    v: tl.tensor,
    offsets: tl.tensor,  # int32 [B + 1]
    index: tl.tensor,  # int64 [M]: the pixel id of each row
    maps: tl.tensor,  # [n * pixels, heads, L], or int64 [1]: the address of such maps
    span: tl.tensor,  # int32 [3]: L, first sample of the conditional part, the one behind its last; L = 0: no exchange
    mapper: tl.tensor,  # fp32 [n, tokens, tokens]: of the base, of the edit
    keep: tl.tensor,  # fp32 [n, tokens]
    weight: tl.tensor,  # fp32 [n, tokens]
    out: tl.tensor,  # [M, heads, HD]
    samples: tl.tensor,  # B
    tokens: tl.tensor,
    pixels: tl.tensor,  # of a sample
    q_stride: tl.tensor,  # elements from a row to the next
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    scale: tl.tensor,  # of the scores, times log2(e), as the exponential is one of base 2
    HD: tl.constexpr,
    WIDTH: tl.constexpr,  # HD, rounded up to a multiple of BD
    BD: tl.constexpr,  # columns of a head at a time: keys and values of all tokens have to fit into shared memory
    BM: tl.constexpr,
    BT: tl.constexpr,  # tokens, rounded up to a power of two
    BL: tl.constexpr,  # tokens of the base at a time
    LEAST: tl.constexpr,
    ADDRESS: tl.constexpr,  # maps holds an address
    PRECISION: tl.constexpr,
) -> None:
    head = tl.program_id(1)
    sample, q_begin, q_end = block_of_queries(offsets, samples, tl.program_id(0), BM)
    if sample < 0:
        return
    m = q_begin + tl.arange(0, BM)  # [BM]
    t = tl.arange(0, BT)
    inside, word = m < q_end, t < tokens
    row = m.to(tl.int64)
    at = sample.to(tl.int64) * tokens + t
    score = tl.zeros((BM, BT), dtype=tl.float32)
    for first in tl.static_range(0, WIDTH, BD):
        d = first + tl.arange(0, BD)
        real, column = d < HD, head * HD + d
        query = tl.load(q + row[:, None] * q_stride + column[None, :], mask=inside[:, None] & real[None, :], other=0.0)
        key = tl.load(k + at[None, :] * k_stride + column[:, None], mask=word[None, :] & real[:, None], other=0.0)
        score += tl.dot(query, key, input_precision=PRECISION)
    score = tl.where(word[None, :], score * scale, float("-inf"))
    share = tl.exp2(score - tl.max(score, axis=1)[:, None])
    share /= tl.sum(share, axis=1)[:, None]

    count, part_begin = tl.load(span), tl.load(span + 1)
    if (count > 0) & (sample >= part_begin) & (sample < tl.load(span + 2)):
        dtype = q.dtype.element_ty
        picture = sample - part_begin
        pixel = tl.load(index + row, mask=inside, other=0) - part_begin.to(tl.int64) * pixels
        base = tl.load(maps).to(tl.pointer_type(q.dtype.element_ty)) if ADDRESS else maps
        base_at = base + (pixel * tl.num_programs(1) + head) * count  # [BM]
        mapper_at = mapper + picture * tokens * tokens
        kept = tl.zeros((BM, BT), dtype=tl.float32)
        left = tl.zeros((BM,), dtype=tl.float32) + 1.0
        mapped = tl.zeros((BT,), dtype=tl.float32)
        for start in range(0, count, BL):
            old = start + tl.arange(0, BL)
            some = old < count
            part = tl.load(base_at[:, None] + old[None, :], mask=inside[:, None] & some[None, :], other=0.0)
            to = tl.load(mapper_at + old[:, None] * tokens + t[None, :], mask=some[:, None] & word[None, :], other=0.0)
            kept += tl.dot(part, to.to(dtype), input_precision=PRECISION)
            left -= tl.sum(part.to(tl.float32), axis=1)
            mapped += tl.sum(to, axis=0)
        keeps = tl.load(keep + picture * tokens + t, mask=word, other=0.0)
        of_padding = share * (keeps - mapped)[None, :]
        grown = of_padding * (left / tl.maximum(tl.sum(of_padding, axis=1), LEAST))[:, None]
        changed = kept + grown + share * (1.0 - keeps)[None, :]
        total = tl.sum(changed, axis=1)
        share = tl.where((total > LEAST)[:, None], changed / tl.maximum(total, LEAST)[:, None], share)
        share *= tl.load(weight + picture * tokens + t, mask=word, other=0.0)[None, :]
    share = share.to(v.dtype.element_ty)
    at_out = out + (row * tl.num_programs(1) + head) * HD  # [BM]
    for first in tl.static_range(0, WIDTH, BD):
        d = first + tl.arange(0, BD)
        real, column = d < HD, head * HD + d
        value = tl.load(v + at[:, None] * v_stride + column[None, :], mask=word[:, None] & real[None, :], other=0.0)
        result = tl.dot(share, value, input_precision=PRECISION)
        tl.store(at_out[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])


def controlled_rows_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    index: torch.Tensor,
    maps: torch.Tensor,
    span: torch.Tensor,
    mapper: torch.Tensor,
    keep: torch.Tensor,
    weight: torch.Tensor,
    pixels: int,
    scale: float | None,
) -> torch.Tensor:
    """``controlled_rows`` on one GPU; its reference describes the arguments.

    Raises:
        ValueError: the dtypes differ, or are none that the kernel takes; the scale is not positive; or a text of more
            tokens than a program can hold.
    """
    check_dtypes("controlled_rows", q, k, v, None if maps.dtype == torch.int64 else maps)
    if scale is not None and scale <= 0.0:
        raise ValueError(f"attention with scale={scale}: the kernel takes a positive one")
    (count, heads, head_dim), samples = q.shape, offsets.shape[0] - 1
    tokens = k.shape[0] // samples
    if tokens > _MOST_TOKENS:
        raise ValueError(f"controlled_rows: a text of {tokens} tokens; the kernel takes {_MOST_TOKENS} at most")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not count:
        return out
    q, k, v = head_last(q), head_last(k), head_last(v)
    words, half = max(16, triton.next_power_of_2(tokens)), q.element_size() == 2
    columns = min(head_width(head_dim), _TEXT_BYTES // (words * q.element_size()))
    block = 64 if half and words <= 128 and head_dim <= 128 else 16
    launch(_controlled_rows_kernel, (triton.cdiv(count, block) + samples - 1, heads), q)(
        q,
        k,
        v,
        offsets,
        index,
        maps,
        span,
        mapper,
        keep,
        weight,
        out,
        samples,
        tokens,
        pixels,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        (head_dim**-0.5 if scale is None else scale) * math.log2(math.e),
        HD=head_dim,
        WIDTH=triton.cdiv(head_dim, columns) * columns,
        BD=columns,
        BM=block,
        BT=words,
        BL=_BASE_TOKENS,
        LEAST=LEAST_SHARE,
        ADDRESS=maps.dtype == torch.int64,
        PRECISION=input_precision(q.dtype),
        num_warps=4 if half and words <= 128 else 8,
        num_stages=1,
    )
    return out
