"""APSC block choice against a brute-force count over all tiles (paper, A.1)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisedit_compile.planning.apsc import (
    PAPER_BLOCKS,
    active_tiles,
    choose_block,
    expand_to_tiles,
    output_tile,
)

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    """bool [n, h, w]: random at any density, empty, full or one pixel."""
    n, (h, w) = draw(st.integers(1, 3)), draw(sizes)
    kind = draw(st.sampled_from(["random", "empty", "full", "pixel"]))
    if kind == "random":
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        return torch.rand(n, h, w, generator=generator) < draw(st.sampled_from([0.01, 0.1, 0.5, 0.95]))
    mask = torch.full((n, h, w), kind == "full")
    if kind == "pixel":
        mask[draw(st.integers(0, n - 1)), draw(st.integers(0, h - 1)), draw(st.integers(0, w - 1))] = True
    return mask


def tiles_by_hand(mask: torch.Tensor, tile: tuple[int, int]) -> tuple[int, torch.Tensor]:
    """Number of tiles with an active pixel, and their union, visiting one tile after the other."""
    count, union = 0, torch.zeros_like(mask)
    n, h, w = mask.shape
    for b, y, x in itertools.product(range(n), range(0, h, tile[0]), range(0, w, tile[1])):
        if mask[b, y : y + tile[0], x : x + tile[1]].any():
            count += 1
            union[b, y : y + tile[0], x : x + tile[1]] = True
    return count, union


@given(masks(), st.tuples(st.integers(1, 31), st.integers(1, 31)))
@settings(deadline=None)
def test_tiles_equal_visiting_each(mask: torch.Tensor, tile: tuple[int, int]) -> None:
    count, union = tiles_by_hand(mask, tile)
    assert active_tiles(mask, tile).sum() == count
    assert torch.equal(expand_to_tiles(mask, tile), union)


@given(masks(), st.sampled_from([(1, 1), (3, 3), (5, 3), (2, 2), (7, 7), (1, 31)]))
@settings(deadline=None)
def test_choice_minimises_the_papers_objective(mask: torch.Tensor, kernel: tuple[int, int]) -> None:
    choice = choose_block(mask, kernel)
    usable = [(h, w) for h in (2, 4, 8, 16, 32) for w in (2, 4, 8, 16, 32) if h >= kernel[0] and w >= kernel[1]]
    assert [c.block for c in choice.candidates] == usable
    for candidate in choice.candidates:
        out_h, out_w = candidate.block[0] - kernel[0] + 1, candidate.block[1] - kernel[1] + 1
        count, _ = tiles_by_hand(mask, (out_h, out_w))
        assert (candidate.tile, candidate.tiles) == ((out_h, out_w), count)
        assert candidate.objective == out_h * out_w * count
    assert choice.chosen.objective == min(c.objective for c in choice.candidates)


@given(masks())
@settings(deadline=None)
def test_exact_tiles_are_the_mask_and_cost_least(mask: torch.Tensor) -> None:
    exact = choose_block(mask, (3, 3), [(3, 3)]).chosen
    assert exact.tile == (1, 1)
    assert exact.objective == mask.sum()
    assert torch.equal(expand_to_tiles(mask, exact.tile), mask)
    assert exact.objective <= choose_block(mask, (3, 3)).chosen.objective


@given(masks())
@settings(deadline=None)
def test_no_block_beats_4x4_under_3x3(mask: torch.Tensor) -> None:
    """The module's remark: 2x2 tiles nest in all others, so larger blocks only tie."""
    choice = choose_block(mask, (3, 3))
    four = next(c for c in choice.candidates if c.block == (4, 4))
    assert choice.chosen.objective == four.objective
    assert torch.equal(expand_to_tiles(mask, choice.chosen.tile), expand_to_tiles(mask, four.tile))


def test_a_larger_block_wins_where_its_tiles_fit_the_mask() -> None:
    # 5x5: output sides of 4, 8 and 16 are none, 4 and 12. One 12x12 region at the corner: nine tiles of 4x4 or one.
    mask = torch.zeros(1, 24, 24, dtype=torch.bool)
    mask[0, :12, :12] = True
    choice = choose_block(mask, (5, 5))
    assert choice.chosen.block == (16, 16)
    assert {c.block: c.objective for c in choice.candidates}[8, 8] == 144  # a tie: 1 * 256 input pixels against 9 * 64
    mask[0, 13, 13] = True
    assert choose_block(mask, (5, 5)).chosen.block == (8, 8)


def test_narrow_masks_get_narrow_blocks() -> None:
    # 6x6: output sides 3, 11 and 27, which do not nest.
    mask = torch.zeros(1, 33, 33, dtype=torch.bool)
    mask[0, :11, :3] = True  # 1 tile of 11x3, or 4 of 3x3
    assert choose_block(mask, (6, 6)).chosen.block == (16, 8)
    assert choose_block(mask.mT, (6, 6)).chosen.block == (8, 16)


@pytest.mark.parametrize("block", [(2, 2), (2, 4), (4, 2)])
def test_blocks_without_output_are_rejected(block: tuple[int, int]) -> None:
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"{block[0]}x{block[1]} under a kernel of 3x3 has no output"):
        output_tile(block, (3, 3))
    with pytest.raises(ValueError, match="has no output"):
        choose_block(mask, (3, 3), [(4, 4), block])
    assert block in PAPER_BLOCKS
    assert block not in [c.block for c in choose_block(mask, (3, 3)).candidates]


def test_no_candidate_at_all_is_an_error() -> None:
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="no block to choose from for a kernel of 33x3"):
        choose_block(mask, (33, 3))
    with pytest.raises(ValueError, match="no block to choose from"):
        choose_block(mask, (3, 3), [])


def test_report_lists_every_candidate_and_marks_the_chosen() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 0, 0] = True
    lines = str(choose_block(mask, (3, 3))).splitlines()
    assert len(lines) == 1 + 16
    assert [line for line in lines if "<- chosen" in line] == [line for line in lines if " 4x4 " in line]
