"""Statistics of group norms that follow an edit, against those of the map that it becomes."""

from __future__ import annotations

import pytest
import torch
from support.random_rows import normal
from torch import Tensor

from fisedit_compile.ir.tile_grid import sizes_of_tiles
from fisedit_compile.kernels.norms.followed_statistics import followed_statistics_reference
from fisedit_compile.kernels.norms.group_norm_rows import norm_scale_shift
from fisedit_compile.kernels.norms.map_moments import moments_of_map
from fisedit_compile.kernels.norms.tile_moments import tile_moments_reference
from fisedit_compile.planning.edit_plan import PlanTensor, plan_edit
from fisedit_compile.testing import assert_close, relative_error

SIZE, CHANNELS, GROUPS, EPS = (37, 30), 24, 4, 1e-5
KINDS = ("index", "tiles", "tile_ids", "tile_sizes")


def followed(base: Tensor, edit: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scale and shift ``[2, B, C]`` of the norm of a map ``[B, H * W, C]`` whose rows under the mask are the edit's."""
    batch = len(base)
    plan = plan_edit(mask, [PlanTensor(kind, SIZE) for kind in KINDS], batch=batch)  # type: ignore[arg-type]
    index, tiles, ids, sizes = (plan.tensor(PlanTensor(kind, SIZE)) for kind in KINDS)  # type: ignore[arg-type]
    moments = tile_moments_reference(edit.flatten(0, 1)[index], tiles, GROUPS)
    known = norm_scale_shift(base.transpose(1, 2), GROUPS, weight, bias, EPS)
    of_base = moments_of_map(base.flatten(0, 1), batch, SIZE, GROUPS)
    return torch.stack(followed_statistics_reference(moments, ids, sizes, of_base, *known, weight, bias, EPS))


@pytest.fixture
def maps() -> tuple[Tensor, Tensor]:
    base, edit = (normal(2, SIZE[0] * SIZE[1], CHANNELS, dtype=torch.float64, seed=seed) for seed in (0, 1))
    return base + 2, 3 * edit - 1


@pytest.mark.parametrize("affine", [True, False])
def test_a_full_mask_gives_those_of_the_edit(maps: tuple[Tensor, Tensor], affine: bool) -> None:
    base, edit = maps
    given = [normal(CHANNELS, dtype=torch.float64, seed=seed) if affine else None for seed in (2, 3)]
    found = followed(base, edit, torch.ones(1, *SIZE, dtype=torch.bool), *given)
    assert_close(found, torch.stack(norm_scale_shift(edit.transpose(1, 2), GROUPS, *given, EPS)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_unchanged_rows_give_the_base_s_bits(maps: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    base = maps[0].to(dtype)
    mask = torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(4)) < 0.9
    mask[:, :20] = True
    weight = normal(CHANNELS, dtype=dtype, seed=2)
    found = followed(base, base, mask, weight, None)
    assert torch.equal(found, torch.stack(norm_scale_shift(base.transpose(1, 2), GROUPS, weight, None, EPS)))


def test_a_mask_follows_most_of_what_changes(maps: tuple[Tensor, Tensor]) -> None:
    base, edit = maps
    mask = torch.zeros(1, *SIZE, dtype=torch.bool)
    mask[:, 3:29, 2:23] = True
    true = torch.where(mask.flatten(1)[:, :, None], edit, base)
    weight, bias = (normal(CHANNELS, dtype=torch.float64, seed=seed) for seed in (2, 3))
    wanted = torch.stack(norm_scale_shift(true.transpose(1, 2), GROUPS, weight, bias, EPS))
    found = followed(base, edit, mask, weight, bias)
    of_base = torch.stack(norm_scale_shift(base.transpose(1, 2), GROUPS, weight, bias, EPS))
    assert relative_error(found, wanted) < 0.05 * relative_error(of_base, wanted)


def test_samples_stand_alone_and_a_mask_without_a_whole_tile_gives_the_base_s(maps: tuple[Tensor, Tensor]) -> None:
    base, edit = maps
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, 3:29, 2:23] = True
    masks[1, 4, 4] = True
    weight, bias = (normal(CHANNELS, dtype=torch.float64, seed=seed) for seed in (2, 3))
    found = followed(base, edit, masks, weight, bias)
    alone = followed(base[:1], edit[:1], masks[:1], weight, bias)
    assert torch.equal(found[:, :1], alone)
    known = torch.stack(norm_scale_shift(base.transpose(1, 2), GROUPS, weight, bias, EPS))
    assert torch.equal(found[:, 1], known[:, 1])


def test_tiles_come_out_the_same_whatever_is_beside_them(maps: tuple[Tensor, Tensor]) -> None:
    rows = maps[0].float().flatten(0, 1)
    tiles = torch.arange(len(rows), dtype=torch.int32)[: 60 * 37].view(60, 37).clone()
    tiles[3, 30:] = -1
    together = tile_moments_reference(rows, tiles, GROUPS)
    for some in (slice(3, 4), slice(0, 17), slice(59, 60)):
        assert torch.equal(together[some], tile_moments_reference(rows, tiles[some], GROUPS))
    assert int(sizes_of_tiles(SIZE).sum()) == SIZE[0] * SIZE[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_meta_device_gives_the_shape_and_dtype_of_a_map_s_moments(dtype: torch.dtype) -> None:
    rows = normal(2 * SIZE[0] * SIZE[1], CHANNELS, dtype=dtype, seed=0)
    real, of_meta = (moments_of_map(each, 2, SIZE, GROUPS) for each in (rows, rows.to("meta")))
    assert of_meta.is_meta
    assert (of_meta.shape, of_meta.dtype, of_meta.stride()) == (real.shape, real.dtype, real.stride())
