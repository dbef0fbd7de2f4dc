"""The GroupNorm kernels in Triton's interpreter, against the references in fp64."""

from __future__ import annotations

import pytest
import torch
from support.interpreter import INTERPRETED_DTYPES, MARKS
from support.poison import poisoned
from support.random_rows import normal

from fisedit_compile.kernels.norms.group_norm_rows import (
    group_norm_rows_reference,
    group_norm_statistics_reference,
    group_norm_whole_reference,
)
from fisedit_compile.testing import assert_close

norm = pytest.importorskip("fisedit_compile.kernels.norms.group_norm_rows_triton", reason="Triton is not installed")
whole = pytest.importorskip("fisedit_compile.kernels.norms.group_norm_whole_triton", reason="Triton is not installed")
statistics_of = pytest.importorskip(
    "fisedit_compile.kernels.norms.group_norm_statistics_triton", reason="Triton is not installed"
)
pytestmark = MARKS

dtypes = pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)


@pytest.mark.parametrize(
    ("dtype", "statistics"),
    [(torch.float32, torch.float32), (torch.float32, torch.float64), (torch.float16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize(
    ("rows", "channels", "count"),
    [
        *((0, 8, count) for count in (None, 0, 33)),
        *((1, 8, count) for count in (None, 0, 1, 99)),
        *((70, 24, count) for count in (None, 0, 1, 33, 99)),
        *((37, 64, count) for count in (None, 33, 99)),
    ],
)
@pytest.mark.parametrize("silu", [False, True])
def test_given_scale_and_shift(
    dtype: torch.dtype, statistics: torch.dtype, rows: int, channels: int, silu: bool, count: int | None
) -> None:
    x = normal(rows, channels, dtype=dtype, seed=0) * 2 + 3
    sample = torch.arange(rows) % 2 * 2  # of three samples the second has no rows
    scale, shift = (normal(3, channels, dtype=statistics, seed=seed) for seed in (1, 2))
    real = rows if count is None else min(count, rows)
    x[real:] = torch.nan
    given = None if count is None else torch.tensor([count], dtype=torch.int32)
    with poisoned():
        out = norm.group_norm_rows_triton(x, sample, scale, shift, silu, given)
    expected = group_norm_rows_reference(x[:real].double(), sample[:real], scale.double(), shift.double(), silu)
    assert out.dtype == dtype
    assert_close(out[:real], expected)


@dtypes
@pytest.mark.parametrize(("samples", "pixels", "channels", "groups"), [(2, 144, 40, 4), (3, 25, 12, 3), (1, 2, 64, 32)])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("tile", [16384, 64])  # all pixels in registers, and a loop over the rest
def test_own_statistics(
    dtype: torch.dtype, samples: int, pixels: int, channels: int, groups: int, silu: bool, tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(whole, "_GROUP_VALUES", tile)
    rows = normal(samples * pixels, channels, dtype=dtype, seed=0) * 2 + 3
    weight, bias = (normal(channels, dtype=dtype, seed=seed) for seed in (1, 2))
    for given in ((weight, bias), (None, None)):
        with poisoned():
            out = whole.group_norm_whole_triton(rows, samples, groups, *given, 1e-5, silu)
        wide = (None if t is None else t.double() for t in given)
        assert_close(out, group_norm_whole_reference(rows.double(), samples, groups, *wide, 1e-5, silu))


@dtypes
@pytest.mark.parametrize(
    ("samples", "pixels", "channels", "groups"),
    [(2, 144, 40, 4), (3, 25, 12, 3), (1, 2, 64, 32), (1, 400, 96, 1), (2, 64, 20, 5)],
)
@pytest.mark.parametrize("mean", [3, 100])
def test_statistics_alone(
    dtype: torch.dtype, samples: int, pixels: int, channels: int, groups: int, mean: float
) -> None:
    rows = (normal(samples * pixels, channels, dtype=torch.float64, seed=0) * 2 + mean).to(dtype)
    weight, bias = (normal(channels, dtype=dtype, seed=seed) for seed in (1, 2))
    for given in ((weight, bias), (None, None)):
        with poisoned():
            found = statistics_of.group_norm_statistics_triton(rows, samples, groups, *given, 1e-5)
        wide = [None if t is None else t.double() for t in given]
        for out, expected in zip(
            found, group_norm_statistics_reference(rows.double(), samples, groups, *wide, 1e-5), strict=True
        ):
            assert out.dtype == torch.float32
            assert_close(out, expected)


def test_refuses_what_does_not_fit() -> None:
    rows = torch.zeros(6, 8)
    with pytest.raises(ValueError, match=r"give both \[B, 8\]"):
        norm.group_norm_rows_triton(rows, torch.zeros(6).long(), torch.zeros(1, 3), torch.zeros(1, 3))
    for samples, groups in ((4, 2), (2, 3)):
        with pytest.raises(ValueError, match="groups of as many channels"):
            whole.group_norm_whole_triton(rows, samples, groups, None, None, 1e-5)
