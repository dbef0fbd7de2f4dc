"""The masks that a benchmark edits with: squares of a given area, or real ones from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fisedit_compile.masks.sample_masks import read_masks, square_mask
from fisedit_compile.masks.user_mask import as_mask

#: Each square lies this share of the width further to the right than the one before, so that even a few are well
#: spread.
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class MaskSet:
    """Masks whose mean makes one row of a benchmark.

    Attributes:
        edit_size: the share of the picture that was asked for; for masks of a file, their mean share of the latents.
        masks: the masks at latent resolution, each bool ``[1, h, w]``.
        source: ``"square"``, or the name of the file.
        empty: how many masks of the file were left out because they have no active pixel.
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
        """One square in the middle of the latents; see :func:`~fisedit_compile.masks.sample_masks.square_mask`."""
        return cls(edit_size, [square_mask(edit_size, size)], "square")

    @classmethod
    def of_file(cls, path: Path, size: tuple[int, int], most: int) -> MaskSet:
        """Up to ``most`` masks of a file, evenly spaced over those that are not empty, any-pooled to ``size``.

        If the size of the latents does not divide that of a mask, a cell is active wherever an active pixel overlaps
        it, which enlarges the mask a little; ``edit_size`` is the share after that.

        Raises:
            ValueError: :func:`~fisedit_compile.masks.sample_masks.read_masks` cannot read the file, or none of its
                masks has an active pixel.
        """
        masks = read_masks(path)
        filled = masks[masks.flatten(1).any(dim=1)]
        if not len(filled):
            raise ValueError(f"{path}: none of the {len(masks)} masks has an active pixel")
        spaced = torch.linspace(0, len(filled) - 1, min(most, len(filled))).round().long()
        pooled = [as_mask(mask, samples=1, size=size) for mask in filled[spaced]]
        return cls(_mean_share(pooled), pooled, path.name, empty=len(masks) - len(filled))


def scattered_squares(edit_size: float, size: tuple[int, int], count: int) -> list[Tensor]:
    """``count`` squares of one area, each bool ``[1, h, w]``, at different places as far as there is room.

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
