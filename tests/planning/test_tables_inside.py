"""Neighbour tables of sources that have nothing but their rows, against a search written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compile.ir.layout import Size
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.taps import Taps
from fisedit_compile.planning.edit_plan import EditPlan, plan_edit


def nearest_inside(plan: EditPlan, taps: Taps) -> list[list[int]]:
    """For each row of the target the row of the source that each tap reads, one tap after the other."""
    read = taps.upsampled or taps.source
    factor = read[0] // taps.source[0], read[1] // taps.source[1]
    active = plan.active(taps.source)
    number = torch.full(active.shape, -1)
    number[active] = torch.arange(int(active.sum()))
    middle = taps.kernel[0] // 2, taps.kernel[1] // 2

    def row_at(sample: int, y: int, x: int, tap: Size) -> int | None:
        """The row of a tap; -1 for a pixel that is none, None outside the picture."""
        row, column = (
            start * stride - padding + offset * dilation
            for start, stride, padding, offset, dilation in zip(
                (y, x), taps.stride, taps.padding, tap, taps.dilation, strict=True
            )
        )
        if not (0 <= row < read[0] and 0 <= column < read[1]):
            return None
        return int(number[sample, row // factor[0], column // factor[1]])

    table = []
    for sample, y, x in plan.active(taps.target).nonzero().tolist():
        entries = []
        for tap in ((i, j) for i in range(taps.kernel[0]) for j in range(taps.kernel[1])):
            found = row_at(sample, y, x, tap)
            if found == -1:
                between = [
                    (i, j)
                    for i in range(min(tap[0], middle[0]), max(tap[0], middle[0]) + 1)
                    for j in range(min(tap[1], middle[1]), max(tap[1], middle[1]) + 1)
                ]
                between.sort(key=lambda at: ((at[0] - tap[0]) ** 2 + (at[1] - tap[1]) ** 2, abs(at[0] - tap[0])))
                rows = [entry for other in between if (entry := row_at(sample, y, x, other)) is not None and entry >= 0]
                found = rows[0] if rows else -1
            entries.append(-1 if found is None else found)
        table.append(entries)
    return table


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    seed, density = draw(st.integers(0, 1000)), draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    return torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(seed)) < density


@given(mask=masks(), upsampled=st.booleans(), kernel=st.sampled_from([(3, 3), (5, 3), (1, 1)]))
def test_a_tap_that_misses_the_rows_reads_the_nearest_on_its_way_to_the_centre(
    mask: torch.Tensor, upsampled: bool, kernel: Size
) -> None:
    source, large = (5, 4), (10, 8)
    padding = kernel[0] // 2, kernel[1] // 2
    options = {"upsampled": large} if upsampled else {}
    taps = Taps(source, large if upsampled else source, kernel, (1, 1), padding, (1, 1), inside=True, **options)
    plan = plan_edit(mask, [PlanTensor("table", taps), PlanTensor("index", source)], batch=4)
    expected = torch.tensor(nearest_inside(plan, taps), dtype=torch.int32).view(-1, kernel[0] * kernel[1])
    assert torch.equal(plan.tensor(PlanTensor("table", taps)), expected)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_of_a_full_mask_it_is_the_table_with_a_halo(stride: Size) -> None:
    target = tuple((side - 1) // step + 1 for side, step in zip((6, 5), stride, strict=True))
    given_to = ((6, 5), target, (3, 3), stride, (1, 1), (1, 1))
    tables = []
    for inside in (False, True):
        taps = Taps(*given_to, inside=inside)  # type: ignore[arg-type]
        plan = plan_edit(torch.ones(1, 6, 5, dtype=torch.bool), [PlanTensor("table", taps)], batch=2)
        tables.append(plan.tensor(PlanTensor("table", taps)))
    assert torch.equal(*tables)


def test_a_plan_of_it_has_no_halo() -> None:
    taps = Taps((6, 5), (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), inside=True)
    with pytest.raises(ValueError, match="has no halo"):
        PlanTensor("halo", taps)
    assert str(taps).startswith("inside 6x5")


def test_a_whole_map_misses_no_pixel() -> None:
    with pytest.raises(ValueError, match=r"Taps\.dense and Taps\.inside"):
        Taps((6, 5), (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), dense=True, inside=True)
