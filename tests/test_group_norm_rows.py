"""group_norm_rows against F.group_norm in fp64 and against its definition with foreign statistics."""

from __future__ import annotations

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from random_rows import DTYPES, masks, normal, pixel_ids, samples_of

import fisedit_compile.kernels.ops  # noqa: F401  (registers torch.ops.fisedit)
from fisedit_compile.testing import assert_close

CHANNELS, EPS = 12, 1e-5


def statistics(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / sqrt(variance + eps), each [B, G], of a dense map [B, C, H, W]."""
    grouped = x.reshape(x.shape[0], groups, -1)
    return grouped.mean(-1), (grouped.var(-1, correction=0) + EPS).rsqrt()


@hypothesis.given(
    masks(), st.sampled_from([1, 3, 4, 12]), st.sampled_from(DTYPES), st.integers(0, 99), st.booleans(), st.booleans()
)
def test_equals_group_norm_with_the_statistics_of_the_map(
    mask: torch.Tensor, groups: int, dtype: torch.dtype, seed: int, scaled: bool, shifted: bool
) -> None:
    hypothesis.assume(CHANNELS // groups * mask[0].numel() > 1)  # F.group_norm refuses a single value a group
    x = normal(mask.shape[0], CHANNELS, *mask.shape[1:], dtype=dtype, seed=seed)
    weight = normal(CHANNELS, dtype=dtype, seed=seed + 1) if scaled else None
    bias = normal(CHANNELS, dtype=dtype, seed=seed + 2) if shifted else None
    dense = F.group_norm(
        x.double(), groups, None if weight is None else weight.double(), None if bias is None else bias.double(), EPS
    )
    mean, rstd = (s.to(torch.promote_types(dtype, torch.float32)) for s in statistics(x.double(), groups))
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
    out = torch.ops.fisedit.group_norm_rows(pixels[pixel_ids(mask)], samples_of(mask), mean, rstd, weight, bias)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, dense.permute(0, 2, 3, 1)[mask])


@pytest.mark.parametrize("statistics_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_uses_the_statistics_given_not_those_of_the_rows(dtype: torch.dtype, statistics_dtype: torch.dtype) -> None:
    rows, sample = normal(5, CHANNELS, dtype=dtype, seed=0), torch.tensor([0, 0, 2, 2, 2])
    mean = normal(3, 4, dtype=statistics_dtype, seed=1)
    rstd = normal(3, 4, dtype=statistics_dtype, seed=2).abs() + 0.5
    weight, bias = normal(CHANNELS, dtype=dtype, seed=3), normal(CHANNELS, dtype=dtype, seed=4)
    out = torch.ops.fisedit.group_norm_rows(rows, sample, mean, rstd, weight, bias)
    expected = torch.empty(5, CHANNELS, dtype=torch.float64)
    for row, channel in torch.cartesian_prod(torch.arange(5), torch.arange(CHANNELS)).tolist():
        group = channel // (CHANNELS // 4)
        normalised = (rows[row, channel].double() - mean[sample[row], group]) * rstd[sample[row], group]
        expected[row, channel] = normalised * weight[channel] + bias[channel]
    # fp64 rows with fp32 statistics carry the rounding of none but the given values: they are exact inputs.
    assert_close(out, expected)
    assert out.dtype == dtype


def test_half_precision_rows_are_normalised_in_fp32() -> None:
    """Mean 300, deviation 0.5: in fp16 the difference to the mean would be off by up to a quarter of a deviation."""
    rows = (300 + 0.5 * normal(64, 8, dtype=torch.float64, seed=0)).half()
    mean, rstd = torch.full((1, 2), 300.1), torch.full((1, 2), 2.0)
    out = torch.ops.fisedit.group_norm_rows(rows, torch.zeros(64, dtype=torch.int64), mean, rstd, None, None)
    expected = (rows.double() - mean.double()[0, 0]) * 2
    assert (out.double() - expected).abs().max() < 2e-3


def test_channels_that_do_not_divide_into_groups_are_an_error() -> None:
    with pytest.raises(RuntimeError):
        torch.ops.fisedit.group_norm_rows(
            torch.randn(2, 10), torch.tensor([0, 0]), torch.zeros(1, 4), torch.ones(1, 4), None, None
        )


def test_a_sample_without_statistics_is_an_error() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        torch.ops.fisedit.group_norm_rows(
            torch.randn(1, 4), torch.tensor([1]), torch.zeros(1, 2), torch.ones(1, 2), None, None
        )
