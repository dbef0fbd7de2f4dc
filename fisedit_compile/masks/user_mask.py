"""A mask that the user gives, of any image size, brought to latent resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
import torch
import torch.nn.functional as F

from fisedit_compile.errors import MaskError

if TYPE_CHECKING:
    from PIL import Image

SingleMask: TypeAlias = Union[torch.Tensor, np.ndarray, "Image.Image"]
MaskLike: TypeAlias = SingleMask | Sequence[SingleMask]

_WANTED = (
    "a mask is a torch tensor, numpy array or PIL image (or a sequence with one of them a sample) of shape "
    "[H, W], [samples, H, W] or [samples, 1, H, W]: bool, uint8 in 0..255 or float in [0, 1]"
)

#: Resizing a soft mask leaves values this far outside [0, 1].
_SLACK = 1e-3

#: What can be compared with a threshold on every device. Quantized, 8-bit float and sub-byte types cannot.
_DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_DTYPES |= {torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64}


def as_mask(
    mask: MaskLike, *, samples: int, size: tuple[int, int], device: torch.device | str | None = None
) -> torch.Tensor:
    """Read a user's mask and pool it to latent resolution.

    A pixel is active from 0.5 on (128 of 255); a latent cell is active if any active pixel lies on it. The
    mask is stretched over the picture, so any image size fits; one that is smaller than the latents is
    enlarged by the same rule (for whole factors: nearest). PIL images are read as greyscale, white is edited;
    of strokes on a transparent layer, in the layer's colour or in white, what is opaque is edited.

    Args:
        mask: torch tensor, numpy array, PIL image, or a sequence with one of them (sizes may differ) for each
            sample. Shapes ``[H, W]``, ``[samples, H, W]``, ``[samples, 1, H, W]``; one mask serves all
            samples. bool; uint8 0..255; other integers 0 and 1; float in [0, 1].
        samples: number of samples in the base.
        size: height and width of the latents, in cells.
        device: where the result goes; default: where the mask is.

    Returns:
        bool ``[samples, h, w]``.

    Raises:
        MaskError: another type or rank, another number of samples, NaN or infinity, values outside the range,
            a sample without an active pixel, an image whose colours and alpha mark different regions, or a tensor
            without readable values (meta, sparse, quantized, 8-bit floats). It says what was given, what is wanted
            and what to do.
    """
    if isinstance(mask, (list, tuple)):
        if not mask:
            raise MaskError(f"an empty sequence was given as mask; {_WANTED}")
        pooled: list[torch.Tensor] = []
        for position, item in enumerate(mask):
            part = _pool(_active_pixels(item), size)
            if part.shape[0] != 1:
                raise MaskError(
                    f"item {position} of the sequence of masks holds {part.shape[0]} masks; give one a "
                    "sample, or all of them as one tensor [samples, H, W]"
                )
            pooled.append(part.to(device if device is not None or not pooled else pooled[0].device))
        cells = torch.cat(pooled)
    else:
        cells = _pool(_active_pixels(mask), size)
    if cells.shape[0] not in (1, samples):
        raise MaskError(
            f"{cells.shape[0]} masks were given for {samples} sample(s); give one for all or one for each (of an "
            "image array with colour channels [H, W, 3] or with alpha [H, W, 4], give the greyscale or the alpha alone)"
        )
    active = cells.flatten(1).any(dim=1)
    if not active.all():
        raise MaskError(
            f"mask {int((~active).nonzero()[0])} has no active pixel (0.5 and more; 128 of 255 and more "
            "for uint8), so there is nothing to edit; mark the region, or leave the mask out to have it found"
            + (" (a uint8 mask of 0 and 1 has to be given as bool)" if _is_zero_one_uint8(mask) else "")
        )
    return cells.expand(samples, -1, -1).to(device if device is not None else cells.device).contiguous()


def _is_zero_one_uint8(mask: MaskLike) -> bool:
    if isinstance(mask, (torch.Tensor, np.ndarray)):
        return mask.dtype in (torch.uint8, np.uint8) and int(mask.max()) == 1
    return False


def _as_tensor(mask: object) -> torch.Tensor:
    from PIL import Image  # imported by then if the user has one

    if isinstance(mask, torch.Tensor):
        return _readable(mask)
    if isinstance(mask, Image.Image):
        mask = _grey_or_alpha(mask)
    if isinstance(mask, np.ma.MaskedArray):
        raise MaskError(
            "a masked numpy array was given as mask; say what its hidden cells are by mask.filled(0) or (1)"
        )
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "biuf":
        native = mask.astype(np.int64) if mask.dtype.kind in "iu" and mask.dtype != np.uint8 else mask
        native = native.astype(np.float64) if mask.dtype.kind == "f" else native
        return torch.from_numpy(np.array(native))  # a copy: arrays of PIL are read-only
    what = f"a numpy array of {mask.dtype}" if isinstance(mask, np.ndarray) else f"a {type(mask).__name__}"
    raise MaskError(f"{what} was given as mask; {_WANTED}")


def _readable(mask: torch.Tensor) -> torch.Tensor:
    """The tensor, if it holds values that can be compared."""
    if mask.layout != torch.strided:
        raise MaskError(f"a mask of layout {mask.layout} was given; give a dense tensor: mask.to_dense()")
    if mask.is_meta:
        raise MaskError("the mask lies on the meta device, so it has no values; give it on the CPU or a GPU")
    if mask.is_quantized:
        raise MaskError(f"a quantized mask ({mask.dtype}) was given; give mask.dequantize()")
    if mask.dtype not in _DTYPES:
        raise MaskError(f"a mask of {mask.dtype} was given; give mask.float(), or another of these: {_WANTED}")
    return mask.detach()


def _grey_or_alpha(image: Image.Image) -> np.ndarray:
    """The one channel of an image that is the mask: its greyscale, or its alpha where only that varies."""
    if image.mode in ("F", "I", "I;16", "I;16B", "I;16L"):  # a conversion to 8 bits would clip: their own values count
        return np.asarray(image)
    try:
        if not image.has_transparency_data or 0 in image.size:
            return np.asarray(image.convert("L"))
        pixels = np.asarray(image.convert("RGBA"))
        colours, alpha = pixels[..., :3], pixels[..., 3]
    except ValueError as error:  # Pillow converts LAB, say, to nothing that has a greyscale
        raise MaskError(f"a mask image of mode {image.mode} was given; give mask.convert('L')") from error
    if alpha.min() == alpha.max() != 0:
        return np.asarray(image.convert("RGB").convert("L"))
    if (colours == colours[0, 0]).all() or (colours[alpha > 0] == 255).all():
        return alpha
    raise MaskError(
        f"the mask image ({image.mode}) has an alpha channel that marks another region than its colours do, so it is "
        "unclear what to edit; give mask.convert('RGBA').getchannel('A') to edit what is opaque, PIL.ImageOps.invert "
        "of that to edit what is transparent, or mask.convert('RGB') to edit what is white"
    )


def _active_pixels(mask: object) -> torch.Tensor:
    """bool ``[k, H, W]`` of one item, with rank, dtype and values checked."""
    values = _as_tensor(mask)
    given = tuple(values.shape)
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    elif values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or values.numel() == 0:
        raise MaskError(f"a mask of shape {given} was given; {_WANTED}")
    if values.dtype == torch.bool:
        return values
    if values.dtype == torch.uint8:
        return values >= 128
    if values.is_floating_point():
        if not values.isfinite().all():
            raise MaskError("the mask holds NaN or infinity; give finite values in [0, 1]")
        slack = _SLACK
    else:
        values, slack = values.long(), 0.0
    low, high = float(values.min()), float(values.max())
    if low < -slack or high > 1 + slack:
        raise MaskError(
            f"the mask's values reach from {low:g} to {high:g}, outside [0, 1] for {values.dtype}; "
            "divide by the largest, or convert to uint8 (0..255) or bool"
        )
    return values >= 0.5


def _pool(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Any-pool bool ``[k, H, W]`` to ``[k, h, w]``: a cell is active if an active pixel overlaps it."""
    return F.adaptive_max_pool2d(pixels.float(), size) > 0
