"""Masks to measure with: squares of a given area, real ones from a file, and those a user gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fisedit_compile.errors import MaskError
from fisedit_compile.masks.user_mask import MaskLike, as_mask


def square_mask(edit_size: float, size: tuple[int, int]) -> Tensor:
    """A square in the middle of the latents: bool ``[1, h, w]``.

    Its side is ``round(sqrt(edit_size * h * w))`` cells, at least one, so that its share of the area is only near
    ``edit_size``. Where the latents' shorter side is less than that, it is a rectangle over the whole of that side.

    Args:
        edit_size: share of the latents' area, in (0, 1].
        size: (height, width) of the latents.

    Raises:
        ValueError: ``edit_size`` is outside (0, 1].
    """
    if not 0 < edit_size <= 1:
        raise ValueError(f"edit_size is {edit_size}: give the share of the picture that is edited, in (0, 1]")
    height, width = size
    cells = edit_size * height * width
    side = max(round(math.sqrt(cells)), 1)
    rows, columns = min(side, height), min(side, width)
    if rows < side:
        columns = round(cells / rows)
    elif columns < side:
        rows = round(cells / columns)
    top, left = (height - rows) // 2, (width - columns) // 2
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, top : top + rows, left : left + columns] = True
    return mask


def read_masks(path: Path) -> Tensor:
    """The masks of an ``.npz``, bool ``[n, h, w]``.

    The file has ``masks``, bool ``[n, h, w]``; or ``packed``, uint8 ``[n, s * s / 8]``: the bits of ``n`` square masks
    as ``numpy.packbits`` gives them.

    Raises:
        ValueError: not such a file.
        OSError: no file at all.
    """
    try:
        with path.open("rb") as stream:
            file = np.load(stream)
            arrays = dict(file) if isinstance(file, np.lib.npyio.NpzFile) else {}
    except (BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"{path} is no .npz of masks") from error
    masks, packed = arrays.get("masks"), arrays.get("packed")
    if masks is not None and masks.ndim == 3 and masks.size and masks.dtype == bool:
        return torch.from_numpy(masks)
    if packed is not None and packed.ndim == 2 and packed.size and packed.dtype == np.uint8:
        side = math.isqrt(8 * packed.shape[1])
        if side * side == 8 * packed.shape[1]:
            return torch.from_numpy(np.unpackbits(packed, axis=1).reshape(-1, side, side).astype(bool))
    held = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items()) or "nothing"
    raise ValueError(
        f"{path} holds {held}: wanted is 'masks', bool [n, h, w], or 'packed', uint8 [n, s * s / 8] with the bits of "
        "square masks"
    )


def latent_mask(mask: MaskLike, size: tuple[int, int]) -> Tensor:
    """A mask at latent resolution: bool ``[n, h, w]`` on the CPU.

    Args:
        mask: bool ``[n, h, w]`` or ``[h, w]`` of the latents' size, taken as it is and possibly empty; or whatever
            :func:`~fisedit_compile.masks.user_mask.as_mask` takes, of the picture's proportions.
        size: (height, width) of the latents.

    Raises:
        MaskError: other proportions, or a mask that ``as_mask`` refuses.
    """
    given: Any = mask
    several = isinstance(given, list | tuple)
    for each in given if several else (given,):
        shape = each.size[::-1] if isinstance(each, Image.Image) else np.shape(each)[-2:]
        # The two differ by a pixel or more when one is stretched to the height of the other.
        if len(shape) == 2 and abs(shape[0] * size[1] - shape[1] * size[0]) >= max(size):
            raise MaskError(
                f"a mask of {shape[0]}x{shape[1]} for latents of {size[0]}x{size[1]}: give one of their size, of the "
                "picture's, or of the same proportions"
            )
    if not several and np.shape(given)[-2:] == size and np.ndim(given) in (2, 3):
        values = torch.as_tensor(given)
        if values.dtype == torch.bool:
            return values.cpu().reshape(-1, *size)
    samples = len(given) if several or np.ndim(given) > 2 else 1
    return as_mask(mask, samples=samples, size=size, device="cpu")
