"""Controlled cross-attention of rows: the reference against the dense layer, the kernel against the reference."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support.interpreter import INTERPRETED_DTYPES, MARKS
from support.poison import poisoned
from support.random_rows import DTYPES, masks, normal, offsets_of, pixel_ids

import fisedit_compile.kernels.ops  # noqa: F401  (registers torch.ops.fisedit)
from fisedit_compile.kernels.attention.controlled_attention import attention_probabilities, controlled_attention
from fisedit_compile.kernels.attention.controlled_rows import controlled_rows_reference
from fisedit_compile.testing import assert_close

HEADS, HEAD_DIM = 2, 8
fisedit = torch.ops.fisedit


def alignment(samples: int, tokens: int, own: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A mapper and what is kept: each of the edit's first ``own`` words from one of the base's or none, and padding."""
    generator = torch.Generator().manual_seed(seed)
    mapper = torch.zeros(samples, tokens, tokens)
    for sample in range(samples):
        for word in range(own):
            if torch.rand((), generator=generator) < 0.7:
                mapper[sample, int(torch.randint(own, (), generator=generator)), word] = 1
    padding = range(own, tokens)
    mapper[:, padding, padding] = 1
    return mapper, mapper.sum(1).clamp(max=1)


def dense_case(
    samples: int, parts: int, pixels: int, tokens: int, own: int, dtype: torch.dtype, seed: int, part: int = -1,
    head_dim: int = HEAD_DIM,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """query, key and value of a batch, maps of the base's first ``own`` tokens, mapper and keep."""
    batch = samples * parts
    query = normal(batch, HEADS, pixels, head_dim, dtype=dtype, seed=seed)
    key, value = (normal(batch, HEADS, tokens, head_dim, dtype=dtype, seed=seed + i) for i in (1, 2))
    old_query = normal(batch, HEADS, pixels, head_dim, dtype=dtype, seed=seed + 3)
    old_key = normal(batch, HEADS, tokens, head_dim, dtype=dtype, seed=seed + 4)
    maps = attention_probabilities(old_query, old_key, samples=samples, part=part, tokens=own)
    return query, key, value, maps, *alignment(samples, tokens, own, seed)


def span_of(maps: torch.Tensor, samples: int, parts: int, part: int) -> torch.Tensor:
    begin = part % parts * samples
    return torch.tensor([maps.shape[-1], begin, begin + samples], dtype=torch.int32)


def of_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor]:
    """The active queries, and all keys and values, as rows."""
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    return [query[index], key, value]


@hypothesis.given(
    masks(max_side=4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 3), st.sampled_from(DTYPES),
    st.integers(0, 99), st.sampled_from([-1, 0]), st.sampled_from([None, 0.3]),
)  # fmt: skip
def test_active_rows_are_those_of_the_dense_layer(
    mask: torch.Tensor, parts: int, own: int, padding: int, dtype: torch.dtype, seed: int, part: int,
    scale: float | None,
) -> None:  # fmt: skip
    samples, pixels = mask.shape[0], mask[0].numel()
    dense = dense_case(samples, parts, pixels, own + padding, own, dtype, seed, part)
    expected = controlled_attention(*dense, scale=scale, part=part)
    active = mask.repeat(parts, 1, 1)
    query, key, value, maps, mapper, keep = dense
    index = pixel_ids(active)
    span = span_of(maps, samples, parts, part)
    out = fisedit.controlled_rows(
        *of_rows(query, key, value, index),
        offsets_of(active),
        index,
        maps,
        span,
        mapper,
        keep,
        torch.ones_like(keep),
        pixels,
        scale,
    )
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, expected.transpose(1, 2).flatten(0, 1)[index], dtype)


def test_the_rest_of_the_attention_goes_to_the_padding_as_the_edit_divides_it() -> None:
    """Of three words and two of padding, with the base's maps of the words alone."""
    query, key, _, maps, _, _ = dense_case(1, 1, 5, 5, 3, torch.float64, 0)
    shares = controlled_attention(
        query, key, torch.eye(5, dtype=torch.float64).expand(1, HEADS, 5, 5), maps, torch.eye(5)[None], torch.ones(1, 5)
    ).transpose(1, 2)[0]
    assert_close(shares[..., :3], maps)
    own = (query @ key.transpose(2, 3) / HEAD_DIM**0.5).softmax(-1).transpose(1, 2)[0]
    assert_close(shares[..., 3] / shares[..., 4], own[..., 3] / own[..., 4])


