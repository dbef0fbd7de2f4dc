"""Edits of the demo world's scenes in which one thing changes: the cases that quality is measured on.

`python -m demo_world.edits`, run in `examples/`, writes them to `fisedit_compile/quality/cases.json` again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .captions import describe_fully
from .scene import WIDTHS, Background, Scene, SceneObject, place_object
from .vocabulary import ACCESSORIES, COLORS, SCENERY, TINTABLE, TINTS

FILE = Path(__file__).parents[2] / "fisedit_compile" / "quality" / "cases.json"
SEED = 20261127
EACH = 40  # cases of each kind

KINDS = ("object", "colour", "added", "removed", "background")

# What the cases are about: objects that the demo model draws well, by eye.
PLAIN = ("tree", "cactus", "sunflower", "mushroom", "house", "rocket", "gift", "bell", "watermelon", "cake")
FACES = (
    *("cat", "dog", "bear", "owl", "panda", "pig", "frog", "lion"),
    *("tiger", "fox", "rabbit", "koala", "monkey", "penguin", "cow", "mouse"),
)
NAMES = (*FACES, *TINTABLE, *PLAIN)
BACKGROUNDS = (*COLORS, *SCENERY)

# The two places of a case, and the sizes of the object that changes: a case's word, and the scene's. Beside a big
# object there is room for a small one alone.
PLACES = {"left": (0, 1), "right": (2, 1)}
SIZES = {"small": "small", "medium": "normal", "large": "big"}
BESIDE = {"small": ("medium",), "medium": ("medium", "small"), "large": ("small",)}


class Item(NamedTuple):
    """An object of a case: its name, its colour (empty for objects with a colour of their own), what it wears, and its
    size, a key of `SIZES`."""

    name: str
    colour: str
    accessory: str
    size: str


def place_item(item: Item, place: str, width: float, jitter: tuple[float, float] = (0.0, 0.0)) -> SceneObject:
    """An item as an object of a scene, `width` pixels wide."""
    return place_object(
        item.name,
        PLACES[place],
        width,
        jitter=jitter,
        color=item.colour or None,
        size=SIZES[item.size],
        accessory=None if item.accessory == "none" else item.accessory,
    )


def place_background(name: str, parameters: tuple[float, ...]) -> Background:
    """The background of one of `BACKGROUNDS`."""
    return Background("plain", (name,), parameters) if name in COLORS else Background(name, (), parameters)


def windows() -> dict[str, dict[str, tuple[float, float, float]]]:
    """Where the objects of a place and size are with what they wear: centre x, centre y and side of a square, in shares
    of the picture's side."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for place in PLACES:
        found[place] = {}
        for size in SIZES:
            width = float(np.mean(WIDTHS[SIZES[size]]))
            x, y = place_item(Item("cat", "", "none", size), place, width).center
            # A hat may reach 0.9 widths above the centre, nothing further than 0.55 below it.
            found[place][size] = (x / 256, (y - 0.17 * width) / 256, 1.5 * width / 256)
    return found


def caption(items: dict[str, Item], background: str) -> str:
    """The words of both places and the background."""
    objects = tuple(place_item(item, place, 80) for place, item in items.items())
    return describe_fully(Scene(objects, place_background(background, (0.5,) * 8))).replace(" ,", ",")


def build_cases(seed: int = SEED, each: int = EACH) -> list[dict[str, Any]]:
    """`each` cases of every kind, of all sizes and with the change left and right in turns."""
    rng = np.random.default_rng(seed)
    return [case for kind in KINDS for case in _cases_of(kind, each, rng)]


def _cases_of(kind: str, count: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    seen = set()
    made = 0
    while made < count:
        size = list(SIZES)[made % len(SIZES)]
        changed = list(PLACES)[made // len(SIZES) % len(PLACES)]
        names = rng.choice(len(NAMES), size=3, replace=False)
        here, there, new_name = (NAMES[i] for i in names)
        if kind == "colour":
            here = _pick(rng, TINTABLE)
        if kind in ("added", "removed"):
            here = _pick(rng, FACES)
        if there == here:
            continue
        background = _pick(rng, BACKGROUNDS)
        item = _dressed(here, size, rng, wears=0.0 if kind in ("object", "added") else 0.15)
        other = _dressed(there, _pick(rng, BESIDE[size]), rng, wears=0.15)
        new, new_background = item, background
        if kind == "object":
            if new_name in (here, there):
                continue
            new = _dressed(new_name, size, rng, wears=0.0)
        elif kind == "colour":
            new = item._replace(colour=_pick(rng, [tint for tint in TINTS if tint != item.colour]))
        elif kind == "added":
            new = item._replace(accessory=_pick(rng, tuple(ACCESSORIES)))
        elif kind == "removed":
            item, new = (item._replace(accessory=each) for each in (_pick(rng, tuple(ACCESSORIES)), "none"))
        else:
            new_background = _pick(rng, [each for each in BACKGROUNDS if each != background])
        prompts = [
            caption({place: what if place == changed else other for place in PLACES}, where)
            for what, where in ((item, background), (new, new_background))
        ]
        if prompts[0] in seen:
            continue
        seen.add(prompts[0])
        yield {
            "id": f"{kind}-{size}-{made // len(SIZES) + 1:02d}",
            "kind": kind,
            "size": size,
            "seed": int(rng.integers(2**31)),
            "prompt": prompts[0],
            "edit": prompts[1],
            "changed": "background" if kind == "background" else changed,
            "before": _scene(item, other, changed, background),
            "after": _scene(new, other, changed, new_background),
        }
        made += 1


def _dressed(name: str, size: str, rng: np.random.Generator, *, wears: float) -> Item:
    colour = _pick(rng, TINTS) if name in TINTABLE else ""
    accessory = _pick(rng, tuple(ACCESSORIES)) if name in FACES and rng.random() < wears else "none"
    return Item(name, colour, accessory, size)


def _scene(item: Item, other: Item, changed: str, background: str) -> dict[str, Any]:
    items = {place: (item if place == changed else other)._asdict() for place in PLACES}
    return {"items": items, "background": background}


def _pick(rng: np.random.Generator, choices: Any) -> str:
    return str(choices[int(rng.integers(len(choices)))])


def main() -> None:
    FILE.write_text(json.dumps(build_cases(), indent=1) + "\n")
    print(f"{FILE}: {len(build_cases())} cases")


if __name__ == "__main__":
    main()
