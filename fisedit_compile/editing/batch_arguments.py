"""What the pipeline is called with for several edits at a time, and which edits can be made so.

A pipeline takes words, embeddings and generators of each sample, and one of everything else. So the bases need to have
the same of that: size, steps, scheduler, guidance, and whatever else they were generated with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisedit_compile.editing.arguments import call_parameters
from fisedit_compile.editing.edit_request import CheckedEdit
from fisedit_compile.editing.embeddings import EMBEDDINGS
from fisedit_compile.editing.schedule import OWN_SEED

#: Arguments that say what the latents' shape says.
_SIZES = ("height", "width")

#: Arguments that each edit has its own of, and that are put together otherwise.
_PER_SAMPLE = ("negative_prompt", "prompt_2", "negative_prompt_2", *EMBEDDINGS, "num_images_per_prompt", "latents")


def check_together(pipe: Any, edits: Sequence[CheckedEdit]) -> None:
    """Hold the bases of several edits to each other.

    Raises:
        ValueError: a difference that keeps two edits from being made together, or a base that has to be edited alone,
            each by the edit's place.
    """
    if len(edits) < 2:
        return
    first = edits[0]
    for edit in edits:
        if edit.base.callback:
            raise ValueError(
                f"edit {edit.index}: its base was generated with the callback {edit.base.callback}: make it alone"
            )
        if edit.base.schedule.config.get(OWN_SEED) is not None:
            raise ValueError(
                f"edit {edit.index}: {edit.base.schedule.name} draws the noise of a whole batch from a seed of its "
                "own: make it alone"
            )
        if edit is not first and (difference := _difference(pipe, first, edit)):
            raise ValueError(f"edit {edit.index} cannot be made together with edit {first.index}: {difference}")


def batch_prompts(edits: Sequence[CheckedEdit]) -> list[str]:
    """The prompt of each sample."""
    return [prompt for edit in edits for prompt in _each(edit, edit.prompts)]


def batch_arguments(edits: Sequence[CheckedEdit]) -> dict[str, Any]:
    """The arguments of the pipeline's call, but for the words of the prompt and the noise.

    Args:
        edits: several, of :func:`check_together`.
    """
    arguments = {name: value for name, value in edits[0].arguments.items() if name not in _PER_SAMPLE}
    given = [edit.arguments for edit in edits]
    for name in EMBEDDINGS:
        if given[0].get(name) is not None:
            parts = [each[name].repeat_interleave(edit.copies, 0) for each, edit in zip(given, edits, strict=True)]
            arguments[name] = torch.cat([part.to(parts[0]) for part in parts])
    for name in ("negative_prompt", "prompt_2", "negative_prompt_2"):
        if any(each.get(name) is not None for each in given):
            arguments[name] = [word for edit in edits for word in _each(edit, _words(edit, name))]
    return arguments


def _each(edit: CheckedEdit, of_prompts: Sequence[str]) -> list[str]:
    """Something of each prompt for each of its pictures."""
    return [word for word in of_prompts for _ in range(edit.copies)]


def _words(edit: CheckedEdit, name: str) -> Sequence[str]:
    """Words of each prompt, as the pipeline takes them where they are not given."""
    given, nothing = edit.arguments, [""] * len(edit.prompts)
    if given.get(name) is not None:
        words: Sequence[str] = given[name]
        return words
    if name == "prompt_2":
        return edit.prompts
    if name == "negative_prompt_2" and given.get("negative_prompt") is not None:
        of_first: Sequence[str] = given["negative_prompt"]
        return of_first
    return nothing


def _difference(pipe: Any, one: CheckedEdit, other: CheckedEdit) -> str:
    """What keeps two edits from being made together, in words; empty if nothing does."""
    a, b = one.base, other.base
    if a.latents.shape[1:] != b.latents.shape[1:]:
        sizes = ("x".join(map(str, reversed(base.latents.shape[2:]))) for base in (b, a))
        return "its base has latents of {}, not {} cells".format(*sizes)
    if (a.latents.dtype, a.latents.device) != (b.latents.dtype, b.latents.device):
        kinds = [f"{base.latents.dtype} on {base.latents.device}" for base in (b, a)]
        return "its base is of {}, not {}".format(*kinds)
    if a.num_inference_steps != b.num_inference_steps:
        return f"its base has {b.num_inference_steps} steps, not {a.num_inference_steps}"
    if a.visits != b.visits:
        return "edits of its base visit other steps"
    if difference := a.schedule.difference(b.schedule):
        return f"the scheduler of its base {difference}"
    devices = {device.type for base in (a, b) for _, device in base.generators}
    if len(devices) > 1:
        return f"the noise of their bases comes from generators on {' and '.join(sorted(devices))}"
    return _differing_argument(pipe, one.arguments, other.arguments)


def _differing_argument(pipe: Any, one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    parameters = call_parameters(pipe)
    for name in sorted({*one, *other}):
        default = parameters[name].default if name in parameters else None
        a, b = one.get(name, default), other.get(name, default)
        if name in EMBEDDINGS:
            if (a is None) != (b is None):
                return f"one of them has {name}, the other has words alone"
        elif name == "negative_prompt":
            # Without any such words SDXL is led away from zeros, which no words are.
            if (a is None) != (b is None) and getattr(pipe.config, "force_zeros_for_empty_prompt", False):
                return f"one of them has a {name}, the other has none"
        elif name not in (*_PER_SAMPLE, *_SIZES) and not _same(a, b):
            return f"its {name} is {_shown(b)}, not {_shown(a)}"
    return ""


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are the same, to the bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype is other.dtype and torch.equal(one, other.to(one.device))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and np.array_equal(one, other)
    if type(one) is not type(other) and not (_is_number(one) and _is_number(other)):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value as a message shows it."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value) if plain else f"another {type(value).__name__}"
