"""What an edit is held to before anything is computed: its base, and what the pipeline takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fisedit_compile.editing.arguments import call_parameters, check_arguments, one_for_each, refuse_unknown
from fisedit_compile.editing.base import Base
from fisedit_compile.editing.embeddings import EMBEDDINGS, OF_NEGATIVE, OF_PROMPT, changed_embeddings
from fisedit_compile.editing.word_weights import Weights
from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.masks.user_mask import MaskLike

Combine = Literal["replace", "and", "or"]
Output = Literal["pil", "np", "pt", "latent"]
Background = Literal["pixels", "latents"]


#: The pipeline's arguments that an edit may be given other values of; all others are its base's.
_CHANGEABLE = ("guidance_scale", "negative_prompt", "prompt_2", "negative_prompt_2", *EMBEDDINGS)

_OPTIONS = (
    *("base", "prompt", "mask", "weights", "combine", "background", "output_type", "dense", "cross_replace"),
    "callback_on_step_end",
)


def changed_arguments(pipe: Any, base: Base, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the pipeline's call that an edit has other values of than its base.

    Raises:
        ValueError: one that an edit repeats, that the pipeline does not take, or of a wrong type or value; a guidance
            scale that turns guidance on or off, for which the U-Net would be called otherwise than for the base.
    """
    parameters = call_parameters(pipe)
    for name, value in arguments.items():
        if name not in parameters:
            refuse_unknown(name, value, (*_OPTIONS, *parameters), "edit(...) does not take it")
        if name not in _CHANGEABLE:
            raise ValueError(f"{name}: an edit repeats what its base was generated with; generate a base with it")
    check_arguments(pipe, {**base.arguments, **arguments})
    given = one_for_each(base.prompts, arguments)
    words, embeddings = ("negative_prompt", "negative_prompt_2"), OF_NEGATIVE
    for names, others in ((words, embeddings), (embeddings, words)):  # pipelines take one of both
        if any(given.get(name) is not None for name in names):
            given = {**{name: None for name in others if base.arguments.get(name) is not None}, **given}
    before = {name: base.arguments.get(name, parameters[name].default) for name in given}
    changed = {name: value for name, value in given.items() if not _same(value, before[name])}
    if "guidance_scale" in changed and (changed["guidance_scale"] > 1) != (before["guidance_scale"] > 1):
        raise ValueError(
            f"guidance_scale={changed['guidance_scale']}: the base was generated with {before['guidance_scale']}, and "
            "guidance is off up to 1; keep to the base's side of 1, or generate a base with it"
        )
    return changed


def edited_samples(
    base: Base, prompts: Sequence[str], changes: Mapping[str, Any], weights: Sequence[Weights]
) -> list[bool]:
    """Of each prompt, whether an edit changes anything of it; samples whose prompts stay are the base's.

    Args:
        changes: of :func:`changed_arguments`.
        weights: of :func:`~fisedit_compile.editing.word_weights.weights_of_samples`.
    """
    if set(changes) - set(OF_PROMPT):
        return [True] * len(prompts)
    others = changed_embeddings(base.arguments, changes, len(prompts))
    return [
        old != new or bool(weighted) or other
        for old, new, weighted, other in zip(base.prompts, prompts, weights, others, strict=True)
    ]


def check_changed_embeddings(base: Base, prompts: tuple[str, ...], changes: Mapping[str, Any]) -> None:
    """Hold other words to other embeddings, where the base was given such.

    Raises:
        ValueError: words that are others than the base's, and embeddings that are not.
    """
    if base.arguments.get(OF_PROMPT[0]) is None:
        return
    others = changed_embeddings(base.arguments, changes, len(prompts))
    for sample, (old, new) in enumerate(zip(base.prompts, prompts, strict=True)):
        if old != new and not others[sample]:
            raise ValueError(
                f"sample {sample} has other words than the base, {new!r}, and the base's embeddings: its "
                f"{OF_PROMPT[0]} were given, so give those of the new words, or None to have the pipeline encode them"
            )


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.shape == other.shape and torch.equal(value, other.to(value.device))
    return isinstance(value, Tensor) == isinstance(other, Tensor) and bool(value == other)


