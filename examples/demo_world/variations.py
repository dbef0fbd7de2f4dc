"""Scenes that differ from one another in one thing, with captions that say so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .captions import MAX_WORDS, describe, describe_fully
from .scene import CANVAS, DEFAULT_PLACES, Background, Scene, SceneObject, crowded, place_object, sample_scene
from .vocabulary import ACCESSORIES, COLORS, OBJECTS, SCENERY, TINTABLE, TINTS, WEARERS

KINDS = ("object", "colour", "added", "removed", "background")
#: Beside them two objects that change places, which no case of `fisedit-compile quality` does.
SWAPPED = "swapped"
PAIR_SHARE = 0.5  # families of two objects, left and right, as all cases are


class Family(NamedTuple):
    """Scenes of which each differs from the first in one thing, and their captions."""

    scenes: list[Scene]
    captions: list[str]


def sample_family(rng: np.random.Generator, size: int) -> Family:
    """A random scene and `size - 1` variations of it, no two of which have the same caption."""
    while True:
        scene = sample_pair(rng) if rng.random() < PAIR_SHARE else sample_scene(rng)
        found = {describe_fully(scene): scene}
        for _ in range(4 * size):  # some variations are crowded, or the same as another
            kind = str(rng.choice((*KINDS, SWAPPED)))
            varied = vary(scene, kind, rng)
            if varied is not None:
                found.setdefault(describe_fully(varied), varied)
            if len(found) == size:
                break
        captions = [say(each, rng) for each in found.values()]
        if len(found) == size and all(len(caption.split()) <= MAX_WORDS for caption in captions):
            return Family([*found.values()], captions)


def sample_pair(rng: np.random.Generator) -> Scene:
    """A random scene of two objects, left and right."""
    while True:
        scene = sample_scene(rng)
        if tuple(item.place for item in scene.objects) == DEFAULT_PLACES[2]:
            return scene


def say(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as `describe` makes them, but one that names the background, as other captions of a family might."""
    background = describe_fully(scene).rpartition(" , ")[2]
    while not (caption := describe(scene, rng)).endswith(background):
        continue
    return caption


def vary(scene: Scene, kind: str, rng: np.random.Generator) -> Scene | None:
    """The scene with one thing changed, one of `KINDS` or `SWAPPED`; None where it has no such thing, or no room."""
    if kind == "background":
        return dataclasses.replace(scene, background=_other_background(scene.background, rng))
    objects = list(scene.objects)
    if kind == SWAPPED:
        if len(objects) < 2:
            return None
        i, j = (int(each) for each in rng.choice(len(objects), size=2, replace=False))
        objects[i], objects[j] = _moved(objects[i], objects[j]), _moved(objects[j], objects[i])
        objects[i], objects[j] = objects[j], objects[i]  # captions name objects in the order of their places
    else:
        able = [i for i, item in enumerate(objects) if _can(item, kind)]
        if not able:
            return None
        at = able[int(rng.integers(len(able)))]
        objects[at] = _changed(objects[at], kind, [item.name for item in objects], rng)
    return None if crowded(tuple(objects)) else dataclasses.replace(scene, objects=tuple(objects))


def _can(item: SceneObject, kind: str) -> bool:
    return {
        "object": item.accessory is None,
        "colour": item.color is not None,
        "added": item.name in WEARERS and item.accessory is None,
        "removed": item.accessory is not None,
    }[kind]


def _changed(item: SceneObject, kind: str, names: Sequence[str], rng: np.random.Generator) -> SceneObject:
    if kind == "object":
        pools = (TINTABLE, tuple(WEARERS), OBJECTS)
        name = _pick(rng, [each for each in pools[int(rng.integers(len(pools)))] if each not in names])
        return _again(item, name=name, color=_pick(rng, TINTS) if name in TINTABLE else None)
    if kind == "colour":
        return _again(item, color=_pick(rng, [tint for tint in TINTS if tint != item.color]))
    return _again(item, accessory=_pick(rng, tuple(ACCESSORIES)) if kind == "added" else None)


def _moved(item: SceneObject, other: SceneObject) -> SceneObject:
    """The item at the place of the other."""
    return _again(dataclasses.replace(item, place=other.place, center=other.center))


def _again(item: SceneObject, **changes: str | None) -> SceneObject:
    """The object with other words, as near to where it stood as a hat allows."""
    x, y = (CANVAS * (2 * place + 1) / 6 for place in item.place)
    kept = {key: getattr(item, key) for key in ("name", "color", "size", "accessory")} | changes
    name = kept.pop("name")
    return place_object(name, item.place, item.width, jitter=(item.center[0] - x, item.center[1] - y), **kept)


def _other_background(background: Background, rng: np.random.Generator) -> Background:
    kinds = [each for each in (*COLORS, *SCENERY) if each not in (background.kind, *background.colors)]
    kind = _pick(rng, kinds)
    return (
        dataclasses.replace(background, kind="plain", colors=(kind,))
        if kind in COLORS
        else dataclasses.replace(background, kind=kind, colors=())
    )


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return str(choices[int(rng.integers(len(choices)))])
