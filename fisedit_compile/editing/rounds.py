"""A base of a picture whose latents are known already at the steps that edits visit: an edit's, or an inverted photo's.

It is recorded along these latents, which takes one dense U-Net call a visited step, and gives what generating a base
along them would give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.config import SparsityConfig
from fisedit_compile.editing.base import Base, rewound
from fisedit_compile.editing.disk_record import DiskRecord
from fisedit_compile.editing.own_tokenizers import OwnTokenizers
from fisedit_compile.editing.photo_frame import PhotoFrame
from fisedit_compile.editing.pipeline_state import PipelineState
from fisedit_compile.editing.record_run import RecordRun
from fisedit_compile.editing.schedule import Schedule
from fisedit_compile.editing.stride import visit
from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.sparse_unet import SparseUNet
from fisedit_compile.utils.frozen_mapping import FrozenMapping


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What an edit went through, without the base that it was made from; or a photo, backwards.

    Attributes:
        prompts: of the picture, one a sample.
        arguments: of the pipeline's call, as a base of the picture keeps them.
        generators: state and device of each random generator before the first draw.
        pipeline: the models and tokenizers.
        schedule: the scheduler with all timesteps of the base.
        steps: how many the base made, or would make.
        visits: the steps that were visited, as positions among these.
        latents: behind each visited step, ``[n, c, h, w]`` each.
        config: the editor's.
        callback: a user's callback that changed the edit's loop, by name; empty without one.
        frame: where the model's pictures lie in the edit's, of a photo of another size; None where they are these.
    """

    prompts: tuple[str, ...]
    arguments: Mapping[str, Any]
    generators: tuple[tuple[Tensor, torch.device], ...]
    pipeline: PipelineState
    schedule: Schedule
    steps: int
    visits: tuple[int, ...]
    latents: tuple[Tensor, ...]
    config: SparsityConfig
    callback: str
    frame: PhotoFrame | None

    def check(self, pipeline: PipelineState, schedule: Schedule, config: SparsityConfig) -> None:
        """Hold an edit to the editor that is asked to edit it again.

        Raises:
            BaseMismatchError: another model, tokenizer, scheduler or config than the edit was made with, or a callback
                that changed its loop, and would have to change that of the recording.
        """
        if self.callback:
            raise BaseMismatchError(
                f"the edit was made with the callback {self.callback}, and its picture cannot be recorded without: "
                "edit the base with all words at once, or leave the callback out"
            )
        if config != self.config:
            raise BaseMismatchError(f"the edit was made with {self.config}, this editor has {config}: use one for both")
        if difference := self.schedule.difference(schedule, tables=False):
            raise BaseMismatchError(
                f"the scheduler {difference} than for the edit: restore pipe.scheduler, or edit again"
            )
        if difference := self.pipeline.difference(pipeline):
            raise BaseMismatchError(f"the edit was made with another {difference}: restore it, or edit again")


class RebaseRun(RecordRun):
    """Records a picture at the steps that were visited, each from the latents that it started from.

    Args:
        unet, pipe, tokenizers: see :class:`~fisedit_compile.editing.pipeline_run.PipelineRun`.
        made: what the picture went through.
        disk: see :class:`~fisedit_compile.editing.record_run.RecordRun`.
    """

    def __init__(
        self,
        unet: SparseUNet,
        pipe: Any,
        tokenizers: OwnTokenizers,
        made: Trajectory,
        disk: DiskRecord | None = None,
    ) -> None:
        self._made = made
        visits_all = len(made.visits) == made.steps
        steps = made.arguments["num_inference_steps"] if visits_all else len(made.visits)
        arguments = {**made.arguments, "num_inference_steps": steps}
        super().__init__(unet, pipe, tokenizers, None, made.config, arguments, made.latents, disk)
        if not visits_all:
            visit(self.pipe.scheduler, made.steps, made.visits, lambda: None)

    def choose_visits(self) -> tuple[int, ...]:
        return tuple(range(len(self._made.visits)))

    @property
    def base_step(self) -> int:
        return self._made.visits[self.step]

    def rebase(self, state: PipelineState, images: Any, nsfw: tuple[bool, ...] | None) -> Base:
        """The base of the picture.

        Args:
            state: of the pipeline's models.
            images, nsfw: the pictures, which are not decoded again, and what the safety checker said of them.
        """
        made = self._made
        frame = None if made.frame is None else replace(made.frame, photos=tuple(images))
        recorded = self.record(made.prompts, rewound(made.generators), state, images, frame)
        return replace(
            recorded,
            nsfw=nsfw,
            step_latents=_of_all_steps(made),
            arguments=FrozenMapping(made.arguments),
            generators=made.generators,
            schedule=made.schedule,
            visits=made.visits,
        )


def _of_all_steps(made: Trajectory) -> tuple[Tensor, ...]:
    """Latents behind each step of a base; nobody reads those of steps that edits do not visit."""
    ends = (*made.visits[1:], made.steps)  # the steps behind those that each visited one stands for
    spans = zip(made.latents, made.visits, ends, strict=True)
    return tuple(latents for latents, first, end in spans for _ in range(first, end))
