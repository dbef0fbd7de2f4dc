"""A scene: what stands where on which background, drawn at random from a numpy generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .vocabulary import ACCESSORIES, COLORS, OBJECTS, PLACES, SCENERY, TINTABLE, TINTS, WEARERS

CANVAS = 256  # pixels of a picture's side
MAX_OBJECTS = 3
BACKGROUND_PARAMETERS = 8

# Objects named in the order of these places are said without them: "a cat and a dog" has the cat on the left.
DEFAULT_PLACES: dict[int, tuple[tuple[int, int], ...]] = {
    1: ((1, 1),),
    2: ((0, 1), (2, 1)),
    3: ((0, 1), (1, 1), (2, 1)),
}
# Sprite width in pixels. Alone, an object has room to be larger.
WIDTHS = {"small": (50, 56), "normal": (80, 88), "big": (136, 148)}
ACCESSORY_SHARE = 0.35  # how many of the sprites that can wear an accessory do


@dataclass(frozen=True)
class SceneObject:
    """One object: its words, and its centre and width in pixels.

    `name` is one of `OBJECTS`, `color` one of `TINTS` or None for the sprite's own, `size` "small", "normal"
    or "big", `accessory` one of `ACCESSORIES` or None, `place` a key of `PLACES`.
    """

    name: str
    place: tuple[int, int]
    center: tuple[float, float]
    width: float
    color: str | None = None
    size: str = "normal"
    accessory: str | None = None

    @property
    def sprite(self) -> str:
        """The sprite's name: "car" or "blue car"."""
        return f"{self.color} {self.name}" if self.color else self.name


@dataclass(frozen=True)
class Background:
    """`kind` is "plain" (one colour), "gradient" (two, from the top down) or a key of `SCENERY`.

    `parameters` are `BACKGROUND_PARAMETERS` numbers in [0, 1) that vary a background of one kind.
    """

    kind: str
    colors: tuple[str, ...] = ()
    parameters: tuple[float, ...] = (0.5,) * BACKGROUND_PARAMETERS


@dataclass(frozen=True)
class Scene:
    """Objects, drawn in this order, on a background."""

    objects: tuple[SceneObject, ...]
    background: Background


def accessory_box(item: SceneObject) -> tuple[float, float, float]:
    """Centre x, centre y and width in pixels of the accessory that `item` wears."""
    _, head = WEARERS[item.name]
    left, top = item.center[0] - item.width / 2, item.center[1] - item.width / 2
    width = head.width * item.width * (1.0 if item.accessory == "crown" else 1.15)
    # The sprite's lower rim is at 0.9 of its height; let it sink a little into the head.
    return left + head.x * item.width, top + head.y * item.width - 0.36 * width, width


def place_object(
    name: str,
    place: tuple[int, int],
    width: float,
    *,
    jitter: tuple[float, float] = (0.0, 0.0),
    color: str | None = None,
    size: str = "normal",
    accessory: str | None = None,
) -> SceneObject:
    """The object at a place of the 3 x 3 grid, moved by `jitter` pixels and then wholly into the picture."""
    margin = width / 2 + 2
    above = 0.55 * WEARERS[name][1].width * width if accessory else 0.0  # a hat needs room over the head
    x = np.clip(CANVAS * (2 * place[0] + 1) / 6 + jitter[0], margin, CANVAS - margin)
    y = np.clip(CANVAS * (2 * place[1] + 1) / 6 + jitter[1], margin + above, CANVAS - margin)
    return SceneObject(name, place, (float(x), float(y)), width, color, size, accessory)


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene: 1 to 3 different objects that hardly overlap, on a random background."""
    background = _sample_background(rng)
    count = int(rng.choice((1, 2, 3), p=(0.35, 0.35, 0.30)))
    names = [OBJECTS[i] for i in rng.choice(len(OBJECTS), size=count, replace=False)]
    for i in range(count):
        # Most edits are about colours and hats, which only a few objects can have: show those more often.
        draw = rng.random()
        pool: tuple[str, ...] = TINTABLE if draw < 0.16 else tuple(WEARERS) if draw < 0.36 else ()
        free = [name for name in pool if name not in names]
        if free:
            names[i] = free[rng.integers(len(free))]
    while True:
        if rng.random() < 0.45:
            places = list(DEFAULT_PLACES[count])
        else:
            grid = list(PLACES)
            places = [grid[i] for i in rng.choice(len(grid), size=count, replace=False)]
        objects = tuple(_sample_object(rng, name, place) for name, place in zip(names, places, strict=True))
        if not crowded(objects):
            return Scene(objects, background)


def _sample_object(rng: np.random.Generator, name: str, place: tuple[int, int]) -> SceneObject:
    size = str(rng.choice(("small", "normal", "big"), p=(0.12, 0.66, 0.22)))
    low, high = WIDTHS[size]
    color = str(rng.choice(TINTS)) if name in TINTABLE and rng.random() < 0.85 else None
    wears = name in WEARERS and rng.random() < ACCESSORY_SHARE
    accessory = str(rng.choice(list(ACCESSORIES))) if wears else None
    jitter = (float(rng.uniform(-6, 6)), float(rng.uniform(-6, 6)))
    width = float(rng.uniform(low, high))
    return place_object(name, place, width, jitter=jitter, color=color, size=size, accessory=accessory)


def crowded(objects: tuple[SceneObject, ...]) -> bool:
    """Whether two objects, hats included, overlap by more than a few pixels."""
    boxes = []
    for item in objects:
        half = item.width / 2
        top = item.center[1] - half
        if item.accessory:
            _, y, width = accessory_box(item)
            top = min(top, y - width / 2)
        boxes.append((item.center[0] - half, top, item.center[0] + half, item.center[1] + half))
    slack = 10  # the outermost pixels of a sprite are empty
    for i, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:i]:
            wide = min(right, other[2]) - max(left, other[0])
            high = min(bottom, other[3]) - max(top, other[1])
            if wide > slack and high > slack:
                return True
    return False


def _sample_background(rng: np.random.Generator) -> Background:
    parameters = tuple(float(value) for value in rng.random(BACKGROUND_PARAMETERS))
    draw = rng.random()
    if draw < 0.35:
        return Background("plain", (str(rng.choice(list(COLORS))),), parameters)
    if draw < 0.55:
        first, second = rng.choice(list(COLORS), size=2, replace=False)
        return Background("gradient", (str(first), str(second)), parameters)
    return Background(str(rng.choice(list(SCENERY))), (), parameters)
