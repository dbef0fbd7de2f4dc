"""Makes the edits of one run of a pipeline, from what was asked for to what is returned."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fisedit_compile.cache.host_tier import Staging
from fisedit_compile.editing.arguments import owned
from fisedit_compile.editing.background import PixelBackground
from fisedit_compile.editing.base import Base
from fisedit_compile.editing.batch_arguments import batch_arguments, batch_prompts
from fisedit_compile.editing.batch_noise import BatchNoise
from fisedit_compile.editing.decoding import Decoders
from fisedit_compile.editing.dense_edit import DenseEdit
from fisedit_compile.editing.edit_request import CheckedEdit
from fisedit_compile.editing.edit_run import EditRun, NothingLeftError
from fisedit_compile.editing.failures import Failures
from fisedit_compile.editing.pipeline_state import PipelineState, PipelineWatch
from fisedit_compile.editing.result import Edit, EditReport
from fisedit_compile.editing.rounds import Trajectory
from fisedit_compile.editing.running_edit import RunningEdit
from fisedit_compile.editing.schedule import Schedule
from fisedit_compile.editing.step_callback import BatchCallback, StepCallback
from fisedit_compile.editing.text_memo import TextMemo
from fisedit_compile.runtime.model_state import ModelState
from fisedit_compile.utils.frozen_mapping import FrozenMapping

#: How the pictures of each edit are put together with its base's; None where they are not.
Backgrounds = Mapping[RunningEdit, PixelBackground | None]


@dataclass(frozen=True)
class _Pictures:
    """Of one edit, as they are returned; see :class:`~fisedit_compile.editing.result.Edit`."""

    images: Any
    nsfw: tuple[bool, ...] | None
    uncomposed: tuple[int, ...]


class EditMaker:
    """Makes the edits of an editor, one run at a time.

    Args:
        watch, decoders, texts: of the editor.
    """

    def __init__(self, watch: PipelineWatch, decoders: Decoders, texts: TextMemo) -> None:
        self._watch, self._decoders, self._texts = watch, decoders, texts
        self._staging: Staging | None = None

    def make(
        self,
        pipe: Any,
        run: EditRun,
        unet: ModelState,
        edits: Sequence[CheckedEdit],
        failures: Failures,
        *,
        composed: bool,
        output: Mapping[str, Any],
    ) -> dict[int, Edit]:
        """The edits by their places, without those that fail.

        Args:
            pipe: the pipeline.
            run: which will make them.
            unet: the state of the U-Net.
            edits: what was asked for; their bases fit together.
            failures: of the edits.
            composed: whether pictures have the base's pixels as their background.
            output: the pipeline's argument ``output_type``, where it is not the bases' own.
        """
        state = self._watch.look(run.pipe, unet, edits[0].base.prompts)
        schedule, config = Schedule.of(pipe.scheduler), run.unet.sparsity
        backgrounds: dict[RunningEdit, PixelBackground | None] = {}
        for asked in edits:
            base = asked.base
            with failures.of(asked.index):
                edit = (DenseEdit if asked.dense else RunningEdit)(run.pipe, asked)
                base.check(state.of_prompts(run.pipe, base.prompts), schedule, config)
                keep = None
                if composed:
                    keep = PixelBackground.of(pipe, base.pictures, base.latents, base.arguments)
                edit.decoding = self._decoders.editing(pipe, state, base, keep)
                backgrounds[edit] = keep
        return self._made(pipe, run, backgrounds, state, output) if backgrounds else {}

    def _made(
        self, pipe: Any, run: EditRun, backgrounds: Backgrounds, state: PipelineState, output: Mapping[str, Any]
    ) -> dict[int, Edit]:
        asked = [edit.asked for edit in backgrounds]
        first = asked[0].base
        run.make(list(backgrounds))
        run.staging = self._staging_for([each.base for each in asked])
        if any(each.callback for each in asked):
            parts = [(each.callback, run.span(edit)) for edit, each in zip(backgrounds, asked, strict=True)]
            run.callback = StepCallback(BatchCallback(parts), None, pipe)
        start = time.perf_counter()
        if len(asked) == 1:
            prompts, generators, arguments = list(asked[0].prompts), first.rewound_generators(), asked[0].arguments
        else:
            noise = BatchNoise(asked)
            noise.serve(run.pipe)
            run.check_noise = noise.check
            prompts, generators, arguments = batch_prompts(asked), noise.generators, batch_arguments(asked)
        # Where an edit visits all steps, as many as were asked for: Heun's scheduler makes two of each.
        steps = first.arguments["num_inference_steps"] if first.visits_all else len(first.visits)
        repeated = owned({**arguments, **output, "num_inference_steps": steps})
        self._texts.serve(run.pipe, state.models, repeated)
        try:
            images, nsfw = run.draw(prompts, generators, repeated)
        except NothingLeftError:
            return {}
        pictures = {
            edit: _pictures(run, edit, images, nsfw, keep, output)
            for edit, keep in backgrounds.items()
            if not edit.failed
        }
        seconds = time.perf_counter() - start
        return {
            edit.asked.index: _edit(run, edit, each, seconds, backgrounds[edit], state, output)
            for edit, each in pictures.items()
        }

    def _staging_for(self, bases: Sequence[Base]) -> Staging | None:
        """What brings the calls of bases in host memory to the device; kept, as its memory serves all edits."""
        if all(base.tier == "device" for base in bases):
            return None
        device: torch.device = bases[0].latents.device
        if self._staging is None or self._staging.device != device:
            self._staging = Staging(device)
        return self._staging


def _pictures(
    run: EditRun,
    edit: RunningEdit,
    images: Any,
    nsfw: tuple[bool, ...] | None,
    keep: PixelBackground | None,
    output: Mapping[str, Any],
) -> _Pictures:
    """The pictures of an edit, of those that the pipeline returned for all."""
    first, end = run.span(edit)
    images, nsfw = images[first:end], None if nsfw is None else nsfw[first:end]
    base = edit.base
    uncomposed: tuple[int, ...] = ()
    if keep is not None:
        flags = {"base_flags": base.nsfw, "edit_flags": nsfw}
        images, uncomposed = keep.compose(base.pictures, images, edit.final_mask, **flags)
    if base.frame is not None and output.get("output_type") != "latent":
        images = base.frame.restored(images)
    return _Pictures(images, nsfw, uncomposed)


def _edit(
    run: EditRun,
    edit: RunningEdit,
    pictures: _Pictures,
    seconds: float,
    keep: PixelBackground | None,
    state: PipelineState,
    output: Mapping[str, Any],
) -> Edit:
    """An edit of a run that has ended."""
    asked, base, latents = edit.asked, edit.base, run.latents_of(edit)
    report = EditReport.of(
        run,
        edit,
        latents[-1],
        seconds=seconds,
        background="latents" if keep is None else "pixels",
        uncomposed=pictures.uncomposed,
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
    return Edit(pictures.images, pictures.nsfw, edit.mask, latents[-1], report, trajectory)
