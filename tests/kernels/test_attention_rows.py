"""attention_rows and attention_cached against dense attention with a boolean mask in fp64."""

from __future__ import annotations

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support.random_rows import DTYPES, masks, normal, offsets_of, pixel_ids, samples_of
from torch.nn.attention import SDPBackend, sdpa_kernel

import fisedit_compile.kernels.ops  # noqa: F401  (registers torch.ops.fisedit)
from fisedit_compile.planning.edit_plan import row_of_pixels
from fisedit_compile.testing import assert_close

HEADS, HEAD_DIM = 2, 8
SCALES = st.sampled_from([None, 0.25])


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """fp64 attention of rows [M, heads, hd] to rows [Mk, heads, hd] where ``allowed`` bool [M, Mk]."""
    q, k, v = (t.double().transpose(0, 1) for t in (q, k, v))  # [heads, rows, hd]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale).transpose(0, 1)


def random_rows(count: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (normal(count, HEADS, HEAD_DIM, dtype=dtype, seed=seed + part) for part in range(3))
    return q, k, v


@hypothesis.given(masks(), st.sampled_from(DTYPES), st.integers(0, 99), SCALES)
def test_self_attention_stays_within_the_sample(
    mask: torch.Tensor, dtype: torch.dtype, seed: int, scale: float | None
) -> None:
    sample, offsets = samples_of(mask), offsets_of(mask)
    q, k, v = random_rows(len(sample), dtype, seed)
    out = torch.ops.fisedit.attention_rows(q, k, v, offsets, offsets, scale)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, dense_attention(q, k, v, sample[:, None] == sample, scale))


@hypothesis.given(masks(), st.integers(1, 9), st.sampled_from(DTYPES), st.integers(0, 99), SCALES)
def test_cross_attention_reads_the_words_of_the_sample(
    mask: torch.Tensor, words: int, dtype: torch.dtype, seed: int, scale: float | None
) -> None:
    batch, sample = mask.shape[0], samples_of(mask)
    q, _, _ = random_rows(len(sample), dtype, seed)
    _, k, v = random_rows(batch * words, dtype, seed + 10)
    k_offsets = torch.arange(batch + 1, dtype=torch.int32) * words
    out = torch.ops.fisedit.attention_rows(q, k, v, offsets_of(mask), k_offsets, scale)
    word_sample = torch.arange(batch).repeat_interleave(words)
    assert_close(out, dense_attention(q, k, v, sample[:, None] == word_sample, scale))


@hypothesis.given(masks(max_side=5), st.sampled_from(DTYPES), st.integers(0, 99), SCALES)
def test_cached_attention_sees_fresh_keys_at_the_rows_and_the_base_elsewhere(
    mask: torch.Tensor, dtype: torch.dtype, seed: int, scale: float | None
) -> None:
    index, sample = pixel_ids(mask), samples_of(mask)
    q, k, v = random_rows(len(index), dtype, seed)
    _, base_k, base_v = random_rows(mask.numel(), dtype, seed + 10)
    kept = base_k.clone(), base_v.clone()
    out = torch.ops.fisedit.attention_cached(
        q, k, v, base_k, base_v, row_of_pixels(index, mask.numel()), offsets_of(mask), scale
    )
    assert out.is_contiguous()
    assert torch.equal(base_k, kept[0])
    assert torch.equal(base_v, kept[1])
    # The oracle never merges: base and fresh keys side by side, the base's at active pixels forbidden.
    pixel_sample = torch.arange(mask.numel()) // mask[0].numel()
    stale = mask.flatten()
    allowed = torch.cat([(sample[:, None] == pixel_sample) & ~stale, sample[:, None] == sample], dim=1)
    assert_close(out, dense_attention(q, torch.cat([base_k, k]), torch.cat([base_v, v]), allowed, scale))


def test_cached_attention_of_unchanged_rows_is_the_dense_attention() -> None:
    mask = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    index = pixel_ids(mask)
    q, k, v = random_rows(mask.numel(), torch.float64, 0)
    row_of = row_of_pixels(index, mask.numel())
    out = torch.ops.fisedit.attention_cached(q[index], k[index], v[index], k, v, row_of, offsets_of(mask), None)
    q, k, v = (t.unflatten(0, (2, 20)).transpose(1, 2) for t in (q, k, v))
    assert_close(out, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)[index])


