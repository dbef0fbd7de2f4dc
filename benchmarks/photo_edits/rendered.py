"""Scenes of the cases of ``fisedit-compile quality``, drawn by the demo world's renderer (``examples`` in the path)."""

from __future__ import annotations

from typing import Any

import numpy as np
from demo_world.edits import Item, place_background, place_item
from demo_world.renderer import Renderer
from demo_world.scene import BACKGROUND_PARAMETERS, WIDTHS
from demo_world.scene import Scene as DrawnScene
from PIL import Image
from torch import Tensor

from fisedit_compile.quality.cases import Scene

#: Width in pixels of an object by its size in a case, and how far it may stand from the middle of its place.
_WIDTHS = {"small": WIDTHS["small"], "medium": WIDTHS["normal"], "large": WIDTHS["big"]}
_JITTER = 6


def render(scene: Scene, seed: int) -> Tensor:
    """sRGB ``[3, 256, 256]``; the same seed draws what two scenes have in common alike."""
    rng = np.random.default_rng(seed)
    parameters = tuple(float(each) for each in rng.random(BACKGROUND_PARAMETERS))
    objects: list[Any] = []
    for place, item in scene.items.items():
        share, *shift = rng.random(3)
        low, high = _WIDTHS[item.size]
        drawn = Item(item.name, item.colour, item.accessory, item.size)
        jitter = tuple(_JITTER * (2 * float(each) - 1) for each in shift)
        objects.append(place_item(drawn, place, low + share * (high - low), jitter=(jitter[0], jitter[1])))
    scene_drawn = DrawnScene(tuple(objects), place_background(scene.background, parameters))
    return Renderer().render([scene_drawn])[0][0]


def as_picture(image: Tensor) -> Image.Image:
    """What :func:`render` returns as a PIL image."""
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
