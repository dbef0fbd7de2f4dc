"""The networks of the judge: one that names what stands in a window of a picture, and one that names the background."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

#: Side in pixels of what the networks see: a window around one object, and the whole picture.
WINDOW, PICTURE = 48, 32

_OBJECT_LAYERS = ((24, 2), (48, 1), (64, 2), (96, 1), (128, 2), (160, 1))  # channels and stride
_BACKGROUND_LAYERS = ((16, 2), (32, 2), (48, 2), (64, 1))


@dataclass(frozen=True)
class Logits:
    """What the object network says of windows: logits ``[n, classes]`` of names, colours and accessories."""

    names: Tensor
    colours: Tensor
    accessories: Tensor


class JudgeNetwork(nn.Module):
    """Two small convolutional classifiers.

    Args:
        names, colours, accessories, backgrounds: the number of classes of each.
    """

    def __init__(self, *, names: int, colours: int, accessories: int, backgrounds: int) -> None:
        super().__init__()
        self._counts = [names, colours, accessories]
        width = _OBJECT_LAYERS[-1][0]
        self.object_layers = _convolutions(_OBJECT_LAYERS)
        self.object_head = nn.Linear(width, sum(self._counts))
        self.background_layers = _convolutions(_BACKGROUND_LAYERS)
        self.background_head = nn.Linear(_BACKGROUND_LAYERS[-1][0], backgrounds)

    def objects(self, windows: Tensor) -> Logits:
        """Of windows ``[n, 3, WINDOW, WINDOW]``, sRGB in [0, 1]."""
        pooled = F.adaptive_avg_pool2d(self.object_layers(2 * windows - 1), 1).flatten(1)
        return Logits(*self.object_head(pooled).split(self._counts, dim=1))

    def backgrounds(self, pictures: Tensor) -> Tensor:
        """Logits ``[n, backgrounds]`` of whole pictures ``[n, 3, PICTURE, PICTURE]``, sRGB in [0, 1]."""
        pooled = F.adaptive_avg_pool2d(self.background_layers(2 * pictures - 1), 1).flatten(1)
        logits: Tensor = self.background_head(pooled)
        return logits


def _convolutions(layers: tuple[tuple[int, int], ...]) -> nn.Sequential:
    parts: list[nn.Module] = []
    before = 3
    for channels, stride in layers:
        kernel = 5 if before == 3 else 3
        parts += [
            nn.Conv2d(before, channels, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
        before = channels
    return nn.Sequential(*parts)
