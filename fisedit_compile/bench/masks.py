"""The masks that a benchmark edits with: squares of a given area, or real ones from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fisedit_compile.masks.sample_masks import read_masks, square_mask
from fisedit_compile.masks.user_mask import as_mask

#: Places of squares follow one another by the golden ratio, so that no few of them lie in a row.
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class MaskSet:
    """Masks whose mean makes one row of a benchmark.

    Attributes:
        edit_size: the share of the picture asked for; for masks of a file, their mean share at latent resolution.
        masks: each bool ``[1, h, w]``.
        source: ``"square"`` or the name of the file.
        empty: masks of the file that were left out because nothing is active in them.
    """

    edit_size: float
    masks: list[Tensor]
    source: str
    empty: int = 0

    @property
    def active(self) -> float:
        """The mean share of active latent cells."""
        return _mean_share(self.masks)

    @classmethod
    def square(cls, edit_size: float, size: tuple[int, int]) -> MaskSet:
        """One square in the middle; see :func:`~fisedit_compile.masks.sample_masks.square_mask`."""
        return cls(edit_size, [square_mask(edit_size, size)], "square")

    @classmethod
    def of_file(cls, path: Path, size: tuple[int, int], most: int) -> MaskSet:
        """Up to ``most`` masks, evenly spaced over those of a file that are not empty, any-pooled to ``size``.

        Where the size of latents does not divide a mask's, a cell is active if an active pixel overlaps it, which
        enlarges the mask a little: ``edit_size`` is what came out.

        Raises:
            ValueError: not a file that :func:`~fisedit_compile.masks.sample_masks.read_masks` reads, or no mask with an
                active pixel in it.
        """
        masks = read_masks(path)
        filled = masks[masks.flatten(1).any(dim=1)]
        if not len(filled):
            raise ValueError(f"{path}: none of the {len(masks)} masks has an active pixel")
        spaced = torch.linspace(0, len(filled) - 1, min(most, len(filled))).round().long()
        pooled = [as_mask(mask, samples=1, size=size) for mask in filled[spaced]]
        return cls(_mean_share(pooled), pooled, path.name, empty=len(masks) - len(filled))


def scattered_squares(edit_size: float, size: tuple[int, int], count: int) -> list[Tensor]:
    """``count`` squares of one area at different places, as far as there is room: each bool ``[1, h, w]``.

    See :func:`~fisedit_compile.masks.sample_masks.square_mask` for ``edit_size`` and ``size``.
    """
    middle = square_mask(edit_size, size)[0]
    rows, columns = int(middle.any(1).sum()), int(middle.any(0).sum())
    squares = []
    for i in range(count):
        top = round((i + 0.5) / count * (size[0] - rows))
        left = round((i + 1) * _GOLDEN % 1 * (size[1] - columns))
        square = torch.zeros(1, *size, dtype=torch.bool)
        square[:, top : top + rows, left : left + columns] = True
        squares.append(square)
    return squares


def _mean_share(masks: list[Tensor]) -> float:
    return sum(float(mask.float().mean()) for mask in masks) / len(masks)
