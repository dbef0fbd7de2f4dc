"""The cases that quality is measured on: two prompts that differ in one thing, a seed, and what both should show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, get_args

Kind = Literal["object", "colour", "added", "removed", "background"]
Subset = Literal["quick", "all"]

KINDS: tuple[Kind, ...] = get_args(Kind)
SIZES = ("small", "medium", "large")

_FILE = "cases.json"
_QUICK_EACH = 4  # cases of each kind in the quick subset


@dataclass(frozen=True)
class Item:
    """An object at a place.

    Attributes:
        name: what it is.
        colour: of an object that comes in several; empty for others.
        accessory: what it wears, or ``"none"``.
        size: one of :data:`SIZES`.
    """

    name: str
    colour: str
    accessory: str
    size: str


@dataclass(frozen=True)
class Scene:
    """What a prompt says: an item for each place (``"left"``, ``"right"``), and the background."""

    items: Mapping[str, Item]
    background: str


@dataclass(frozen=True)
class Case:
    """One edit.

    Attributes:
        id: unique, made of kind, size and a number.
        kind: what changes.
        size: of the object that changes; of a background's case, of the objects that stay.
        seed: of the noise.
        prompt, edit: words before and after.
        changed: the place of what changes, or ``"background"``.
        before, after: what both should show.
    """

    id: str
    kind: Kind
    size: str
    seed: int
    prompt: str
    edit: str
    changed: str
    before: Scene
    after: Scene


def load_cases(subset: Subset = "all", count: int | None = None) -> list[Case]:
    """The cases of a subset, kinds in turns, so that the first few are of all kinds.

    Args:
        subset: ``"all"``, or ``"quick"``: the first four of each kind.
        count: only as many, the first ones.

    Raises:
        ValueError: ``count`` is none, or more than there are.
    """
    text = resources.files("fisedit_compile.quality").joinpath(_FILE).read_text()
    by_kind: dict[str, list[Case]] = {kind: [] for kind in KINDS}
    for values in json.loads(text):
        by_kind[values["kind"]].append(_case(values))
    each = _QUICK_EACH if subset == "quick" else None
    cases = [case for turn in zip(*(found[:each] for found in by_kind.values()), strict=True) for case in turn]
    if count is not None and not 0 < count <= len(cases):
        raise ValueError(f"{count} cases of the subset {subset!r}: it has {len(cases)}, give 1 to {len(cases)}")
    return cases[:count]


def check_words(cases: Sequence[Case], pipe: Any) -> None:
    """Hold the words of the cases to what the pipeline's tokenizer knows.

    Raises:
        ValueError: no tokenizer, or words that it reads as unknown, or prompts that are longer than it reads.
    """
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"{type(pipe).__name__} of this folder has no tokenizer: the cases are words, so give one")
    unknown = set()
    for case in cases:
        for prompt in (case.prompt, case.edit):
            if len(tokenizer(prompt).input_ids) > tokenizer.model_max_length:
                raise ValueError(
                    f"case {case.id}: the tokenizer reads {tokenizer.model_max_length} tokens, and {prompt!r} has more"
                )
            unknown |= {word for word in prompt.replace(",", " ,").split() if _is_unknown(tokenizer, word)}
    if unknown:
        listed = sorted(unknown)
        more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        raise ValueError(
            f"the model's tokenizer does not know {', '.join(map(repr, listed[:5]))}{more}: the cases are of the demo "
            "world, so give a model that was trained on its words, such as examples/demo_model"
        )


def _is_unknown(tokenizer: Any, word: str) -> bool:
    unknown = tokenizer.unk_token_id
    return unknown is not None and unknown in tokenizer(word, add_special_tokens=False).input_ids


def _case(values: Mapping[str, Any]) -> Case:
    return Case(**{**values, "before": _scene(values["before"]), "after": _scene(values["after"])})


def _scene(values: Mapping[str, Any]) -> Scene:
    items = {place: Item(**item) for place, item in values["items"].items()}
    return Scene(items, values["background"])
