"""Pictures of scenes, with the true silhouette of everything in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .backgrounds import BackgroundTensors, encode_backgrounds, paint_backgrounds
from .scene import CANVAS, MAX_OBJECTS, Scene, accessory_box
from .sprites import load_sprites, sprite_index

LAYERS = 2 * MAX_OBJECTS  # each object and what it wears


@dataclass(frozen=True)
class RenderedScene:
    """One picture and its silhouettes.

    `image` is sRGB `[3, 256, 256]` in [0, 1]; `masks[i]` is the visible opacity in [0, 1] `[256, 256]` of
    what `labels[i]` names ("cat", "blue car", "hat"): what a later layer covers is not visible. `owners[i]` is
    the index in `scene.objects` of the object that it is or that wears it.
    """

    image: Tensor
    masks: Tensor
    labels: tuple[str, ...]
    owners: tuple[int, ...]


class SceneTensors(NamedTuple):
    """A batch of scenes as the numbers that drawing needs."""

    backgrounds: BackgroundTensors
    rows: Tensor  # [batch, LAYERS], each layer's sprite; 0 is the empty one
    boxes: Tensor  # [batch, LAYERS, 3], centre x, centre y and width in pixels

    def to(self, device: torch.device) -> SceneTensors:
        """Copies that do not make the host wait where the tensors are in pinned memory."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        kinds, *numbers = self.backgrounds
        return SceneTensors(BackgroundTensors(kinds, *map(move, numbers)), move(self.rows), move(self.boxes))


def encode_scenes(scenes: Sequence[Scene]) -> SceneTensors:
    index = sprite_index()
    rows = np.zeros((len(scenes), LAYERS), np.int64)
    boxes = np.ones((len(scenes), LAYERS, 3), np.float32)
    for n, scene in enumerate(scenes):
        for i, item in enumerate(scene.objects):
            rows[n, 2 * i] = index[item.sprite]
            boxes[n, 2 * i] = (*item.center, item.width)
            if item.accessory:
                rows[n, 2 * i + 1] = index[item.accessory]
                boxes[n, 2 * i + 1] = accessory_box(item)
    backgrounds = encode_backgrounds([scene.background for scene in scenes])
    return SceneTensors(backgrounds, torch.from_numpy(rows), torch.from_numpy(boxes))


class Renderer:
    """Draws scenes on one device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._sprites = load_sprites().to(self.device)

    def render(self, scenes: Sequence[Scene] | SceneTensors) -> tuple[Tensor, Tensor]:
        """Images `[batch, 3, 256, 256]` in [0, 1] and layers' visible opacity `[batch, LAYERS, 256, 256]`.

        Layer `2 * i` is a scene's object `i` and layer `2 * i + 1` what it wears; unused layers are 0.
        """
        batch = (scenes if isinstance(scenes, SceneTensors) else encode_scenes(scenes)).to(self.device)
        image = paint_backgrounds(batch.backgrounds, CANVAS)
        alphas = torch.zeros(*batch.rows.shape, CANVAS, CANVAS, device=self.device)
        # Output pixel -> sprite coordinate, both in [-1, 1].
        zoom = CANVAS / batch.boxes[..., 2]
        shift = -zoom[..., None] * (2 * batch.boxes[..., :2] / CANVAS - 1)
        theta = torch.cat([torch.diag_embed(zoom[..., None].expand_as(shift)), shift[..., None]], dim=-1)
        for layer in range(LAYERS):
            grid = F.affine_grid(theta[:, layer], [len(image), 4, CANVAS, CANVAS], align_corners=False)
            sprites = self._sprites[batch.rows[:, layer]]
            drawn = F.grid_sample(sprites, grid, align_corners=False)  # premultiplied
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
