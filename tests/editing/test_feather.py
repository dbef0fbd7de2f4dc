"""The feather around a mask, held to the mask grown pixel by pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compile.editing.feather import cells_reached, feather_levels


def dilate(region: Tensor, pixels: int) -> Tensor:
    return F.max_pool2d(region, 2 * pixels + 1, stride=1, padding=pixels)


def grown_pixel_by_pixel(mask: Tensor, cell: tuple[int, int], grown: int, feathered: int) -> Tensor:
    region = mask.repeat_interleave(cell[0], 1).repeat_interleave(cell[1], 2)[:, None].float()
    layers = [dilate(region, grown + more) for more in range(feathered)]
    return torch.stack(layers).sum(0)[:, 0]


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9), st.integers(1, 9))
def test_is_the_mask_grown_by_one_more_pixel_at_a_time(
    seed: int, height: int, width: int, grown: int, feathered: int
) -> None:
    mask = torch.rand(2, 7, 6, generator=torch.Generator().manual_seed(seed)) < 0.1
    got = feather_levels(mask, (height, width), grown, feathered)
    assert torch.equal(got.float(), grown_pixel_by_pixel(mask, (height, width), grown, feathered))


@given(st.integers(1, 5), st.integers(0, 9), st.integers(1, 9))
def test_beyond_the_cells_reached_there_is_nothing(pixels: int, grown: int, feathered: int) -> None:
    reach = cells_reached(pixels, grown, feathered)
    mask = torch.zeros(1, 1, reach + 3, dtype=torch.bool)
    mask[..., 0] = True
    levels = feather_levels(mask, (1, pixels), grown, feathered)[0, 0].view(-1, pixels)
    assert not levels[reach + 1 :].any()
    assert levels[reach].any()


def test_a_feather_of_more_pixels_than_a_byte_counts() -> None:
    mask = torch.zeros(1, 1, 400, dtype=torch.bool)
    mask[..., 0] = True
    assert feather_levels(mask, (1, 1), 0, 300)[0, 0, :300].tolist() == list(range(300, 0, -1))
