"""Some cells of docs/support.md, which benchmarks/supported.py makes; ``FISEDIT_ALL_CELLS=1`` runs all of them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from support.cells import Cell, cells, tried
from support.kinds import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parents[1] / "docs" / "support.md"

#: What every run tries: each way in which a pipeline runs its loop and batch, and each kind of scheduler.
CHOSEN = {
    *("SD StableDiffusionPipeline, DDIM", "SD StableDiffusionPipeline, HeunDiscrete"),
    *("SD StableDiffusionPipeline, KDPM2AncestralDiscrete", "SD StableDiffusionPipeline, DPMSolverSDE"),
    *("SD StableDiffusionPipeline, LCM", "SD StableDiffusionPipeline, Turbo, 1 step"),
    "SD StableDiffusionAdapterPipeline + T2I-Adapter, EulerAncestralDiscrete",
    "SDXL StableDiffusionXLInstructPix2PixPipeline, DPMSolverMultistep",
}

CELLS = cells() if os.environ.get("FISEDIT_ALL_CELLS") else [cell for cell in cells() if str(cell) in CHOSEN]


@pytest.mark.filterwarnings("ignore:.*decode_latents:FutureWarning")  # T2I-Adapter's pipelines still call it
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell) -> None:
    assert tried(cell.kind).outcome(cell).refused == refusal(cell)


def refusal(cell: Cell) -> str:
    """The named error with which a cell is refused; empty for one that works."""
    if cell.title == "DPMSolverSDE":
        return (
            "ValueError: DPMSolverSDEScheduler draws noise that does not come from the pipeline's generator, so that "
            "no edit could repeat it: set its noise_sampler_seed"
        )
    if KINDS[cell.kind].added == "perturbed attention":
        return "ValueError: perturbed-attention guidance adds a third part to the batch: pass pag_scale=0"
    return ""


def test_all_of_the_chosen_are_there() -> None:
    assert {str(cell) for cell in cells()} >= CHOSEN


def test_the_page_is_of_these_cells() -> None:
    count = len(cells())
    (said,) = re.findall(r"^(\d+) of (\d+) cells work", PAGE.read_text(), re.MULTILINE)
    assert int(said[1]) == count
    assert int(said[0]) == sum(not refusal(cell) for cell in cells()) >= 60
