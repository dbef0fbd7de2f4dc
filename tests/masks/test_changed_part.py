"""The part of a mask that an edit changed in the end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fisedit_compile.masks.changed_part import UNCHANGED, changed_part


def latents(samples: int = 1, size: int = 16) -> Tensor:
    return torch.randn(samples, 4, size, size, generator=torch.Generator().manual_seed(0))


def cells(size: int, rows: slice, columns: slice, samples: int = 1) -> Tensor:
    mask = torch.zeros(samples, size, size, dtype=torch.bool)
    mask[:, rows, columns] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_what_changes_by_more_than_a_share_of_the_bases_deviation_stays(dtype: torch.dtype, scale: float) -> None:
    base = scale * latents()
    mask, changed = cells(16, slice(2, 12), slice(2, 12)), cells(16, slice(4, 8), slice(4, 8))
    edit = base + base.std() * UNCHANGED * torch.where(changed, 1.2, 0.8)[:, None]
    assert torch.equal(changed_part(mask, base.to(dtype), edit.to(dtype)), changed)


def test_gaps_of_two_cells_stay_and_nothing_outside_the_mask_comes() -> None:
    base = latents()
    mask = cells(16, slice(0, 16), slice(0, 9))
    changed = cells(16, slice(3, 12), slice(2, 4)) | cells(16, slice(3, 12), slice(6, 12))
    part = changed_part(mask, base, base + changed[:, None])
    assert torch.equal(part, cells(16, slice(3, 12), slice(2, 9)))


def test_each_sample_is_held_to_its_own_base_and_one_that_hardly_changes_keeps_its_mask() -> None:
    base = latents(3) * torch.tensor([1.0, 10.0, 1.0])[:, None, None, None]
    mask = cells(16, slice(2, 12), slice(2, 12), 3)
    mask[2] = False
    part = changed_part(mask, base, base + cells(16, slice(4, 8), slice(4, 8))[:, None])
    assert torch.equal(part[0], cells(16, slice(4, 8), slice(4, 8))[0])
    assert torch.equal(part[1], mask[1])
    assert not part[2].any()


def test_what_is_not_finite_counts_as_changed() -> None:
    base, edit = latents(), latents()
    edit[:, :, 5, 5] = torch.nan
    edit[:, :, 5, 6] = torch.inf
    part = changed_part(cells(16, slice(2, 12), slice(2, 12)), base, edit)
    assert part.sum() == part[0, 5, 5:7].sum() == 2


def test_a_part_of_it_changes_no_more() -> None:
    base = latents()
    edit = base + 2 * UNCHANGED * torch.rand(base.shape, generator=torch.Generator().manual_seed(1))
    mask = cells(16, slice(2, 14), slice(2, 14))
    part = changed_part(mask, base, edit)
    assert 0 < part.sum() < mask.sum()
    assert torch.equal(changed_part(mask, base, torch.where(part[:, None], edit, base)), part)
