"""The noise of several bases in one call of a pipeline: each draws its own, as it did alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.editing.edit_request import CheckedEdit
from fisedit_compile.errors import BaseMismatchError


class BatchNoise:
    """Random generators for the samples of several edits.

    A pipeline takes one generator for each sample. The first noise of a base is drawn by its own call of the pipeline's
    ``prepare_latents``, since one generator may have drawn that of all its samples.

    Args:
        edits: whose bases' noise is to be drawn again.

    Attributes:
        generators: one for each sample, for the pipeline's call.
    """

    def __init__(self, edits: Sequence[CheckedEdit]) -> None:
        self._edits = tuple(edits)
        self._own = [edit.base.rewound_generators() for edit in edits]
        self.generators: list[torch.Generator] = []
        # Stand-ins for a generator of several samples, which cannot draw for each of them what it draws for all.
        self._idle: list[tuple[int, torch.Generator, Tensor]] = []
        for edit, own in zip(edits, self._own, strict=True):
            if len(own) == edit.samples:
                self.generators += own
                continue
            for _ in range(edit.samples):
                idle = torch.Generator(own[0].device)
                self._idle.append((edit.index, idle, idle.get_state()))
                self.generators.append(idle)

    def serve(self, pipe: Any) -> None:
        """Let a pipeline of one call draw its first noise here.

        Raises:
            ValueError: a pipeline that makes its first latents of pictures.
        """
        prepare = pipe.prepare_latents
        parameters = inspect.signature(prepare).parameters
        if not {"batch_size", "generator", "latents"} <= set(parameters) or "image" in parameters:
            raise ValueError(f"{type(pipe).__name__} starts from pictures: make its edits one by one")

        def prepare_each(*args: Any, **kwargs: Any) -> Tensor:
            given = inspect.signature(prepare).bind(*args, **kwargs).arguments
            latents = []
            for edit, own in zip(self._edits, self._own, strict=True):
                generator = own[0] if len(own) == 1 else own
                first = edit.base.arguments.get("latents")
                mine = {"batch_size": edit.samples, "generator": generator, "latents": first}
                latents.append(prepare(**{**given, **mine}))
            return torch.cat(latents)

        # Not by setattr, which pipelines watch.
        vars(pipe)["prepare_latents"] = prepare_each

    def check(self) -> None:
        """Called behind each step.

        Raises:
            BaseMismatchError: the step drew noise for samples of a base that have one generator together.
        """
        for index, generator, before in self._idle:
            if not torch.equal(generator.get_state(), before):
                raise BaseMismatchError(
                    f"edit {index}: its base drew the noise of several pictures from one generator, step by step. That "
                    "cannot be repeated beside others: make it alone, or generate the base with a generator for each"
                )
