"""Pictures that no model drew: what is taken, and their latents."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

#: Modes of PIL that hold 8 bits a channel, or fewer, and whose colours are known.
_MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV")

#: What Pillow raises for files that are damaged.
_DAMAGED = (OSError, SyntaxError, ValueError, IndexError, struct.error)


def open_photo(path: Path) -> Image.Image:
    """The picture in a file, read to its end.

    Raises:
        OSError: no picture, or a file that is cut short.
        ValueError: one whose sides say that it would take more memory than any picture that is edited.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path}: a picture of too many pixels, give a smaller one ({error})") from None
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise OSError(f"{path}: no picture that can be read ({error})") from None
    return image


def read_photos(photo: Any) -> list[Image.Image]:
    """The pictures as upright RGB, all of one size.

    Args:
        photo: a PIL image, or a sequence of them. A rotation that its EXIF data ask for is done.

    Raises:
        ValueError: something else; several frames, transparency, or more than 8 bits a channel; pictures of several
            sizes, or one that cannot be read to its end.
    """
    several = list(photo) if isinstance(photo, Sequence) and not isinstance(photo, str) else [photo]
    if not several or not all(isinstance(each, Image.Image) for each in several):
        kind = type(photo).__name__ if len(several) == 1 else f"list of {len(several)}, not all of them pictures"
        raise ValueError(f"photo is a {kind}: give a PIL image, or a list of them (PIL.Image.open(path) reads a file)")
    photos = [_upright(each) for each in several]
    if any(each.size != photos[0].size for each in photos):
        sizes = ", ".join(f"{each.width}x{each.height}" for each in photos)
        raise ValueError(f"pictures of {sizes}: give pictures of one size")
    return photos


def _upright(image: Image.Image) -> Image.Image:
    try:
        frames = getattr(image, "n_frames", 1)
        image.load()
    except _DAMAGED as error:
        raise ValueError(f"the picture cannot be read to its end ({error}): give an undamaged one") from None
    if frames > 1:
        raise ValueError(f"a picture of {frames} frames: give one of them (image.seek(i); image.copy())")
    if image.mode not in _MODES:
        raise ValueError(
            f"a picture of mode {image.mode!r}, which is not 8 bits a channel: scale its values to 0..255 and give an "
            "8-bit picture"
        )
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        if np.asarray(upright.getchannel("A")).min() < 255:
            raise ValueError(
                "the picture is transparent in parts, where it has no colour: paste it on a background and give that"
            )
    return upright.convert("RGB")


@torch.no_grad()
def encode(pipe: Any, photos: Sequence[Image.Image], dtype: torch.dtype) -> Tensor:
    """The latents of pictures, ``[n, c, h, w]``: the mean that the VAE's encoder gives, scaled as pipelines scale it.

    Args:
        pipe: the pipeline, whose VAE is cast to fp32 and back where its config says that it needs that.
        photos: RGB, of a size that the pipeline takes.
        dtype: of the result.
    """
    vae = pipe.vae
    pixels = torch.from_numpy(np.stack([np.asarray(each) for each in photos])).permute(0, 3, 1, 2)
    before, wide = vae.dtype, getattr(vae.config, "force_upcast", False) and vae.dtype == torch.float16
    if wide:
        vae.to(torch.float32)
    try:
        encoded = vae.encode((pixels.to(pipe._execution_device, vae.dtype) / 127.5) - 1)
    finally:
        if wide:
            vae.to(before)
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (mean, std))
        latents = (latents - mean) / std
    else:
        latents = latents - (getattr(vae.config, "shift_factor", None) or 0)
    return (latents * vae.config.scaling_factor).to(dtype)
