"""The GroupNorm kernel in Triton's interpreter, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from interpreter import INTERPRETED_DTYPES, MARKS
from poison import poisoned
from random_rows import normal

from fisedit_compile.kernels.group_norm_rows import group_norm_rows_reference
from fisedit_compile.testing import assert_close

norm = pytest.importorskip("fisedit_compile.kernels.group_norm_rows_triton", reason="Triton is not installed")
pytestmark = MARKS


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("statistics", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("count", "channels", "groups"), [(0, 8, 2), (1, 8, 2), (70, 24, 3), (37, 64, 32)])
@pytest.mark.parametrize("silu", [False, True])
def test_equals_the_reference(
    dtype: torch.dtype, statistics: torch.dtype, count: int, channels: int, groups: int, silu: bool
) -> None:
    rows = normal(count, channels, dtype=dtype, seed=0) * 2 + 3
    sample = torch.arange(count) % 2 * 2  # of three samples the second has no rows
    mean = normal(3, groups, dtype=statistics, seed=1) + 3
    rstd = normal(3, groups, dtype=statistics, seed=2).abs() + 0.5
    weight, bias = (normal(channels, dtype=dtype, seed=seed) for seed in (3, 4))
    for given in ((weight, bias), (None, None)):
        with poisoned():
            out = norm.group_norm_rows_triton(rows, sample, mean, rstd, *given, silu=silu)
        wide = (None if t is None else t.double() for t in given)
        expected = group_norm_rows_reference(rows.double(), sample, mean.double(), rstd.double(), *wide)
        assert out.dtype == dtype
        assert_close(out, F.silu(expected) if silu else expected)


def test_refuses_groups_that_do_not_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="divisor of the channels"):
        norm.group_norm_rows_triton(
            torch.zeros(2, 8), torch.zeros(2).long(), torch.zeros(1, 3), torch.ones(1, 3), None, None
        )
