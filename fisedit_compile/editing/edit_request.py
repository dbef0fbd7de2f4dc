"""An edit as it is asked for, and as it is when it was held to its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fisedit_compile.editing.arguments import check_prompts, without_return_dict
from fisedit_compile.editing.base import Base
from fisedit_compile.editing.edit_checks import (
    Combine,
    changed_arguments,
    check_output,
    check_request,
    count_controlled_steps,
)
from fisedit_compile.editing.embeddings import check_as_many_tokens, check_embeddings
from fisedit_compile.editing.word_weights import Weights, weights_of_samples
from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.masks.user_mask import MaskLike, as_mask

if TYPE_CHECKING:
    from fisedit_compile.editing.result import Edit

#: Arguments of :meth:`fisedit_compile.Editor.edit` that edits which are made together do not have of their own.
_OF_ALL = ("background", "output_type")
_ALONE = ("dense", "callback_on_step_end_tensor_inputs")


class EditRequest:
    """One of the edits that :meth:`fisedit_compile.Editor.edit_many` makes together.

    Args:
        base, prompt, mask, weights, combine, largest_mask, cross_replace, arguments: as
            :meth:`fisedit_compile.Editor.edit` takes them.
        callback_on_step_end: as pipelines take it; it is given the latents of this edit's samples, and may return
            others. What it changes of the pipeline is changed for all edits.

    Raises:
        ValueError: an argument that all edits have in common, or that an edit takes alone.
    """

    def __init__(
        self,
        base: Base | Edit,
        prompt: str | Sequence[str],
        mask: MaskLike | None = None,
        *,
        weights: Weights | Sequence[Weights | None] | None = None,
        combine: Combine = "replace",
        largest_mask: float = 1.0,
        cross_replace: float | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        **arguments: Any,
    ) -> None:
        for name in arguments:
            if name in _OF_ALL:
                raise ValueError(f"{name} is the same for all edits: give it to edit_many(...) itself")
            if name in _ALONE:
                raise ValueError(f"{name} is of an edit that is made alone: give it to edit(...)")
        self.base, self.prompt, self.mask, self.weights = base, prompt, mask, weights
        self.combine: Combine = combine
        self.largest_mask, self.cross_replace = largest_mask, cross_replace
        self.callback, self.arguments = callback_on_step_end, arguments


@dataclass(frozen=True, eq=False)
class CheckedEdit:
    """What an edit is to make of its base.

    Attributes:
        index: its place among those that are made together.
        base: the base.
        prompts: the new ones, one for each of the base's.
        changes: the pipeline's arguments that are others than the base's.
        weights: of words, one mapping a prompt.
        given: the user's mask, bool ``[n, h, w]`` at latent resolution, on the host; None has it found.
        combine, largest_mask: see :meth:`fisedit_compile.Editor.edit`.
        dense: whether all steps run dense.
        controlled: how many of its steps are controlled; None: as the config says.
        callback: see :class:`EditRequest`.
    """

    index: int
    base: Base
    prompts: tuple[str, ...]
    changes: Mapping[str, Any]
    weights: tuple[Weights, ...]
    given: Tensor | None
    combine: Combine
    largest_mask: float
    dense: bool = False
    controlled: int | None = None
    callback: Callable[..., Any] | None = None

    @classmethod
    def of(
        cls,
        pipe: Any,
        request: EditRequest,
        base: Base,
        index: int,
        *,
        background: str,
        output_type: Any,
        has_callback: bool,
        dense: bool,
    ) -> CheckedEdit:
        """A request, held to its base.

        Args:
            pipe: the pipeline.
            request: what is asked for.
            base: of the request, or recorded of the edit that the request names.
            index: see the attribute.
            background, output_type, dense: see :meth:`fisedit_compile.Editor.edit`.
            has_callback: whether the edit runs a callback, of the request or beside it.

        Raises:
            BaseMismatchError, MaskError, ValueError: see :meth:`fisedit_compile.Editor.edit`.
        """
        if not isinstance(base, Base):
            raise ValueError(f"base is of type {type(base).__name__}: pass what editor.generate(...) returned")
        prompts = check_prompts(request.prompt)
        changes = changed_arguments(pipe, base, without_return_dict(request.arguments))
        weights = weights_of_samples(request.weights, len(prompts))
        controlled = count_controlled_steps(base, request.cross_replace)
        check_request(
            base,
            prompts,
            changes,
            weights,
            request.mask,
            combine=request.combine,
            largest_mask=request.largest_mask,
            background=background,
            dense=dense,
            controlled=base.controlled_steps if controlled is None else controlled,
        )
        check_embeddings(pipe, prompts, {**base.arguments, **changes}, controlled=base.controlled_steps > 0)
        check_as_many_tokens(pipe, base.arguments, changes)
        check_output(base, output_type, background)
        if base.callback and not has_callback:
            raise BaseMismatchError(
                f"the base was generated with the callback {base.callback}: give edit the same callback_on_step_end"
            )
        given = None if request.mask is None else _as_given(base, request.mask)
        return cls(
            index=index,
            base=base,
            prompts=prompts,
            changes=changes,
            weights=weights,
            given=given,
            combine=request.combine,
            largest_mask=request.largest_mask,
            dense=dense,
            controlled=controlled,
            callback=request.callback,
        )

    @property
    def samples(self) -> int:
        """Pictures of the edit."""
        return len(self.base.latents)

    @property
    def copies(self) -> int:
        """Pictures of each prompt (``num_images_per_prompt``), which lie behind each other."""
        return self.samples // len(self.prompts)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call, as a base of the edit keeps them."""
        return {**self.base.arguments, **self.changes}

    @property
    def mask_source(self) -> str:
        """See :attr:`~fisedit_compile.editing.result.EditReport.mask_source`."""
        if self.given is None:
            return "none" if self.dense else "found"
        return "given" if self.combine == "replace" else f"found {self.combine} given"


def _as_given(base: Base, mask: MaskLike) -> Tensor:
    samples, _, height, width = base.latents.shape
    if base.frame is not None:
        mask = base.frame.mask_of_model(mask, (height, width))
    return as_mask(mask, samples=samples, size=(height, width), device="cpu")
