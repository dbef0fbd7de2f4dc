"""Pictures of scenes, with the true silhouette of everything in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .backgrounds import paint_backgrounds
from .scene import CANVAS, MAX_OBJECTS, Background, Scene, accessory_box
from .sprites import load_sprites

LAYERS = 2 * MAX_OBJECTS  # each object and what it wears


@dataclass(frozen=True)
class RenderedScene:
    """One picture and its silhouettes.

    `image` is sRGB `[3, 256, 256]` in [0, 1]; `masks[i]` is the visible opacity in [0, 1] `[256, 256]` of what
    `labels[i]` names ("cat", "blue car", "hat"): what a later layer covers is not visible. `owners[i]` is the index
    in `scene.objects` of the object that it is or that wears it.
    """

    image: Tensor
    masks: Tensor
    labels: tuple[str, ...]
    owners: tuple[int, ...]


class Renderer:
    """Draws scenes on one device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._index, sprites = load_sprites()
        self._sprites = sprites.to(self.device)

    def render(self, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
        """Images `[batch, 3, 256, 256]` in [0, 1] and each layer's visible opacity `[batch, LAYERS, 256, 256]`.

        Layer `2 * i` is a scene's object `i` and layer `2 * i + 1` what it wears; unused layers are 0.
        """
        rows = torch.zeros(len(scenes), LAYERS, dtype=torch.long)
        boxes = torch.ones(len(scenes), LAYERS, 3)  # centre x, centre y, width
        for n, scene in enumerate(scenes):
            for i, item in enumerate(scene.objects):
                rows[n, 2 * i] = self._index[item.sprite]
                boxes[n, 2 * i] = torch.tensor([*item.center, item.width])
                if item.accessory:
                    rows[n, 2 * i + 1] = self._index[item.accessory]
                    boxes[n, 2 * i + 1] = torch.tensor(accessory_box(item))
        return self._composite(
            [scene.background for scene in scenes], rows.to(self.device), boxes.to(self.device)
        )

    def _composite(self, backgrounds: list[Background], rows: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        image = paint_backgrounds(backgrounds, CANVAS, self.device)
        alphas = torch.zeros(*rows.shape, CANVAS, CANVAS, device=self.device)
        for layer in range(LAYERS):
            cx, cy, width = boxes[:, layer].unbind(1)
            # Output pixel -> sprite coordinate, both in [-1, 1].
            zoom = CANVAS / width
            theta = torch.zeros(len(backgrounds), 2, 3, device=self.device)
            theta[:, 0, 0] = theta[:, 1, 1] = zoom
            theta[:, 0, 2] = -zoom * (2 * cx / CANVAS - 1)
            theta[:, 1, 2] = -zoom * (2 * cy / CANVAS - 1)
            grid = F.affine_grid(theta, [len(backgrounds), 4, CANVAS, CANVAS], align_corners=False)
            drawn = F.grid_sample(self._sprites[rows[:, layer]], grid, align_corners=False)  # premultiplied
            covered = 1 - drawn[:, 3:]
            image = drawn[:, :3] + covered * image
            alphas[:, :layer] *= covered
            alphas[:, layer] = drawn[:, 3]
        return image.clamp_(0, 1), alphas


def render_scene(scene: Scene, renderer: Renderer | None = None) -> RenderedScene:
    """One scene's picture and silhouettes, on the CPU unless `renderer` is elsewhere."""
    images, alphas = (renderer or Renderer()).render([scene])
    layers, labels, owners = [], [], []
    for i, item in enumerate(scene.objects):
        layers.append(2 * i)
        labels.append(item.sprite)
        owners.append(i)
        if item.accessory:
            layers.append(2 * i + 1)
            labels.append(item.accessory)
            owners.append(i)
    return RenderedScene(images[0], alphas[0, layers], tuple(labels), tuple(owners))
