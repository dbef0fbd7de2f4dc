"""The base: a recorded generation, immutable, that any number of edits start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.packed_base import PackedBase
from fisedit_compile.cache.write_base import write_base
from fisedit_compile.config import SparsityConfig
from fisedit_compile.editing.pack_base import pack
from fisedit_compile.editing.photo_frame import PhotoFrame
from fisedit_compile.editing.pipeline_state import PipelineState
from fisedit_compile.editing.recorded_call import RecordedCall
from fisedit_compile.editing.schedule import Schedule
from fisedit_compile.editing.stride import SolverStep
from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.vae.decoded import Decoded


@dataclass(frozen=True, eq=False)
class Base:
    """A generation and everything that its edits read. Made by :meth:`fisedit_compile.Editor.generate`.

    It shares no tensor with whoever called, holds no pipeline, model or callback, and pickles, deep-copies and saves.

    Attributes:
        images: what the pipeline returned, one picture a sample (PIL images unless ``output_type`` said otherwise).
        nsfw: of each picture, whether the safety checker blackened it; None without a checker.
        prompts: the prompt of each sample, before ``num_images_per_prompt``.
        step_latents: the latents after each denoising step, each ``[n, c, h, w]``.
        arguments: copies of the pipeline's other arguments, which an edit repeats.
        generators: state and device of each random generator before the first draw.
        calls: what each U-Net call keeps.
        pipeline: the models and tokenizers that the base was made with.
        schedule: the scheduler that it was made with.
        visits: the steps that an edit makes, as positions among all; see :mod:`fisedit_compile.editing.stride`.
        solver_steps: what the scheduler was given at each of the visited dense steps, where edits do not visit all, or
            where the base is a picture that the model did not draw.
        callback: the name of the callback given to ``generate`` and what it changed within the loop; empty if nothing.
        config: the editor's; it decides what was kept.
        seconds: wall time of the generation.
        unet_ms: wall time of each U-Net call, recording included.
        pictures: a copy of ``images``, for edits to take their background from whatever is drawn into ``images``; with
            a frame, what the model sees of them.
        frame: where the model's pictures lie in ``images``, photos of a size that it does not take; None where they are
            the same.
        decoded: what edits read of the VAE's decoder; None where they decode their whole pictures.
    """

    images: Any
    nsfw: tuple[bool, ...] | None
    prompts: tuple[str, ...]
    step_latents: tuple[Tensor, ...]
    arguments: Mapping[str, Any]
    generators: tuple[tuple[Tensor, torch.device], ...]
    calls: tuple[RecordedCall, ...]
    pipeline: PipelineState
    schedule: Schedule
    visits: tuple[int, ...]
    solver_steps: tuple[SolverStep, ...] = field(repr=False)
    callback: str
    config: SparsityConfig
    seconds: float
    unet_ms: tuple[float, ...] = field(repr=False)
    pictures: Any = field(repr=False)
    frame: PhotoFrame | None = field(repr=False)
    decoded: Decoded | None = field(repr=False)

    @property
    def image(self) -> Any:
        """The picture of the first sample."""
        return self.images[0]

    @property
    def latents(self) -> Tensor:
        """The final latents ``[n, c, h, w]``, as they went into the VAE's decoder before its scaling."""
        return self.step_latents[-1]

    @property
    def timesteps(self) -> Tensor:
        """Of the scheduler, one a step, on the CPU."""
        return self.schedule.timesteps

    @property
    def num_inference_steps(self) -> int:
        return len(self.step_latents)

    @property
    def dense_steps(self) -> int:
        """Steps that an edit of this base runs dense before its mask is known."""
        return self.config.count_dense_steps(len(self.visits))

    @property
    def controlled_steps(self) -> int:
        """Steps of an edit whose attention maps the base keeps, for Prompt-to-Prompt control: the first ones."""
        return self.config.count_controlled_steps(len(self.visits))

    @property
    def tier(self) -> str:
        """Where what it keeps of the U-Net lies: ``"device"`` (of its latents), ``"host"`` memory or ``"disk"``."""
        if any(call.stays_on_disk for call in self.calls):
            return "disk"
        devices = {call.device for call in self.calls} - {None, self.latents.device}
        return "host" if devices else "device"

    @property
    def visits_all(self) -> bool:
        """Whether an edit visits every step."""
        return len(self.visits) == self.num_inference_steps

    def latents_after(self, visit: int) -> Tensor:
        """The base's latents ``[n, c, h, w]`` where the ``visit``-th step of an edit leads to."""
        return self.step_latents[self.visits[visit + 1] - 1 if visit + 1 < len(self.visits) else -1]

    @property
    def nbytes(self) -> int:
        """Memory of everything kept for edits, or on its way from the disk; without what stays there."""
        decoder = 0 if self.decoded is None else self.decoded.nbytes
        latents = sum(latents.nbytes for latents in self.step_latents)
        return sum(call.nbytes for call in self.calls) + latents + decoder

    def wait(self) -> None:
        """Wait until a base that was loaded is in memory as a whole, and nothing of its folder is needed any more.

        One that stays on the disk lets go of what edits left in memory, and needs its folder until it is let go of.

        Raises:
            BaseMemoryError: there is no memory left for it.
            BaseStorageError: the file system does not give a file.
            DamagedBaseError: a file is not what was written.
            SavedBaseError: it was not read to its end, in a process that was forked meanwhile, or that ends.
        """
        for call in self.calls:
            call.wait()

    def save(self, folder: str | Path) -> None:
        """Write the base to disk, whole or not at all; :meth:`fisedit_compile.Editor.load` reads it.

        Args:
            folder: where it will lie: one that is not there yet, or empty; those above it are made.

        Raises:
            SavedBaseError: something lies there already, or an argument of the pipeline cannot be kept.
            BaseStorageError: the file system is full, read-only or forbidden; nothing is left of what was written.
            BaseMemoryError, DamagedBaseError: the base is still being read itself, see :meth:`wait`.
        """
        write_base(self.pack(), Path(folder))

    def pack(self) -> PackedBase:
        """The base as it is written to disk.

        Raises:
            SavedBaseError: an argument of the pipeline that cannot be kept, by name.
        """
        return pack(self)

    def rewound_generators(self) -> list[torch.Generator]:
        """Fresh random generators in the state in which the base drew its first noise."""
        return rewound(self.generators)

    def check(self, pipeline: PipelineState, schedule: Schedule, config: SparsityConfig) -> None:
        """Hold a base to the editor that is asked to edit it, before its scheduler's timesteps are set.

        Raises:
            BaseMismatchError: another model, tokenizer, scheduler or config than the base was made with.
        """
        if config != self.config:
            raise BaseMismatchError(
                f"the base was kept for {self.config}, this editor has {config}: use one config for both"
            )
        if difference := self.schedule.difference(schedule, tables=False):
            raise BaseMismatchError(
                f"the scheduler {difference} than for the base: restore pipe.scheduler, or generate the base again"
            )
        if difference := self.pipeline.difference(pipeline):
            raise BaseMismatchError(
                f"the base was generated with another {difference}: restore it, or generate the base again"
            )

    def check_schedule(self, schedule: Schedule) -> None:
        """Hold the scheduler to the base's once its timesteps are set, before the first step.

        Raises:
            BaseMismatchError: other timesteps or noise levels.
        """
        if difference := self.schedule.difference(schedule):
            raise BaseMismatchError(
                f"the scheduler {difference} than for the base: restore pipe.scheduler, or generate the base again"
            )


def rewound(states: Sequence[tuple[Tensor, torch.device]]) -> list[torch.Generator]:
    """Fresh random generators in given states, each with its device."""
    generators = []
    for state, device in states:
        generator = torch.Generator(device)
        generator.set_state(state)
        generators.append(generator)
    return generators
