"""What is passed to a pipeline's call: checked before anything is computed, and copied, so that a base keeps its own.

Pipelines of diffusers swallow what they do not know (``**kwargs``), and fail on wrong types somewhere inside.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch.utils import _pytree as pytree

#: What an editor does not take, though pipelines do, and why.
_REFUSED = {
    "callback": "pipelines no longer take it: give callback_on_step_end",
    "callback_steps": "pipelines no longer take it: give callback_on_step_end",
}
OUTPUTS = ("pil", "np", "pt")
_SIZES = ("height", "width")

#: Words beside the prompt: one string for all samples, or one each.
_WORDS = ("negative_prompt", "prompt_2", "negative_prompt_2")


def call_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the pipeline's call that have a name."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    named = {name: each for name, each in parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD}
    named.pop("self", None)
    return named


def check_arguments(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Hold the arguments of :meth:`~fisedit_compile.Editor.generate` to what the pipeline's call takes.

    Raises:
        ValueError: a name that the pipeline does not take, with the nearest that it does; a value of another type than
            the parameter's default has, or one that is not finite; what an editor cannot do with.
    """
    parameters = call_parameters(pipe)
    for name, value in arguments.items():
        if name in _REFUSED:
            raise ValueError(f"{name}={_shown(value)}: {_REFUSED[name]}")
        if name not in parameters:
            refuse_unknown(name, value, parameters, f"{type(pipe).__name__} does not take it")
        default = parameters[name].default
        if name in _SIZES and value is not None:
            default = 1
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ValueError(f"{name}={_shown(value)}: give True or False")
        elif isinstance(default, Integral):
            least = min(1, int(default))
            if not _is_number(value, Integral) or value < least:
                raise ValueError(f"{name}={_shown(value)}: give a whole number of at least {least}")
        elif isinstance(default, Real):
            several = isinstance(value, (list, tuple)) and len(value) > 0  # one for each ControlNet
            if not all(_is_number(each, Real) and math.isfinite(each) for each in (value if several else [value])):
                raise ValueError(f"{name}={_shown(value)}: give a finite number")
    if arguments.get("output_type", "pil") not in OUTPUTS:
        raise ValueError(
            f"output_type={_shown(arguments['output_type'])}: give 'pil', 'np' or 'pt'; a base and an edit have the "
            "latents beside the pictures"
        )
    for name in _WORDS:
        words = arguments.get(name)
        if words is not None and not _are_words(words):
            raise ValueError(f"{name}={_shown(words)}: give a string, a list of strings, or None")
    if not isinstance(arguments.get("latents"), (torch.Tensor, type(None))):
        raise ValueError(f"latents is a {type(arguments['latents']).__name__}: give a tensor, or None")
    if arguments.get("pag_scale", getattr(parameters.get("pag_scale"), "default", 0)) > 0:
        raise ValueError("perturbed-attention guidance adds a third part to the batch: pass pag_scale=0")


def without_return_dict(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without ``return_dict``, which may say what an editor does in any case.

    Raises:
        ValueError: it says otherwise.
    """
    if arguments.get("return_dict", True) is not True:
        raise ValueError(
            f"return_dict={_shown(arguments['return_dict'])}: generate(...) returns a Base and edit(...) an Edit, and "
            "no tuple"
        )
    return {name: value for name, value in arguments.items() if name != "return_dict"}


def refuse_unknown(name: str, value: Any, known: Iterable[str], why: str) -> NoReturn:
    """Refuse an argument and name the nearest one that there is."""
    if name == "seed":
        hint = f"give generator=torch.Generator().manual_seed({_shown(value)})"
    else:
        nearest = difflib.get_close_matches(name, list(known), n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "leave it out"
    raise ValueError(f"{name}={_shown(value)}: {why}; {hint}")


def one_for_each(prompts: Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with a list in the place of each string that goes with the prompts: pipelines want lists for lists.

    Raises:
        ValueError: a list of another length than there are prompts.
    """
    spread = dict(arguments)
    for name in _WORDS:
        words = arguments.get(name)
        if isinstance(words, str):
            spread[name] = [words] * len(prompts)
        elif words is not None and len(words) != len(prompts):
            raise ValueError(
                f"{len(words)} string(s) in {name} for {len(prompts)} prompt(s): give one for each, or one"
            )
    return spread


def check_prompts(prompt: Any) -> tuple[str, ...]:
    """The prompts of a string or a sequence of strings.

    Raises:
        ValueError: anything else, or none.
    """
    if not _are_words(prompt):
        raise ValueError(f"prompt={_shown(prompt)}: give a string, or a list of strings")
    return (prompt,) if isinstance(prompt, str) else tuple(prompt)


def check_generators(generator: Any) -> list[torch.Generator]:
    """The generators of one or a sequence of them; None is one on the CPU, seeded by torch's default one.

    Raises:
        ValueError: anything else, a seed for example.
    """
    if generator is None:  # on the CPU, where pipelines draw the same noise for every device
        return [torch.Generator("cpu").manual_seed(int(torch.randint(2**62, ())))]
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if not generators or not all(isinstance(each, torch.Generator) for each in generators):
        seed = f"torch.Generator().manual_seed({generator})" if _is_number(generator, Integral) else "a torch.Generator"
        raise ValueError(f"generator={_shown(generator)}: give {seed}, or a list with one for each picture")
    return generators


def owned(value: Any) -> Any:
    """A copy that shares nothing that could be changed: of tensors, arrays, pictures, and containers of them."""
    return pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf), value
    )


def _are_words(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(each, str) for each in value)


def _is_number(value: Any, kind: type) -> bool:
    """Whether ``value`` is a number of ``kind``; True and False are no numbers here."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value as a message shows it: short."""
    text = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
