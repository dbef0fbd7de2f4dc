"""Pictures as files: what is taken from clients, and what is given to them."""

from __future__ import annotations

import hashlib
import io
import warnings
import zlib
from typing import Any

from PIL import Image, ImageChops, ImageOps

#: Formats of files that are read, of all that Pillow knows.
_FORMATS = ("PNG", "JPEG", "WEBP")


class PictureError(ValueError):
    """A file that is no picture, or one that is not taken."""


def read_picture(data: bytes, *, most_pixels: int) -> Image.Image:
    """The picture in a file; its size is known before a pixel is decoded.

    Raises:
        PictureError: no PNG, JPEG or WebP file; more pixels than ``most_pixels``, several frames, or a damaged file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = picture.size
        if width * height > most_pixels:
            raise PictureError(f"a picture of {width}x{height} pixels: at most {most_pixels} are taken")
        if getattr(picture, "n_frames", 1) > 1:
            raise PictureError("a picture of several frames: give one of them")
        picture.load()
    except PictureError:
        raise
    except Exception as error:  # decoders raise errors of many kinds for files that somebody made up
        raise PictureError(
            f"the file is no PNG, JPEG or WebP picture that can be read ({type(error).__name__})"
        ) from None
    return picture


def photo_png(picture: Image.Image) -> bytes:
    """A picture upright, in RGB, on white where it is transparent."""
    upright = ImageOps.exif_transpose(picture)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return as_png(upright.convert("RGB"))


def mask_png(mask: Image.Image) -> bytes:
    """A mask as the editor takes it, PNG of mode L, white where to edit.

    Where the file has transparency it is OpenAI's kind, which is edited where it is transparent; else white is edited.

    Raises:
        PictureError: it marks nothing.
    """
    if mask.has_transparency_data:
        marked = ImageChops.invert(mask.convert("RGBA").getchannel("A"))
    else:
        marked = mask.convert("L")
    if not marked.point(lambda value: value >= 128 and 255).getbbox():
        raise PictureError("the mask marks nothing: make it transparent where the picture is to change, or white")
    return as_png(marked)


def as_png(picture: Any) -> bytes:
    """The file of a PIL image; compressed by runs of equal bytes alone, as all else takes longer than an edit."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return file.getvalue()


def of_png(data: bytes) -> Image.Image:
    """The picture of a file that this process or another of the service wrote."""
    picture = Image.open(io.BytesIO(data), formats=("PNG",))
    picture.load()
    return picture


def pixels_digest(picture: Image.Image) -> str:
    """A hexadecimal key of the size and pixels of a picture, whatever file it lies in."""
    rgb = picture.convert("RGB")
    return hashlib.blake2b(repr(rgb.size).encode() + rgb.tobytes(), digest_size=16).hexdigest()
