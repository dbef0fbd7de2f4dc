"""Structure distance: how differently two pictures are built, whatever their colours and textures.

Source: Tumanyan et al., "Splicing ViT Features for Semantic Appearance Transfer", CVPR 2022: the mean square of what
the cosine self-similarities of all patches differ by. Its features are the keys of DINO ViT-B/8's last layer, as in
PIE-Bench. Without these weights the last convolutions of the judge stand in: figures compare among themselves then.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fisedit_compile.quality.judge import Judge
from fisedit_compile.quality.similarity import as_pixels

#: Features of a picture, ``[patches, width]``.
Features = Callable[[Image.Image], Tensor]

_SIDE = 224  # of what DINO sees
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def structure_distance(first: Image.Image, second: Image.Image, features: Features) -> float:
    """The structure distance of two pictures."""
    one, other = (_self_similarity(features(each)) for each in (first, second))
    return float((one - other).square().mean())


def dino_keys(folder: Path, device: torch.device) -> Features:
    """Keys of the last layer of a vision transformer of transformers, read from a folder.

    Raises:
        ValueError: no such model in the folder.
    """
    from transformers import ViTModel

    try:
        model: Any = ViTModel.from_pretrained(str(folder), local_files_only=True, add_pooling_layer=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--dino {folder}: no vision transformer that can be read ({error})") from None
    model = model.eval().to(device)
    key = [module for name, module in model.named_modules() if name.endswith(("attention.key", "k_proj"))][-1]
    kept: list[Tensor] = []
    key.register_forward_hook(lambda module, given, out: kept.append(out))

    @torch.no_grad()
    def features(picture: Image.Image) -> Tensor:
        pixels = as_pixels(picture.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)).float()
        normed = (pixels - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_DEVIATION)[:, None, None]
        kept.clear()
        model(pixel_values=normed[None].to(device), interpolate_pos_encoding=True)
        return kept[0][0].float().cpu()

    return features


def judge_features(judge: Judge) -> Features:
    """The judge's last convolutions over the whole picture."""

    @torch.no_grad()
    def features(picture: Image.Image) -> Tensor:
        maps = judge.network.object_layers(2 * as_pixels(picture).float()[None] - 1)
        return maps[0].flatten(1).T

    return features


def _self_similarity(features: Tensor) -> Tensor:
    unit = F.normalize(features, dim=1)
    return unit @ unit.T
