"""Group norms of rows against F.group_norm in fp64: with the scale and shift of a map, and with their own figures."""

from __future__ import annotations

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support.random_rows import DTYPES, masks, normal, pixel_ids, samples_of

import fisedit_compile.kernels.ops  # noqa: F401  (registers torch.ops.fisedit)
from fisedit_compile.kernels.norms.group_norm_rows import norm_scale_shift
from fisedit_compile.testing import assert_close

CHANNELS, EPS = 12, 1e-5
fisedit = torch.ops.fisedit


def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.double()


groups_of = st.sampled_from([1, 3, 4, 12])


@hypothesis.given(masks(), groups_of, st.sampled_from(DTYPES), st.integers(0, 99), st.booleans(), st.booleans())
def test_equals_group_norm_with_the_scale_and_shift_of_the_map(
    mask: torch.Tensor, groups: int, dtype: torch.dtype, seed: int, scaled: bool, silu: bool
) -> None:
    hypothesis.assume(CHANNELS // groups * mask[0].numel() > 1)  # F.group_norm refuses a single value a group
    x = normal(mask.shape[0], CHANNELS, *mask.shape[1:], dtype=dtype, seed=seed)
    weight, bias = (normal(CHANNELS, dtype=dtype, seed=seed + i) if scaled else None for i in (1, 2))
    dense = F.group_norm(x.double(), groups, wide(weight), wide(bias), EPS)
    dense = F.silu(dense) if silu else dense
    scale, shift = norm_scale_shift(x, groups, weight, bias, EPS)
    assert scale.dtype == shift.dtype == torch.promote_types(dtype, torch.float32)
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
    out = fisedit.group_norm_rows(pixels[pixel_ids(mask)], samples_of(mask), scale, shift, silu)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, dense.permute(0, 2, 3, 1)[mask])


@pytest.mark.parametrize("dtype", DTYPES)
def test_uses_the_scale_and_shift_of_each_row_s_sample(dtype: torch.dtype) -> None:
    rows, sample = normal(5, CHANNELS, dtype=dtype, seed=0), torch.tensor([0, 0, 2, 2, 2])
    scale, shift = (normal(3, CHANNELS, dtype=torch.float32, seed=seed) for seed in (1, 2))
    out = fisedit.group_norm_rows(rows, sample, scale, shift)
    expected = torch.empty(5, CHANNELS, dtype=torch.float64)
    for row, channel in torch.cartesian_prod(torch.arange(5), torch.arange(CHANNELS)).tolist():
        expected[row, channel] = rows[row, channel].double() * scale[sample[row], channel] + shift[sample[row], channel]
    assert_close(out, expected)


def test_half_precision_rows_are_normalised_in_fp32() -> None:
    """Mean 300, deviation 0.5: in fp16 the difference to the mean would be off by up to a quarter of a deviation."""
    x = (300 + 0.5 * normal(1, 8, 8, 8, dtype=torch.float64, seed=0)).half()
    scale, shift = norm_scale_shift(x, 2, None, None, EPS)
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    out = fisedit.group_norm_rows(rows, torch.zeros(64, dtype=torch.int64), scale, shift)
    expected = F.group_norm(x.double(), 2, eps=EPS).permute(0, 2, 3, 1).flatten(0, 2)
    assert (out.double() - expected).abs().max() < 2e-3


@hypothesis.given(
    st.integers(1, 3), st.integers(1, 30), groups_of, st.sampled_from(DTYPES), st.booleans(), st.booleans()
)
def test_whole_maps_take_their_own_statistics(
    samples: int, pixels: int, groups: int, dtype: torch.dtype, scaled: bool, silu: bool
) -> None:
    hypothesis.assume(CHANNELS // groups * pixels > 1)
    rows = normal(samples * pixels, CHANNELS, dtype=dtype, seed=pixels) * 2 + 3
    weight, bias = (normal(CHANNELS, dtype=dtype, seed=seed) if scaled else None for seed in (1, 2))
    maps = rows.double().view(samples, pixels, CHANNELS).transpose(1, 2)
    dense = F.group_norm(maps, groups, wide(weight), wide(bias), EPS).transpose(1, 2).flatten(0, 1)
    out = fisedit.group_norm_whole(rows, samples, groups, weight, bias, EPS, silu)
    assert out.dtype == dtype
    assert_close(out, F.silu(dense) if silu else dense)


@pytest.mark.parametrize("dtype", DTYPES)
def test_joined_rows(dtype: torch.dtype) -> None:
    left, right = (normal(7, width, dtype=dtype, seed=width) for width in (8, 4))
    sample = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    scale, shift = (normal(2, CHANNELS, dtype=torch.float32, seed=seed) for seed in (1, 2))
    joined, normed = fisedit.cat_norm_rows(left, right, sample, scale, shift, True)
    assert torch.equal(joined, torch.cat([left, right], 1))
    assert torch.equal(normed, fisedit.group_norm_rows(joined, sample, scale, shift, True))


@hypothesis.given(
    st.integers(1, 3), st.integers(1, 30), groups_of, st.sampled_from(DTYPES), st.booleans(), st.booleans()
)
def test_statistics_of_whole_maps_are_what_a_norm_of_rows_takes(
    samples: int, pixels: int, groups: int, dtype: torch.dtype, scaled: bool, silu: bool
) -> None:
    hypothesis.assume(CHANNELS // groups * pixels > 1)
    rows = normal(samples * pixels, CHANNELS, dtype=dtype, seed=pixels) * 2 + 3
    weight, bias = (normal(CHANNELS, dtype=dtype, seed=seed) if scaled else None for seed in (1, 2))
    scale, shift = fisedit.group_norm_statistics(rows, samples, groups, weight, bias, EPS)
    assert scale.dtype == shift.dtype == torch.promote_types(dtype, torch.float32)
    sample = torch.arange(samples).repeat_interleave(pixels)
    whole = fisedit.group_norm_whole(rows.double(), samples, groups, wide(weight), wide(bias), EPS, silu)
    assert_close(fisedit.group_norm_rows(rows, sample, scale, shift, silu), whole, dtype)