def test_a_length_of_0_exchanges_nothing_and_reads_no_maps() -> None:
    query, key, value, _, mapper, keep = dense_case(2, 2, 4, 5, 3, torch.float32, 0)
    index = torch.arange(16)
    rows, offsets = of_rows(query, key, value, index), torch.arange(0, 17, 4, dtype=torch.int32)
    none = torch.empty(0, HEADS, 0)
    out = fisedit.controlled_rows(
        *rows, offsets, index, none, torch.zeros(3, dtype=torch.int32), mapper, keep, keep, 4, None
    )
    assert torch.equal(out, fisedit.attention_rows(*rows, offsets, torch.arange(0, 21, 5, dtype=torch.int32), None))


class TestKernel:
    pytestmark = MARKS

    @pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
    @pytest.mark.parametrize(("tokens", "own"), [(7, 3), (77, 17), (77, 77), (20, 20)])
    @pytest.mark.parametrize("part", [0, 1])
    @pytest.mark.parametrize("address", [False, True], ids=["maps", "address"])
    def test_equals_the_reference(self, dtype: torch.dtype, tokens: int, own: int, part: int, address: bool) -> None:
        kernel = pytest.importorskip("fisedit_compile.kernels.attention.controlled_rows_triton")
        pixels = 30
        query, key, value, maps, mapper, keep = dense_case(2, 2, pixels, tokens, own, dtype, 0, part)
        active = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.7
        active[1, :2] = False
        active = active.repeat(2, 1, 1)
        index, offsets = pixel_ids(active), offsets_of(active)
        rows = of_rows(query, key, value, index)
        span = span_of(maps, 2, 2, part)
        weight = 1 + torch.arange(2 * tokens).view(2, tokens) % 3 / 2
        given = torch.tensor([maps.data_ptr()]) if address else maps
        with poisoned():
            out = kernel.controlled_rows_triton(*rows, offsets, index, given, span, mapper, keep, weight, pixels, 0.3)
        wide = [each.double() for each in rows]
        expected = controlled_rows_reference(
            *wide, offsets, index, maps.double(), span, mapper, keep, weight, pixels, 0.3
        )
        assert out.dtype == dtype
        assert_close(out, expected)

    @pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
    @pytest.mark.parametrize("head_dim", [40, 64, 160])
    def test_heads_of_any_width(self, dtype: torch.dtype, head_dim: int) -> None:
        kernel = pytest.importorskip("fisedit_compile.kernels.attention.controlled_rows_triton")
        query, key, value, maps, mapper, keep = dense_case(1, 2, 12, 7, 3, dtype, 0, head_dim=head_dim)
        index, offsets = torch.arange(24), torch.tensor([0, 12, 24], dtype=torch.int32)
        rows, span = of_rows(query, key, value, index), span_of(maps, 1, 2, -1)
        out = kernel.controlled_rows_triton(*rows, offsets, index, maps, span, mapper, keep, keep * 2, 12, None)
        wide = [each.double() for each in rows]
        expected = controlled_rows_reference(
            *wide, offsets, index, maps.double(), span, mapper, keep, keep * 2, 12, None
        )
        assert_close(out, expected, dtype)

    def test_a_length_of_0_reads_no_maps(self) -> None:
        kernel = pytest.importorskip("fisedit_compile.kernels.attention.controlled_rows_triton")
        query, key, value, _, mapper, keep = dense_case(1, 2, 20, 7, 3, torch.float32, 0)
        index, offsets = torch.arange(40), torch.tensor([0, 20, 40], dtype=torch.int32)
        rows = of_rows(query, key, value, index)
        nowhere, none = torch.tensor([0]), torch.zeros(3, dtype=torch.int32)
        out = kernel.controlled_rows_triton(*rows, offsets, index, nowhere, none, mapper, keep, keep, 20, None)
        wide = [each.double() for each in rows]
        text = torch.tensor([0, 7, 14], dtype=torch.int32)
        assert_close(out, fisedit.attention_rows(*wide, offsets, text, None))
