"""A photo of any size, the part of it that a model sees, and edits of that part put back into the photo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fisedit_compile.editing.picture_planes import like, planes
from fisedit_compile.errors import MaskError
from fisedit_compile.masks.user_mask import MaskLike, as_mask

_DIFFUSERS_MULTIPLE = 8  # pipelines of Stable Diffusion refuse other sides

#: How many times as large as the picture of its training the part of a photo may be that a model is shown. Beyond that
#: models repeat things, and their attention takes the square of it.
MOST_AREA = 4

_LATENT_SIDE = 64  # of U-Nets whose config does not say it: Stable Diffusion 1.5's

Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class PhotoFrame:
    """Where the pictures of a model lie in photos of one size.

    A side that the model does not take is continued to the right and below by its mirror image, which is cut off again.

    Attributes:
        photos: the whole photos, upright RGB; never written to.
        box: left, upper, right and lower edge of the part that the model sees, in pixels of the photo.
        size: width and height of the model's pictures: the box, continued.
    """

    photos: tuple[Image.Image, ...]
    box: Box
    size: tuple[int, int]

    @classmethod
    def of(cls, pipe: Any, photos: Sequence[Image.Image], box: Box | None) -> PhotoFrame:
        """The frame of photos for a pipeline.

        Args:
            pipe: the pipeline, whose VAE and U-Net say which sizes it takes.
            photos: upright RGB, of one size.
            box: see the attribute; None is all of the photo.

        Raises:
            ValueError: a box that is none, or not within the photo; a part that is too large for the model.
        """
        width, height = photos[0].size
        box = _checked(box, width, height)
        multiple = math.lcm(_DIFFUSERS_MULTIPLE, pipe.vae_scale_factor)
        sides = box[2] - box[0], box[3] - box[1]
        size = tuple(-(-side // multiple) * multiple for side in sides)
        own = _own_area(pipe)
        if size[0] * size[1] > MOST_AREA * own:
            side = math.isqrt(own)
            raise ValueError(
                f"a picture of {sides[0]}x{sides[1]}: {type(pipe).__name__} draws {side}x{side}, and is shown at most "
                f"{MOST_AREA} times as much; give box=(left, upper, right, lower) of the part to edit, the rest stays "
                "as it is, or a smaller picture"
            )
        return cls(tuple(photos), box, (size[0], size[1]))

    @property
    def is_whole(self) -> bool:
        """Whether the model's picture is the photo."""
        return self.size == self.photos[0].size and self.box == (0, 0, *self.size)

    def pictures(self, photos: Sequence[Image.Image] | None = None) -> list[Image.Image]:
        """What the model sees of the photos, or of others of their size."""
        return [self._picture(each) for each in photos or self.photos]

    def restored(self, pictures: Any) -> Any:
        """Pictures of the model as photos: inside the box theirs, outside the photo's own pixels.

        Args:
            pictures: PIL images, an array ``[n, H, W, channels]`` or a tensor ``[n, channels, H, W]`` with values in
                [0, 1], of the frame's size, one a photo.

        Returns:
            The same kind, of the photo's size.
        """
        left, upper, right, lower = self.box
        whole = []
        for photo, plane in zip(self.photos, planes(pictures), strict=True):
            out = torch.from_numpy(np.array(photo))
            if plane.is_floating_point():
                out = (out / 255).to(plane)
            out[upper:lower, left:right] = plane[: lower - upper, : right - left]
            whole.append(out)
        return like(pictures, whole)

    def mask_of_model(self, mask: MaskLike, latents: tuple[int, int]) -> MaskLike:
        """A mask of the photos, of any size, on the pictures of the model: bool ``[n, H, W]``.

        Args:
            mask: of the photos. A tensor or array of the size of the latents, as an edit's ``mask`` is, is one of the
                model's pictures already, and returned as it is.
            latents: height and width in cells.

        Raises:
            MaskError: nothing of it lies in the box, and what :func:`~fisedit_compile.masks.user_mask.as_mask` refuses.
        """
        if isinstance(mask, Tensor | np.ndarray) and tuple(mask.shape[-2:]) == latents:
            return mask
        width, height = self.photos[0].size
        left, upper, right, lower = self.box
        whole = as_mask(mask, samples=len(self.photos), size=(height, width), device="cpu")
        seen = torch.zeros(len(whole), self.size[1], self.size[0], dtype=torch.bool)
        seen[:, : lower - upper, : right - left] = whole[:, upper:lower, left:right]
        if not seen.flatten(1).any(dim=1).all():
            raise MaskError(f"nothing of the mask lies in the part of the photo that is edited, box={self.box}")
        return seen

    def mask_of_photo(self, mask: Tensor) -> Tensor:
        """A mask at latent resolution, bool ``[h, w]``, on the photo: bool ``[H, W]``, on the host."""
        width, height = self.photos[0].size
        left, upper, right, lower = self.box
        rows, columns = (side // cells for side, cells in zip(self.size[::-1], mask.shape, strict=True))
        seen = mask.cpu().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        whole = torch.zeros(height, width, dtype=torch.bool)
        whole[upper:lower, left:right] = seen[: lower - upper, : right - left]
        return whole

    def _picture(self, photo: Image.Image) -> Image.Image:
        part = np.asarray(photo.crop(self.box))
        missing = [size - side for size, side in zip(self.size[::-1], part.shape, strict=False)]
        return Image.fromarray(np.pad(part, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="reflect"))


def _checked(box: Any, width: int, height: int) -> Box:
    if box is None:
        return 0, 0, width, height
    try:
        left, upper, right, lower = (int(each) for each in box)
    except (TypeError, ValueError):
        raise ValueError(f"box={box!r}: give left, upper, right and lower edge in pixels") from None
    if not (0 <= left < right <= width and 0 <= upper < lower <= height):
        raise ValueError(
            f"box={box!r} is no part of a picture of {width}x{height}: left < right, upper < lower, within it"
        )
    return left, upper, right, lower


def _own_area(pipe: Any) -> int:
    """Pixels of the picture that the model was made for."""
    side = getattr(pipe.unet.config, "sample_size", None) or _LATENT_SIDE
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return int(height * width * pipe.vae_scale_factor**2)
