"""What is asked of an edit, held to its base before anything is computed."""

from __future__ import annotations

from typing import Any, Literal, get_args

from fisedit_compile.editing.base import Base
from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.masks.user_mask import MaskLike

Combine = Literal["replace", "and", "or"]
Background = Literal["pixels", "latents"]


def check_request(
    base: Any, prompts: tuple[str, ...], mask: MaskLike | None, *, combine: str, background: str, dense: bool
) -> None:
    """Hold what was asked for to the base.

    Raises:
        ValueError: something else than a base; an option of an unknown value; a prompt that is the base's own, or
            another number of prompts than the base has; a mask to be found where no step is there to find it from.
    """
    if not isinstance(base, Base):
        raise ValueError(f"base is of type {type(base).__name__}: pass what editor.generate(...) returned")
    if combine not in get_args(Combine):
        raise ValueError(f"combine={combine!r}: choose 'replace', 'and' or 'or'")
    if combine != "replace" and mask is None:
        raise ValueError(f"combine={combine!r} needs a mask to combine with the one that is found")
    if background not in get_args(Background):
        raise ValueError(f"background={background!r}: choose 'pixels' or 'latents'")
    if not isinstance(dense, bool):
        raise ValueError(f"dense={dense!r}: give True or False")
    if len(prompts) != len(base.prompts):
        raise ValueError(f"{len(prompts)} prompt(s) for a base of {len(base.prompts)}: give one for each")
    if same := [new for old, new in zip(base.prompts, prompts, strict=True) if old == new]:
        raise ValueError(f"the new prompt is the base's own ({same[0]!r}): change at least one word")
    if dense:
        if combine != "replace":
            raise ValueError(f"combine={combine!r}: a dense edit finds no mask to combine one with; leave it out")
        return
    if base.dense_steps == 0 and (mask is None or combine != "replace"):
        raise ValueError("with dense_steps=0 no mask can be found: give a mask, or run some dense steps")
    if base.dense_steps == len(base.visits):
        raise ValueError(
            f"all {len(base.visits)} steps would run dense: lower dense_steps or take more steps (or pass dense=True, "
            "if that is what you want)"
        )


def count_controlled_steps(base: Base, *, dense: bool, cross_replace: Any) -> int:
    """How many of the steps that a dense edit visits take the base's attention maps.

    Args:
        base: of the edit.
        dense: whether all its steps run dense.
        cross_replace: share of these steps, in [0, 1]; None is as many as the base keeps maps of.

    Raises:
        ValueError: a share without ``dense``, or none in [0, 1].
        BaseMismatchError: the base keeps the maps of fewer steps.
    """
    if cross_replace is None:
        return base.controlled_steps
    if not dense:
        raise ValueError(
            f"cross_replace={cross_replace!r}: an edit takes the config's, Editor(pipe, {{'cross_replace': ...}}); "
            "here it belongs to dense=True"
        )
    number = isinstance(cross_replace, int | float) and not isinstance(cross_replace, bool)
    if not number or not 0 <= cross_replace <= 1:
        raise ValueError(f"cross_replace={cross_replace!r}: a share of the steps in [0, 1]")
    steps = len(base.visits)
    controlled = round(cross_replace * steps)
    if controlled > base.controlled_steps:
        raise BaseMismatchError(
            f"cross_replace={cross_replace} needs the attention maps of {controlled} steps, and the base keeps those "
            f"of {base.controlled_steps}: generate it with Editor(pipe, {{'dense_steps': {controlled}, "
            f"'cross_replace': {cross_replace}, 'stride': {base.config.stride!r}}})"
        )
    return controlled
