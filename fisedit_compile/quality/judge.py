"""The judge: a classifier that looks at a picture alone and says what stands where, in which colour, wearing what.

It was trained on rendered scenes (``examples/train_judge.py``) and has seen neither the model nor the method that it
judges.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit_compile.quality.cases import Item, Scene
from fisedit_compile.quality.judge_network import PICTURE, WINDOW, JudgeNetwork

#: Beside the names that it knows, what it calls an object of another name, and an empty place.
OTHER, NOTHING = "other", "nothing"

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class JudgeConfig:
    """What a judge knows, and where it looks.

    Attributes:
        names: of objects, with :data:`OTHER` and :data:`NOTHING`.
        colours, accessories, backgrounds: the other classes; an accessory may be ``"none"``.
        coloured: names of objects that come in several colours.
        windows: place -> size of the object there -> centre x, centre y and side of the window, in shares of the
            picture's side.
        accuracy: on held-out rendered pictures, a share for each kind of class.
    """

    names: tuple[str, ...]
    colours: tuple[str, ...]
    accessories: tuple[str, ...]
    backgrounds: tuple[str, ...]
    coloured: tuple[str, ...]
    windows: Mapping[str, Mapping[str, Sequence[float]]]
    accuracy: Mapping[str, float]

    def network(self) -> JudgeNetwork:
        """The network for these classes, untrained."""
        return JudgeNetwork(
            names=len(self.names),
            colours=len(self.colours),
            accessories=len(self.accessories),
            backgrounds=len(self.backgrounds),
        )


@dataclass(frozen=True)
class Sight:
    """What the judge sees in one picture: an item for each place, and the background."""

    items: Mapping[str, Item]
    background: str


class Judge:
    """Says what a picture shows.

    Args:
        config: what it knows.
        network: trained for that.
    """

    def __init__(self, config: JudgeConfig, network: JudgeNetwork) -> None:
        self.config, self.network = config, network.eval().float().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """The judge that :meth:`save` wrote to ``folder``.

        Raises:
            ValueError: there is none, or files that do not belong together.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if missing := [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]:
            raise ValueError(
                f"{folder} has no {' and no '.join(missing)} of a judge: give --judge, or train one with "
                "examples/train_judge.py"
            )
        try:
            config = JudgeConfig(**json.loads((folder / _CONFIG).read_text()))
            network = config.network()
            network.load_state_dict({name: each.float() for name, each in load_file(folder / _WEIGHTS).items()})
        except (TypeError, KeyError, RuntimeError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no judge that can be read ({error}): train one with examples/train_judge.py"
            ) from error
        return cls(config, network)

    def save(self, folder: Path) -> None:
        """Write the judge to ``folder``, its weights in half precision."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        state = {name: _halved(each) for name, each in self.network.state_dict().items()}
        save_file(state, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(asdict(self.config), indent=1) + "\n")

    def check(self, scene: Scene) -> None:
        """Hold a scene to what the judge knows.

        Raises:
            ValueError: a name, colour, accessory, background or place that it was not trained for.
        """
        known = self.config
        found: list[tuple[str, Container[str]]] = [(scene.background, known.backgrounds)]
        for place, item in scene.items.items():
            found += [(place, known.windows), (item.name, known.names), (item.accessory, known.accessories)]
            found += [(item.size, known.windows.get(place, {}))]
            found += [(item.colour, known.colours)] if item.colour else []
        if unknown := [word for word, words in found if word not in words]:
            raise ValueError(f"the judge does not know {', '.join(map(repr, unknown))}: train one that does")

    @torch.no_grad()
    def look(self, picture: Any, scene: Scene) -> Sight:
        """What ``picture`` shows at the places of ``scene``, whose sizes say how large a window to look through.

        Args:
            picture: a square PIL image.
            scene: what it is meant to show; only its places and sizes are read.
        """
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        boxes = torch.tensor([self.config.windows[place][item.size] for place, item in scene.items.items()])
        logits = self.network.objects(cut_windows(pixels.expand(len(boxes), -1, -1, -1), boxes, WINDOW))
        items = {}
        best = (each.argmax(1).tolist() for each in (logits.names, logits.colours, logits.accessories))
        for place, name, colour, accessory in zip(scene.items, *best, strict=True):
            called = self.config.names[name]
            items[place] = Item(
                name=called,
                colour=self.config.colours[colour] if called in self.config.coloured else "",
                accessory=self.config.accessories[accessory],
                size=scene.items[place].size,
            )
        background = self.network.backgrounds(shrink(pixels)).argmax(1)
        return Sight(items, self.config.backgrounds[int(background)])


def cut_windows(pictures: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Windows ``[n, 3, side, side]`` of pictures ``[n, 3, H, H]``; beyond the edge they repeat its pixels.

    Args:
        pictures: sRGB in [0, 1].
        boxes: ``[n, 3]``: centre x, centre y and side of each window, in shares of the picture's side.
        side: of the result in pixels. What has several pixels for one of these is averaged.
    """
    finer = 2  # samples a pixel and direction, averaged below
    theta = torch.zeros(len(pictures), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = boxes[:, 2]
    theta[:, :, 2] = 2 * boxes[:, :2] - 1
    grid = F.affine_grid(theta, [len(pictures), 3, finer * side, finer * side], align_corners=False)
    sampled = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, finer)


def shrink(pictures: Tensor) -> Tensor:
    """Whole pictures ``[n, 3, H, W]`` as the background's network sees them."""
    return F.interpolate(pictures, size=(PICTURE, PICTURE), mode="area")


def _halved(tensor: Tensor) -> Tensor:
    return (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