@pytest.mark.parametrize("counts", [(3, 3), (3, 1)], ids=["batched", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_without_keys_give_zeros(dtype: torch.dtype, counts: tuple[int, int]) -> None:
    q, _, _ = random_rows(sum(counts), dtype, 0)
    q_offsets = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
    none = q[:0]
    out = torch.ops.fisedit.attention_rows(q, none, none, q_offsets, torch.zeros(3, dtype=torch.int32), None)
    assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.parametrize("q_counts", [(3, 3), (1, 4)], ids=["equal_queries", "ragged_queries"])
@pytest.mark.parametrize("k_counts", [(5, 5), (2, 7)], ids=["equal_keys", "ragged_keys"])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=["math", "flash"])
def test_every_pairing_of_counts(q_counts: tuple[int, int], k_counts: tuple[int, int], backend: SDPBackend) -> None:
    """Also under the backend that returns its result head-major: the rows stay contiguous."""
    q, _, _ = random_rows(sum(q_counts), torch.float64, 0)
    _, k, v = random_rows(sum(k_counts), torch.float64, 10)
    offsets = [torch.tensor([0, first, first + second], dtype=torch.int32) for first, second in (q_counts, k_counts)]
    with sdpa_kernel(backend):
        out = torch.ops.fisedit.attention_rows(q, k, v, *offsets, None)
        alone = torch.ops.fisedit.attention_rows(q, k, v, *(offset[[0, 2]] for offset in offsets), None)
    q_sample, k_sample = (torch.arange(2).repeat_interleave(torch.tensor(counts)) for counts in (q_counts, k_counts))
    assert_close(out, dense_attention(q, k, v, q_sample[:, None] == k_sample, None))
    assert_close(alone, dense_attention(q, k, v, torch.ones(len(q), len(k), dtype=torch.bool), None))
    assert out.is_contiguous()
    assert alone.is_contiguous()


def test_a_sample_gives_in_a_batch_what_it_gives_alone() -> None:
    offsets = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    q, k, v = random_rows(8, torch.float64, 0)
    together = torch.ops.fisedit.attention_rows(q, k, v, offsets, offsets, None)
    for start, stop in ((0, 3), (3, 8)):
        alone = torch.tensor([0, stop - start], dtype=torch.int32)
        part = torch.ops.fisedit.attention_rows(q[start:stop], k[start:stop], v[start:stop], alone, alone, None)
        assert_close(together[start:stop], part)


@pytest.mark.parametrize("first", [2, 1], ids=["equal", "ragged"])
def test_rows_behind_the_last_offset_are_padding(first: int) -> None:
    q, k, v = random_rows(5, torch.float64, 0)
    offsets = torch.tensor([0, first, 4], dtype=torch.int32)
    base_k, base_v, _ = random_rows(12, torch.float64, 10)
    row_of = row_of_pixels(torch.tensor([0, 5, 7, 8]) if first == 1 else torch.tensor([0, 5, 6, 8]), 12)
    for rows in (q, k, v):
        rows[4] = torch.nan
    out = torch.ops.fisedit.attention_rows(q, k, v, offsets, offsets, None)
    cached = torch.ops.fisedit.attention_cached(q, k, v, base_k, base_v, row_of, offsets, None)
    assert out.shape == cached.shape == q.shape
    q, k, v = q[:4], k[:4], v[:4]
    assert torch.equal(out[:4], torch.ops.fisedit.attention_rows(q, k, v, offsets, offsets, None))
    alone = torch.ops.fisedit.attention_cached(q, k, v, base_k, base_v, row_of, offsets, None)
    assert torch.equal(cached[:4], alone)


@pytest.mark.parametrize("first", [4, 3], ids=["equal", "ragged"])
def test_offsets_over_the_rows_are_an_error(first: int) -> None:
    q, k, v = random_rows(5, torch.float32, 0)
    long = torch.tensor([0, first, 8], dtype=torch.int32)
    with pytest.raises(RuntimeError):
        torch.ops.fisedit.attention_rows(q, k, v, long, long, None)
