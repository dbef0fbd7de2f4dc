"""The kernels of statistics that follow an edit, in Triton's interpreter, against the references in fp64."""

from __future__ import annotations

import pytest
import torch
from support.interpreter import INTERPRETED_DTYPES, MARKS
from support.poison import poisoned
from support.random_rows import normal
from torch import Tensor

from fisedit_compile.kernels.norms.followed_statistics import followed_statistics_reference
from fisedit_compile.kernels.norms.tile_moments import moments_dtype, tile_moments_reference
from fisedit_compile.testing import assert_close

moments_of = pytest.importorskip("fisedit_compile.kernels.norms.tile_moments_triton", reason="Triton is not installed")
followed = pytest.importorskip(
    "fisedit_compile.kernels.norms.followed_statistics_triton", reason="Triton is not installed"
)
pytestmark = MARKS

dtypes = pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)


def some_tiles(count: int, most: int, rows: int) -> Tensor:
    """Tiles of one to ``most`` rows, some of them of none."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(rows, (count, most), generator=generator, dtype=torch.int32)
    sizes = torch.randint(0, most + 1, (count, 1), generator=generator)
    return tiles.where(torch.arange(most) < sizes, -1)


@dtypes
@pytest.mark.parametrize(
    ("count", "most", "channels", "groups"), [(9, 5, 40, 4), (1, 1, 6, 3), (12, 16, 64, 32), (0, 4, 8, 2)]
)
@pytest.mark.parametrize("mean", [0, 100])
def test_moments_of_tiles(
    dtype: torch.dtype, count: int, most: int, channels: int, groups: int, mean: float
) -> None:  # fmt: skip
    rows = (normal(70, channels, dtype=torch.float64, seed=0) * 2 + mean).to(dtype)
    tiles = some_tiles(count, most, len(rows))
    with poisoned():
        found = moments_of.tile_moments_triton(rows, tiles, groups)
    assert found.dtype == moments_dtype(dtype)
    assert_close(found, tile_moments_reference(rows.double(), tiles, groups))


@dtypes
@pytest.mark.parametrize(("batch", "tiles", "channels", "groups"), [(2, 256, 24, 4), (3, 20, 6, 3), (1, 256, 64, 32)])
@pytest.mark.parametrize("covered", [0, 1, 150])
@pytest.mark.parametrize("affine", [True, False])
def test_statistics(
    dtype: torch.dtype, batch: int, tiles: int, channels: int, groups: int, covered: int, affine: bool
) -> None:
    covered = min(covered, batch * tiles)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 10, (tiles,), generator=generator, dtype=torch.int32)
    ids = torch.randperm(batch * tiles, generator=generator, dtype=torch.int32)[:covered].sort().values
    ids[covered // 2 :][:1] = -1  # of a padded tile
    kept = moments_dtype(dtype)
    base, moments = (
        normal(n, groups, 2, dtype=torch.float64, seed=n).abs().to(kept) + 1 for n in (batch * tiles, covered)
    )
    scale, shift = (normal(batch, channels, dtype=torch.float32, seed=seed) for seed in (1, 2))
    given = [normal(channels, dtype=dtype, seed=seed) if affine else None for seed in (3, 4)]
    with poisoned():
        found = followed.followed_statistics_triton(moments, ids, sizes, base, scale, shift, *given, 1e-5)
    wide = [None if each is None else each.double() for each in given]
    expected = followed_statistics_reference(
        moments.double(), ids, sizes, base.double(), scale.double(), shift.double(), *wide, 1e-5
    )
    for out, want in zip(found, expected, strict=True):
        assert out.dtype == torch.float32
        assert_close(out, want)


@dtypes
def test_the_moments_of_the_base_give_its_bits(dtype: torch.dtype) -> None:
    base = normal(512, 4, 2, dtype=torch.float64, seed=0).abs().to(moments_dtype(dtype))
    ids = torch.arange(100, 400, dtype=torch.int32)
    sizes = torch.full((256,), 9, dtype=torch.int32)
    scale, shift = (normal(2, 24, dtype=torch.float32, seed=seed) for seed in (1, 2))
    weight = normal(24, dtype=dtype, seed=3)
    found = followed.followed_statistics_triton(base[100:400], ids, sizes, base, scale, shift, weight, None, 1e-5)
    assert torch.equal(found[0], scale)
    assert torch.equal(found[1], shift)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="3 groups of 8 channels"):
        moments_of.tile_moments_triton(torch.zeros(6, 8), torch.zeros(1, 2, dtype=torch.int32), 3)
