"""Pictures of every kind that pipelines return, as tensors and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

#: What to do where a picture cannot be put together with its base's.
OTHERWISE = "pass background='latents' to take the picture as the decoder gives it"


def shapes(pictures: Any) -> list[tuple[int, ...]]:
    """Height, width and channels of each picture."""
    if _are_images(pictures):
        return [(each.height, each.width, 3) for each in pictures]
    return [tuple(each.shape) for each in planes(pictures)]


def planes(pictures: Any) -> list[Tensor]:
    """Each picture as ``[H, W, channels]``, whatever the pipeline's ``output_type``."""
    if _are_images(pictures):
        return [torch.from_numpy(np.array(each.convert("RGB"))) for each in pictures]
    if isinstance(pictures, np.ndarray) and pictures.ndim == 4 and len(pictures):
        return list(torch.from_numpy(pictures))
    if isinstance(pictures, Tensor) and pictures.ndim == 4 and len(pictures):
        return list(pictures.movedim(1, -1))
    what = f"a {type(pictures).__name__}" + (f" of shape {tuple(pictures.shape)}" if hasattr(pictures, "shape") else "")
    raise ValueError(
        f"the pipeline returned its pictures as {what}, not as output_type 'pil', 'np' or 'pt'; {OTHERWISE}"
    )


def part(picture: Any, rows: slice, columns: slice) -> Tensor:
    """A rectangle of one picture as ``[h, w, channels]``; the picture is an image or a plane ``[H, W, channels]``."""
    if isinstance(picture, Tensor):
        return picture[rows, columns]
    box = (columns.start, rows.start, columns.stop, rows.stop)
    return torch.from_numpy(np.array(picture.convert("RGB").crop(box)))


def with_part(picture: Any, rows: slice, columns: slice, values: Tensor) -> Any:
    """A copy of one picture, see :func:`part`, with other values in a rectangle."""
    if isinstance(picture, Tensor):
        copy = picture.to(values.device, copy=True)
        copy[rows, columns] = values
        return copy
    copy = picture.convert("RGB")  # a copy, whatever the mode was
    copy.paste(Image.fromarray(values.numpy()), (columns.start, rows.start))
    return copy


def separate(pictures: Any) -> list[Any]:
    """Each picture by itself: an image, or a plane ``[H, W, channels]``."""
    return pictures if _are_images(pictures) else planes(pictures)


def like(pictures: Any, planes: list[Any]) -> Any:
    """Planes ``[H, W, channels]``, or what :func:`separate` made, as the kind of pictures that was given."""
    if isinstance(pictures, Tensor):
        return torch.stack(planes).movedim(-1, 1).contiguous()
    if isinstance(pictures, np.ndarray):
        return torch.stack(planes).numpy()
    return [plane if isinstance(plane, Image.Image) else Image.fromarray(plane.numpy()) for plane in planes]


def _are_images(pictures: Any) -> bool:
    return isinstance(pictures, list) and bool(pictures) and all(isinstance(each, Image.Image) for each in pictures)
