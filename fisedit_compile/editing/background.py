"""The background in pixels: outside what an edit changed, its picture is the base's, bit for bit.

Latents outside the mask are the base's, yet the VAE's decoder spreads a change over the whole picture: its group norms
and attention see everything. What its convolutions spread is local. So a picture has the edit's pixels at and around
the mask, the base's further away, and a short feather between.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

logger = logging.getLogger(__name__)

#: Shares of the decoder's reach, from the mask outwards: over the first the picture is the edit's, over the second it
#: fades to the base's. Chosen by measuring seams and what is cut off (docs/decisions.md, 2026-11-27).
GROWN, FEATHERED = 1 / 8, 1 / 5

#: Latent cells on a side of the picture that a decoder's layers are listed for; its reach is the same at any size.
_PROBE = 16

_OTHERWISE = "pass background='latents' to take the picture as the decoder gives it"


def decoder_reach(vae: Any) -> int:
    """How far the convolutions of a VAE's decoder carry a change of one latent cell, in pixels of the picture.

    Each convolution adds half its (dilated) kernel at its own resolution. Group norms and attention, which reach
    everywhere, are left out. Convolutions of parallel branches are added up as if one followed the other, so the
    result may be too large, never too small.

    Args:
        vae: a diffusers autoencoder with ``decode``. It is built again from its config, without values, once a config.

    Raises:
        ValueError: an autoencoder that cannot be built and run so.
    """
    kind: Any = type(vae)
    try:
        return _reach_of(kind, vae.to_json_string())
    except Exception as error:
        raise ValueError(
            f"the decoder of {kind.__name__} cannot be built from its config to see how far it spreads a change; "
            f"{_OTHERWISE}"
        ) from error


@lru_cache(maxsize=8)
def _reach_of(kind: Callable[..., Any], config: str) -> int:
    known = inspect.signature(kind.__init__).parameters
    with torch.device("meta"):
        vae = kind(**{name: value for name, value in json.loads(config).items() if name in known}).eval()
        latents = torch.empty(1, vae.config.latent_channels, _PROBE, _PROBE)
    added: list[tuple[int, int]] = []  # cells that a convolution adds on a side, and the height of its output in cells

    def note(conv: Any, _: object, out: Tensor) -> None:
        widths = [dilation * (kernel - 1) for dilation, kernel in zip(conv.dilation, conv.kernel_size, strict=True)]
        if isinstance(conv, nn.ConvTranspose2d):  # one cell becomes as many as its stride: these add nothing
            widths = [width + 1 - stride for width, stride in zip(widths, conv.stride, strict=True)]
        added.append((-(-max(0, *widths) // 2), out.shape[-2]))

    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        height = vae.decode(latents, return_dict=False)[0].shape[-2]
    return round(sum(cells * height / out_height for cells, out_height in added))


@dataclass(frozen=True)
class PixelBackground:
    """How the pictures of a base and its edits are put together.

    Attributes:
        shape: height, width and channels of a picture.
        grown: pixels around the mask that are the edit's.
        feathered: pixels over which these fade; from ``grown + feathered`` pixels on everything is the base's.
    """

    shape: tuple[int, ...]
    grown: int
    feathered: int

    def cells(self, latents: Tensor) -> int:
        """Latent cells around the mask within which an edit has to be decoded.

        That is as far as pixels of it are taken, and one cell more, since a sparse decode is wrong near its rim
        (docs/decisions.md, 2026-11-27).

        Args:
            latents: of the base, ``[n, c, h, w]``.
        """
        return -(-(self.grown + self.feathered) * latents.shape[2] // self.shape[0]) + 1

    @classmethod
    def of(cls, pipe: Any, pictures: Any, latents: Tensor, arguments: Mapping[str, Any]) -> PixelBackground:
        """For the pictures of a base, before any edit is computed.

        Args:
            pipe: the pipeline; the decoder of its ``vae`` says how far a change spreads.
            pictures: of the base: PIL images, an array ``[n, H, W, channels]`` or a tensor ``[n, channels, H, W]``.
            latents: of the base, ``[n, c, h, w]``; H and W are multiples of h and w.
            arguments: the other arguments of the pipeline's call.

        Raises:
            ValueError: pictures that an edit's cannot be put together with: of an unknown kind, not one for each
                sample's latents, without a VAE, or pasted into a larger picture (``padding_mask_crop``).
        """
        if arguments.get("padding_mask_crop") is not None:
            raise ValueError(f"padding_mask_crop pastes what is decoded into a larger picture; {_OTHERWISE}")
        if getattr(pipe, "vae", None) is None:
            raise ValueError(f"{type(pipe).__name__} has no vae that its pictures are decoded by; {_OTHERWISE}")
        planes = _planes(pictures)
        shape, cells = tuple(planes[0].shape), tuple(latents.shape[-2:])
        if len(planes) != len(latents) or any(plane.shape != shape for plane in planes):
            raise ValueError(
                f"the base has {len(planes)} picture(s) for {len(latents)} sample(s), or pictures of several sizes; "
                f"{_OTHERWISE}"
            )
        if shape[0] % cells[0] or shape[1] % cells[1]:
            raise ValueError(
                f"a picture of {shape[0]}x{shape[1]} pixels is not decoded from {cells[0]}x{cells[1]} latent cells "
                f"alone, which would be whole pixels each; {_OTHERWISE}"
            )
        reach = decoder_reach(pipe.vae)
        grown = round(GROWN * reach)
        return cls(shape, grown, max(1, round((GROWN + FEATHERED) * reach) - grown))

    def compose(
        self,
        base: Any,
        edit: Any,
        mask: Tensor,
        *,
        base_flags: Sequence[bool] | None = None,
        edit_flags: Sequence[bool] | None = None,
    ) -> tuple[Any, tuple[int, ...]]:
        """Put together the pictures of an edit and of its base; neither is changed.

        Args:
            base: the pictures of the base.
            edit: those of the edit as the pipeline returned them, of the same kind.
            mask: bool ``[n, h, w]`` at latent resolution.
            base_flags, edit_flags: which of them the safety checker blackened; None where none checked.

        Returns:
            Pictures of the kind of ``edit``, and the samples whose picture is left as it is in ``edit``, because the
            safety checker blackened it or the base's. A warning is logged that names these.

        Raises:
            ValueError: the edit's pictures are not of the base's count, size and channels.
        """
        olds, news = _planes(base), _planes(edit)
        if len(news) != len(olds) or any(tuple(plane.shape) != self.shape for plane in news):
            raise ValueError(
                f"the edit has {len(news)} picture(s) of shape {tuple(news[0].shape)}, the base {len(olds)} of "
                f"{self.shape}: they have to be alike; {_OTHERWISE}"
            )
        flags = [[False] * len(news) if each is None else each for each in (base_flags, edit_flags)]
        blackened = tuple(sample for sample, pair in enumerate(zip(*flags, strict=True)) if any(pair))
        if blackened:
            logger.warning(
                "the safety checker blackened the picture of sample(s) %s or of the base: each is as the pipeline "
                "returned it, and its background is not the base's",
                ", ".join(map(str, blackened)),
            )
        weights = self.weights(mask)
        weights[list(blackened)] = 1
        weights = weights[..., None].to(news[0].device)  # [n, H, W, 1]
        return _like(edit, [_blend(*each) for each in zip(olds, news, weights, strict=True)]), blackened

    def weights(self, mask: Tensor) -> Tensor:
        """Share of the edit in each pixel, fp32 ``[n, H, W]``: exactly 1 near the mask, exactly 0 far from it.

        Args:
            mask: bool ``[n, h, w]`` at latent resolution.
        """
        size = self.shape[:2]
        region = F.interpolate(mask[:, None].float(), size=(size[0], size[1]), mode="nearest")
        region = _dilate(region, self.grown)
        layers = region
        for _ in range(self.feathered - 1):
            region = _dilate(region, 1)
            layers = layers + region  # whole numbers: exact
        return (layers / self.feathered)[:, 0]


def _dilate(region: Tensor, pixels: int) -> Tensor:
    """Grow the ones of ``[n, 1, H, W]`` by as many pixels in all directions, one direction after the other."""
    region = F.max_pool2d(region, (2 * pixels + 1, 1), stride=1, padding=(pixels, 0))
    return F.max_pool2d(region, (1, 2 * pixels + 1), stride=1, padding=(0, pixels))


def _planes(pictures: Any) -> list[Tensor]:
    """Each picture as ``[H, W, channels]``, whatever the pipeline's ``output_type``."""
    if isinstance(pictures, list) and pictures and all(isinstance(each, Image.Image) for each in pictures):
        return [torch.from_numpy(np.array(each.convert("RGB"))) for each in pictures]
    if isinstance(pictures, np.ndarray) and pictures.ndim == 4 and len(pictures):
        return list(torch.from_numpy(pictures))
    if isinstance(pictures, Tensor) and pictures.ndim == 4 and len(pictures):
        return list(pictures.movedim(1, -1))
    what = f"a {type(pictures).__name__}" + (f" of shape {tuple(pictures.shape)}" if hasattr(pictures, "shape") else "")
    raise ValueError(
        f"the pipeline returned its pictures as {what}, not as output_type 'pil', 'np' or 'pt'; {_OTHERWISE}"
    )


def _blend(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """``weight`` of the new picture over the old one; bit for bit one of them where the weight is 1 or 0."""
    old = old.to(new.device)
    mixed = old.float() + weight * (new.float() - old.float())
    mixed = (mixed if new.is_floating_point() else mixed.round()).to(new.dtype)
    return torch.where(weight == 1, new, torch.where(weight == 0, old, mixed))


def _like(pictures: Any, planes: list[Tensor]) -> Any:
    """Planes ``[H, W, channels]`` as the kind of pictures that was given."""
    if isinstance(pictures, Tensor):
        return torch.stack(planes).movedim(-1, 1).contiguous()
    if isinstance(pictures, np.ndarray):
        return torch.stack(planes).numpy()
    return [Image.fromarray(plane.numpy()) for plane in planes]
