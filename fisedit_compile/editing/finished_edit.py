"""An edit of a run that has ended: its pictures, its report, and what it takes to edit it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fisedit_compile.editing.arguments import owned
from fisedit_compile.editing.background import PixelBackground
from fisedit_compile.editing.edit_run import EditRun
from fisedit_compile.editing.pipeline_state import PipelineState
from fisedit_compile.editing.result import Edit, EditReport
from fisedit_compile.editing.rounds import Trajectory
from fisedit_compile.editing.running_edit import RunningEdit
from fisedit_compile.utils.frozen_mapping import FrozenMapping


@dataclass(frozen=True)
class Drawn:
    """What a pipeline drew in a run of edits.

    Attributes:
        images: one for each sample of all edits, as the pipeline returned them.
        nsfw: of each, whether the safety checker blackened it; None without a checker.
        seconds: wall time of the run.
    """

    images: Any
    nsfw: tuple[bool, ...] | None
    seconds: float

    def of(self, first: int, end: int) -> tuple[Any, tuple[bool, ...] | None]:
        """Pictures and flags of some samples."""
        return self.images[first:end], None if self.nsfw is None else self.nsfw[first:end]


def finished_edit(
    run: EditRun,
    edit: RunningEdit,
    drawn: Drawn,
    keep: PixelBackground | None,
    state: PipelineState,
    output: dict[str, Any],
) -> Edit:
    """An edit of a run.

    Args:
        run: it has ended.
        edit: one of its edits.
        drawn: the pictures of all of them.
        keep: how they are put together with the base's; None where they are not.
        state: of the pipeline's models.
        output: the pipeline's argument ``output_type``, where it was another one than the base's.
    """
    asked, base = edit.asked, edit.base
    images, nsfw = drawn.of(*run.span(edit))
    uncomposed: tuple[int, ...] = ()
    if keep is not None:
        flags = {"base_flags": base.nsfw, "edit_flags": nsfw}
        images, uncomposed = keep.compose(base.pictures, images, edit.host_mask, **flags)
    if base.frame is not None and output.get("output_type") != "latent":
        images = base.frame.restored(images)
    latents = run.latents_of(edit)
    report = EditReport.of(
        run,
        edit,
        latents[-1],
        seconds=drawn.seconds,
        background="latents" if keep is None else "pixels",
        uncomposed=uncomposed,
    )
    trajectory = Trajectory(
        prompts=asked.prompts,
        arguments=FrozenMapping({**base.arguments, **owned({**asked.changes, **output})}),
        generators=base.generators,
        pipeline=state.of_prompts(run.pipe, asked.prompts),
        schedule=base.schedule,
        steps=base.num_inference_steps,
        visits=base.visits,
        latents=latents,
        config=base.config,
        callback=run.callback_changes,
        frame=base.frame,
    )
    return Edit(images, nsfw, edit.mask, latents[-1], report, trajectory)
