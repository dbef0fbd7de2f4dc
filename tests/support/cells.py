"""The cells of docs/support.md: a kind of pipeline and a scheduler, held to what an edit promises."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from support.kinds import KINDS, Kind
from support.masked_reference import MaskedReference
from support.pipelines import EDIT, PROMPT
from torch import Tensor

from fisedit_compile import Base, Editor
from fisedit_compile.editing.schedulers import SCHEDULERS
from fisedit_compile.errors import BaseMismatchError, FiseditError
from fisedit_compile.ir.layout import size_text
from fisedit_compile.macs.counter import MacCounter
from fisedit_compile.sparse_unet import SparseUNet
from fisedit_compile.testing import assert_close, relative_error

#: The largest error inside the mask that an edit may have, of what the words change there: they change a thousandth of
#: the latents or more, whose rounding is a few millionths.
TOLERANCE = 0.02

FURTHER = "an apple on the left"

CONFIG: dict[str, Any] = {"dense_above": 1.0}

#: Schedulers that each kind of pipeline is run with; plain pipelines with all.
FEW = ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler")

#: What few-step models are drawn with: name -> scheduler, its options, arguments of the call.
FEW_STEPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Lightning, 4 steps": (
        "EulerDiscreteScheduler",
        {"timestep_spacing": "trailing"},
        {"num_inference_steps": 4, "guidance_scale": 0.0},
    ),
    "Turbo, 2 steps": (
        "EulerAncestralDiscreteScheduler",
        {"timestep_spacing": "trailing"},
        {"num_inference_steps": 2, "guidance_scale": 0.0},
    ),
    "Turbo, 1 step": (
        "EulerAncestralDiscreteScheduler",
        {"timestep_spacing": "trailing"},
        {"num_inference_steps": 1, "guidance_scale": 0.0},
    ),
    "LCM, 4 steps": ("LCMScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 1.0}),
    "LCM, 8 steps, guidance": ("LCMScheduler", {}, {"num_inference_steps": 8, "guidance_scale": 1.5}),
    "TCD, 4 steps": ("TCDScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 0.0, "eta": 0.3}),
}

#: Options of schedulers: name -> scheduler and options.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "Euler Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM++ SDE, seeded": ("DPMSolverSDEScheduler", {"noise_sampler_seed": 0}),
    "DDIM, v-prediction": ("DDIMScheduler", {"prediction_type": "v_prediction"}),
    "DDIM, eta=1": ("DDIMScheduler", {}),
}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        kind: name of :data:`~support.kinds.KINDS`.
        scheduler: name of the class.
        title: of the scheduler as the page calls it.
    """

    kind: str
    scheduler: str
    title: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.title}"

    @property
    def options(self) -> dict[str, Any]:
        known = {title: options for title, (_, options, *_) in {**OPTIONS, **FEW_STEPS}.items()}
        return known.get(self.title, {})

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call, with a generator of its own."""
        own = FEW_STEPS[self.title][2] if self.title in FEW_STEPS else {}
        if self.title == "DDIM, eta=1":
            own = {"eta": 1.0}
        noise = torch.Generator().manual_seed(3)
        defaults = {"num_inference_steps": 5, "guidance_scale": 5.0, "generator": noise}
        return {**defaults, **KINDS[self.kind].arguments, **own}


@dataclass(frozen=True)
class Outcome:
    """What came of a cell.

    Attributes:
        refused: the named error, where it is not supported; empty if it is.
        error: inside the mask, against the plain pipeline whose layers read the base outside it
            (:mod:`support.masked_reference`), as a share of what the words change.
    """

    refused: str = ""
    error: float = 0.0


def cells() -> list[Cell]:
    """All of them, those of one kind in a row."""
    found = []
    for name, kind in KINDS.items():
        plain = not kind.added and kind.pipeline in ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
        if kind.pipeline.startswith("LatentConsistency"):
            found.append(Cell(name, "LCMScheduler", "LCM"))
            continue
        for scheduler in SCHEDULERS if plain else FEW:
            found.append(Cell(name, scheduler, scheduler.removesuffix("Scheduler")))
        if plain:
            for title, (scheduler, *_) in {**OPTIONS, **FEW_STEPS}.items():
                found.append(Cell(name, scheduler, title))
    return found


class Tried:
    """A kind of pipeline and an editor for it, whose graphs are captured once for all schedulers."""

    def __init__(self, kind: Kind) -> None:
        self.pipe = kind.build()
        self.scheduler, self.swap = self.pipe.scheduler, kind.swap

    @cached_property
    def editor(self) -> Editor:
        return Editor(self.pipe, CONFIG)

    @cached_property
    def uncontrolled(self) -> Editor:
        return Editor(self.pipe, {**CONFIG, "cross_replace": 0.0})

    def outcome(self, cell: Cell) -> Outcome:
        """Make an edit, and hold it to what it promises.

        Raises:
            AssertionError: it does not keep that.
        """
        own = self.scheduler
        self.pipe.scheduler = getattr(diffusers, cell.scheduler).from_config(own.config, **cell.options)
        record = SparseUNet.record
        with patch.object(SparseUNet, "record", autospec=True, side_effect=record) as recorded:
            refused, base = "", None
            try:
                base = self.editor.generate(PROMPT, **cell.arguments)
            except (FiseditError, ValueError) as error:
                refused = f"{type(error).__name__}: {error}"
        if base is None:
            assert not recorded.called, f"refused after the U-Net was called: {refused}"
            return Outcome(refused=refused)
        return self._held(cell, base)

    def _held(self, cell: Cell, base: Base) -> Outcome:
        plain = self.pipe(PROMPT, **{**cell.arguments, "output_type": "latent"}).images
        assert_close(base.latents, plain, torch.float16)
        mask = torch.zeros(base.latents.shape[2:], dtype=torch.bool)
        mask[3:11, 2:10] = True
        scale = cell.arguments["guidance_scale"]
        same = self.editor.edit(base, PROMPT, mask, guidance_scale=scale * (1 + 1e-6) - 1e-6, background="latents")
        assert same.report.background_identical
        assert_close(same.latents, base.latents, torch.float16)
        edit = self.editor.edit(base, EDIT, mask)
        assert (edit.report.dense_steps, edit.report.sparse_steps) == (0, len(base.visits))
        assert not edit.report.ran_dense
        assert edit.report.background_identical
        assert edit.latents.isfinite().all()
        assert torch.equal(edit.latents[..., ~mask], base.latents[..., ~mask])
        assert not torch.equal(edit.latents[..., mask], base.latents[..., mask])
        further = self.editor.edit(edit, FURTHER, ~mask)
        assert torch.equal(further.latents[..., mask], edit.latents[..., mask])
        if len(base.visits) > 1:
            assert self.editor.edit(base, EDIT).report.background_identical
        if self.swap is not None:
            self._held_when_swapped(cell, base, edit, mask)
        return Outcome(error=self._error(cell, mask))

    def _held_when_swapped(self, cell: Cell, base: Base, edit: Any, mask: Tensor) -> None:
        """A base is of the weights that it was drawn with, and good again when these are back."""
        assert self.swap is not None
        swap, back = self.swap
        swap(self.pipe)
        with pytest.raises(BaseMismatchError, match="another U-Net"):
            self.editor.edit(base, EDIT, mask)
        other = self.editor.generate(PROMPT, **cell.arguments)
        assert not torch.equal(other.latents, base.latents)
        assert self.editor.edit(other, EDIT, mask).report.background_identical
        back(self.pipe)
        assert torch.equal(self.editor.edit(base, EDIT, mask).latents, edit.latents)

    def _error(self, cell: Cell, mask: Tensor) -> float:
        """Of an edit without control, inside the mask."""
        reference = MaskedReference(self.pipe, mask, self.editor.config.dense_below)
        base, expected = reference.draw(PROMPT, EDIT, lambda: cell.arguments)
        recorded = self.uncontrolled.generate(PROMPT, **cell.arguments)
        edit = self.uncontrolled.edit(recorded, EDIT, mask)
        error = relative_error((edit.latents - recorded.latents)[..., mask], (expected - base)[..., mask])
        assert error < TOLERANCE, f"the edit is {error:.3f} of its change away from what it should be"
        return error

    def sparse_share(self) -> float:
        """Share of the multiply-accumulates at the resolutions of rows that a step without a mask does not make."""
        lowered = self._lowered
        counter = MacCounter(lowered, check=False)
        nothing = torch.zeros(1, *lowered.latents, dtype=torch.bool)
        step = counter.step(lowered.plan(nothing))
        sizes = [size for size in counter.dense.by_resolution if size in self._sparse_sizes]
        dense = sum(counter.dense.by_resolution[size] for size in sizes)
        return 1 - sum(step.by_resolution.get(size, 0) for size in sizes) / dense

    def left_dense(self) -> list[str]:
        """What stayed dense at these resolutions, and why."""
        reports = {report.name: report for report in self._lowered.reports}
        skipped = {(skip.op.split(".")[1], skip.reason) for skip in reports["annotate_layout"].skipped}
        return [f"`{op}`: {reason}" for op, reason in sorted(skipped)]

    @property
    def _lowered(self) -> Any:
        return next(iter(self.editor.unet._programs)).lowered

    @property
    def _sparse_sizes(self) -> set[str]:
        lowered = self._lowered
        layouts = [node.meta["layout"] for node in lowered.dense.graph.nodes if "layout" in node.meta]
        return {size_text(each.size) for each in layouts if each.size and not lowered.config.is_whole(each.size)}


@cache
def tried(kind: str) -> Tried:
    """The kind of a name, made once."""
    return Tried(KINDS[kind])
