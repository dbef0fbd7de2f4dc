"""What a service's settings are to an editor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fisedit_compile.editing.edit_request import EditRequest
from fisedit_compile.editing.pipeline_call import in_turn
from fisedit_compile.errors import PipelineInterruptedError
from fisedit_compile.serving.partial_pictures import StepWatch
from fisedit_compile.serving.picture_files import of_png
from fisedit_compile.serving.requests import Settings

if TYPE_CHECKING:
    from fisedit_compile.editing.base import Base
    from fisedit_compile.editing.editor import Editor
    from fisedit_compile.editing.result import Edit


class Artist:
    """Draws by settings, the same picture each time.

    Args:
        editor: the editor.
    """

    def __init__(self, editor: Editor) -> None:
        self._editor = editor

    def new_picture(self, prompt: str, settings: Settings, seed: int, steps: StepWatch | None) -> Base:
        """The base of a new picture, whose noise is that of a seed; ``steps`` watches it being drawn."""
        return self._editor.generate(prompt, **_arguments(settings, seed, steps))

    def unrecorded(self, prompt: str, settings: Settings, seed: int, steps: StepWatch | None) -> tuple[Any, Any]:
        """A new picture that no base is kept of, by the pipeline as it is, and what its safety checker says of it.

        Raises:
            PipelineInterruptedError: ``pipe._interrupt`` was set.
        """
        pipe = self._editor.pipe
        with in_turn(pipe):
            output = pipe(prompt, **_arguments(settings, seed, steps))
            if getattr(pipe, "_interrupt", False):  # its loop has ended early, and what it had was decoded
                raise PipelineInterruptedError("stopped before the last step")
        return output.images[0], getattr(output, "nsfw_content_detected", None)

    def invert(self, photo: bytes, prompt: str, settings: Settings) -> Base:
        """The base of a picture that the editor did not draw, PNG, whose size is the settings'."""
        return self._editor.invert(
            of_png(photo), prompt, num_inference_steps=settings.steps, guidance_scale=settings.guidance
        )

    def edit(self, request: EditRequest) -> Edit:
        """A picture with other words."""
        [edit] = self._editor.edit_many([request])
        return edit

    def request(
        self,
        base: Base,
        prompt: str,
        mask: bytes | None,
        before: Settings,
        after: Settings,
        steps: StepWatch | None = None,
        *,
        largest_mask: float = 1.0,
        cross_replace: float | None = None,
    ) -> EditRequest:
        """A picture with other words, within a mask (PNG) or one that is found.

        Args:
            base, before: of the picture, and its settings.
            prompt, after: of the edit; the settings may differ in guidance and negative prompt.
            mask: where to edit; None has it found.
            steps: watches.
            largest_mask: share of the picture that a mask which is found may cover.
            cross_replace: see :meth:`fisedit_compile.Editor.edit`.
        """
        changes: dict[str, Any] = {}
        if after.guidance != before.guidance:
            changes["guidance_scale"] = after.guidance
        if after.negative_prompt != before.negative_prompt:
            changes["negative_prompt"] = after.negative_prompt or None
        given = None if mask is None else of_png(mask)
        changes |= step_callback(steps, len(base.visits))
        return EditRequest(base, prompt, given, largest_mask=largest_mask, cross_replace=cross_replace, **changes)


def _arguments(settings: Settings, seed: int, steps: StepWatch | None) -> dict[str, Any]:
    """Of a pipeline's or an editor's call for a new picture."""
    return {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "generator": torch.Generator().manual_seed(seed),  # on the CPU: the same noise for every device
        "negative_prompt": settings.negative_prompt or None,
        "width": settings.width,
        "height": settings.height,
        **step_callback(steps, settings.steps),
    }


def step_callback(steps: StepWatch | None, count: int) -> dict[str, Any]:
    """The arguments of an editor's call by which ``count`` steps are watched."""
    return {} if steps is None else {"callback_on_step_end": steps.of(count)}