def check_request(
    base: Base,
    prompts: tuple[str, ...],
    changes: Mapping[str, Any],
    weights: Sequence[Weights],
    mask: MaskLike | None,
    *,
    combine: str,
    largest_mask: float,
    background: str,
    dense: bool,
    controlled: int,
) -> None:
    """Hold what was asked for to the base.

    Args:
        changes: of :func:`changed_arguments`.
        weights: of :func:`~fisedit_compile.editing.word_weights.weights_of_samples`.
        controlled: of :func:`count_controlled_steps`; the others are those of :meth:`~fisedit_compile.Editor.edit`.

    Raises:
        ValueError: an option of an unknown value; prompts that are the base's own though nothing else changes, or
            another number of prompts than the base has, or the base's embeddings for other words; weights without a
            step under control; a mask to be found where no step is there to find it from.
    """
    if combine not in get_args(Combine):
        raise ValueError(f"combine={combine!r}: choose 'replace', 'and' or 'or'")
    if combine != "replace" and mask is None:
        raise ValueError(f"combine={combine!r} needs a mask to combine with the one that is found")
    number = isinstance(largest_mask, int | float) and not isinstance(largest_mask, bool)
    if not number or not 0 < largest_mask <= 1:
        raise ValueError(f"largest_mask={largest_mask!r}: a share of the picture in (0, 1]")
    if background not in get_args(Background):
        raise ValueError(f"background={background!r}: choose 'pixels' or 'latents'")
    if not isinstance(dense, bool):
        raise ValueError(f"dense={dense!r}: give True or False")
    if len(prompts) != len(base.prompts):
        raise ValueError(f"{len(prompts)} prompt(s) for a base of {len(base.prompts)}: give one for each")
    check_changed_embeddings(base, prompts, changes)
    if any(weights) and not controlled:
        raise ValueError(
            "weights are of attention maps in steps under Prompt-to-Prompt control, and this edit has none: generate "
            "the base with cross_replace above 0"
        )
    if prompts == base.prompts and not changes and not any(weights):
        raise ValueError(f"the new prompt is the base's own ({prompts[0]!r}): change at least one word")
    if dense:
        if combine != "replace":
            raise ValueError(f"combine={combine!r}: a dense edit finds no mask to combine one with; leave it out")
        return
    if base.dense_steps == 0 and (mask is None or combine != "replace"):
        raise ValueError("with dense_steps=0 no mask can be found: give a mask, or run some dense steps")
    given = mask is not None and combine == "replace"
    if base.dense_steps == len(base.visits) and not (given and len(base.visits) == 1):
        if len(base.visits) == 1:
            raise ValueError("from a single step no mask can be found: give a mask, or pass dense=True")
        raise ValueError(
            f"all {len(base.visits)} steps would run dense: lower dense_steps or take more steps (or pass dense=True, "
            "if that is what you want)"
        )


def check_output(base: Base, output_type: Any, background: str) -> None:
    """Hold the kind of pictures that was asked for to the base's, where these give the background.

    Raises:
        ValueError: an unknown kind, or another one than the base's pictures.
    """
    if output_type not in (None, *get_args(Output)):
        raise ValueError(f"output_type={output_type!r}: choose 'pil', 'np', 'pt' or 'latent'")
    kind = base.arguments.get("output_type", "pil")
    if output_type not in (None, kind, "latent") and background == "pixels":
        raise ValueError(
            f"output_type={output_type!r}: the base's pictures, which the background is taken from, are {kind!r}; pass "
            "background='latents', or generate a base with it"
        )


def count_controlled_steps(base: Base, cross_replace: Any) -> int | None:
    """How many of the steps that an edit visits take the base's attention maps; None: as the config says.

    Args:
        base: of the edit.
        cross_replace: share of these steps, in [0, 1]; None leaves it to the config.

    Raises:
        ValueError: no share in [0, 1].
        BaseMismatchError: the base keeps the maps of fewer steps.
    """
    if cross_replace is None:
        return None
    number = isinstance(cross_replace, int | float) and not isinstance(cross_replace, bool)
    if not number or not 0 <= cross_replace <= 1:
        raise ValueError(f"cross_replace={cross_replace!r}: a share of the steps in [0, 1]")
    steps = len(base.visits)
    controlled = round(cross_replace * steps)
    if controlled > base.controlled_steps:
        raise BaseMismatchError(
            f"cross_replace={cross_replace} needs the attention maps of {controlled} steps, and the base keeps those "
            f"of {base.controlled_steps}: generate it with Editor(pipe, {{'cross_replace': {cross_replace}, "
            f"'stride': {base.config.stride!r}}})"
        )
    return controlled
