"""The measured choice of rows: known winners under made-up costs, and what holds for every cost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.planning.apsc import choose_block, choose_rows, expand_to_tiles
from fisedit_compile.planning.edit_plan import plan_edit


def square(side: int, at: int, size: int) -> torch.Tensor:
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[:, at : at + side, at : at + side] = True
    return mask


def work(rows: int, halo: int) -> float:
    return float(rows)


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    n, h, w = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.rand(n, h, w, generator=generator) < draw(st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]))


@given(masks(), st.lists(st.integers(0, 1000), min_size=3, max_size=3), st.integers(1, 3))
def test_no_candidate_costs_less_and_rows_are_counted(mask: torch.Tensor, weights: list[int], copies: int) -> None:
    wave, row, border = weights

    def cost(rows: int, halo: int) -> float:  # a staircase of waves, and something for rows and halo
        return wave * math.ceil(rows / 64) + row * rows + border * halo

    choice = choose_rows(mask, cost, copies=copies)
    assert choice.chosen.microseconds == min(each.microseconds for each in choice.candidates)
    least = [each for each in choice.candidates if each.microseconds == choice.chosen.microseconds]
    assert choice.chosen.rows == min(each.rows for each in least)
    assert choice == choose_rows(mask, cost, copies=copies)
    tiles = [each.tile for each in choice.candidates]
    assert len(set(tiles)) == len(tiles)
    for each in choice.candidates:
        rows = expand_to_tiles(mask, each.tile)
        assert each.rows == copies * rows.sum()
        assert each.microseconds == cost(each.rows, each.halo)
        read = torch.nn.functional.conv2d(rows[:, None].double(), torch.ones(1, 1, 3, 3).double(), padding=1)[:, 0] > 0
        assert each.halo == copies * (read & ~rows).sum()


@given(masks())
def test_the_candidates_hold_the_extremes_and_the_papers_choice(mask: torch.Tensor) -> None:
    choice = choose_rows(mask, work)
    assert torch.equal(expand_to_tiles(mask, choice.candidates[0].tile), mask)
    whole = mask.any(2).any(1)[:, None, None].expand_as(mask)
    assert torch.equal(expand_to_tiles(mask, choice.candidates[-1].tile), whole)
    assert choice.chosen.rows == mask.sum()
    paper = choose_block(mask, (3, 3)).chosen
    assert choice.of_tile(paper.tile).rows == expand_to_tiles(mask, paper.tile).sum()


def test_pixel_wins_where_rows_cost() -> None:
    choice = choose_rows(square(5, 3, 16), work)
    assert (choice.chosen.kind, choice.chosen.rows, choice.chosen.name) == ("pixel", 25, "pixel")


def test_a_tie_on_a_staircase_goes_to_fewer_rows() -> None:
    # 25 pixels, 36 in 2x2 tiles: both one wave of 64, and pixel is taken
    choice = choose_rows(square(5, 3, 16), lambda rows, halo: math.ceil(rows / 64))
    assert choice.of_tile((2, 2)).microseconds == choice.chosen.microseconds == 1
    assert choice.chosen.kind == "pixel"


def test_a_larger_tile_wins_where_its_border_is_cheaper() -> None:
    # Every other pixel of a 6x6 corner: 18 rows with 31 halo pixels, or 36 rows in one 6x6 tile with 13.
    mask = torch.zeros(1, 20, 20, dtype=torch.bool)
    mask[0, :6, :6] = (torch.arange(6)[:, None] + torch.arange(6)) % 2 == 0
    by_halo = choose_rows(mask, lambda rows, halo: math.ceil(rows / 64) + halo)
    assert by_halo.of_tile((1, 1)).rows == 18
    assert (by_halo.chosen.kind, by_halo.chosen.rows, by_halo.chosen.halo) == ("whole", 400, 0)
    both = choose_rows(mask, lambda rows, halo: 10 * math.ceil(rows / 64) + halo)
    assert (both.chosen.name, both.chosen.rows, both.chosen.halo) == ("tiles 2x2", 36, 13)
    # 2x2, 2x6, 6x2 and 6x6 tiles cover the same pixels: the smallest is taken
    assert [each.name for each in both.candidates if each.microseconds == both.chosen.microseconds] == [
        "tiles 2x2", "tiles 2x6", "tiles 6x2", "tiles 6x6",
    ]  # fmt: skip


def test_whole_wins_where_nearly_all_is_active_and_a_halo_costs() -> None:
    mask = torch.ones(2, 12, 12, dtype=torch.bool)
    mask[0, 5, 5] = False
    choice = choose_rows(mask, lambda rows, halo: rows + 10 * halo)
    assert choice.chosen.rows == 288
    assert choice.chosen.name == "tiles 2x2"  # which covers the map as well; fewer rows, then the smaller tile
    assert choice.candidates[-1].microseconds == choice.chosen.microseconds


def test_whole_leaves_an_empty_sample_empty() -> None:
    mask = torch.cat([square(3, 0, 12), square(0, 0, 12)])
    choice = choose_rows(mask, lambda rows, halo: 1000.0 if rows < 144 else 1.0)
    assert (choice.chosen.kind, choice.chosen.rows, choice.chosen.halo) == ("whole", 144, 0)


def test_the_report_marks_the_chosen() -> None:
    lines = str(choose_rows(square(5, 3, 16), work)).splitlines()
    assert len(lines) == 1 + 1 + 9 + 6 + 1  # head, pixel, sides 2, 6, 14, with 30 beside a smaller one, whole
    assert [line.split()[0] for line in lines if line.endswith("<- chosen")] == ["pixel"]


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_costs_that_are_none(cost: float) -> None:
    with pytest.raises(ValueError, match="give microseconds, at least 0"):
        choose_rows(square(2, 0, 4), lambda rows, halo: cost)


REQUESTS = [PlanTensor("index", size) for size in ((16, 16), (8, 8), (4, 4))]


def test_a_plan_takes_the_measured_rows_and_reports_both() -> None:
    def costs(size: tuple[int, int], rows: int, halo: int) -> float:
        return 7.0 if size == (8, 8) and rows == 128 else 1000.0 + rows  # whole at 8x8, pixel at 16x16

    mask = square(5, 3, 16)
    plan = plan_edit(mask, REQUESTS, batch=2, blocks="measured", costs=costs, dense_below=8)
    exact = plan_edit(mask, REQUESTS, batch=2, dense_below=8)
    assert plan.counts == {(16, 16): 50, (8, 8): 128, (4, 4): 32}
    assert plan.pixel_counts == exact.counts
    assert set(plan.cost_choices) == set(plan.paper_choices) == {(16, 16), (8, 8)}
    assert torch.equal(plan.tensor(REQUESTS[0]), exact.tensor(REQUESTS[0]))
    assert plan.report().splitlines()[1:6] == [
        "16x16: 50 of 512 rows (9.8%)",
        "  pixel                      50 rows     1050.0 us predicted",
        "  paper    block 4x4         72 rows     1072.0 us predicted",
        "  whole                     512 rows     1512.0 us predicted",
        "  measured pixel             50 rows     1050.0 us predicted",
    ]
    assert "  measured whole            128 rows        7.0 us predicted" in plan.report().splitlines()


@pytest.mark.parametrize("blocks", ["pixel", "paper"])
def test_costs_beside_another_choice_are_for_the_report(blocks: str) -> None:
    mask = square(5, 3, 16)
    alone = plan_edit(mask, REQUESTS, batch=1, blocks=blocks)  # type: ignore[arg-type]
    beside = plan_edit(mask, REQUESTS, batch=1, blocks=blocks, costs=lambda size, rows, halo: 1.0)  # type: ignore[arg-type]
    assert beside.counts == alone.counts
    assert alone.cost_choices == {}
    assert "us predicted" in beside.report()
    assert "us predicted" not in alone.report()


def test_measured_without_costs() -> None:
    with pytest.raises(ValueError, match="blocks='measured' chooses by costs"):
        plan_edit(square(2, 0, 4), [], batch=1, blocks="measured")
