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

import torch
from torch import Tensor, nn

from fisedit_compile.editing.feather import cells_reached, feather_levels
from fisedit_compile.editing.picture_planes import OTHERWISE, like, part, separate, shapes, with_part
from fisedit_compile.utils.single_thread import single_thread

logger = logging.getLogger(__name__)

#: Shares of the decoder's reach, from the mask outwards: over the first the picture is the edit's, over the second it
#: fades to the base's. Chosen by measuring seams and what is cut off (docs/decisions.md, 2026-11-27).
GROWN, FEATHERED = 1 / 8, 1 / 5

#: Latent cells on a side of the picture that a decoder's layers are listed for; its reach is the same at any size.
_PROBE = 16


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
            f"{OTHERWISE}"
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
            raise ValueError(f"padding_mask_crop pastes what is decoded into a larger picture; {OTHERWISE}")
        if getattr(pipe, "vae", None) is None:
            raise ValueError(f"{type(pipe).__name__} has no vae that its pictures are decoded by; {OTHERWISE}")
        found = shapes(pictures)
        shape, cells = found[0], tuple(latents.shape[-2:])
        if len(found) != len(latents) or set(found) != {shape}:
            raise ValueError(
                f"the base has {len(found)} picture(s) for {len(latents)} sample(s), or pictures of several sizes; "
                f"{OTHERWISE}"
            )
        if shape[0] % cells[0] or shape[1] % cells[1]:
            raise ValueError(
                f"a picture of {shape[0]}x{shape[1]} pixels is not decoded from {cells[0]}x{cells[1]} latent cells "
                f"alone, which would be whole pixels each; {OTHERWISE}"
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
            mask: bool ``[n, h, w]`` at latent resolution, on the host.
            base_flags, edit_flags: which of them the safety checker blackened; None where none checked.

        Returns:
            Pictures of the kind of ``edit``, and the samples whose picture is left as it is in ``edit``, because the
            safety checker blackened it or the base's. A warning is logged that names these.

        Raises:
            ValueError: the edit's pictures are not of the base's count, size and channels.
        """
        olds, news = separate(base), separate(edit)
        found = shapes(edit)
        if len(news) != len(olds) or set(found) != {self.shape}:
            raise ValueError(
                f"the edit has {len(news)} picture(s) of shape {found[0]}, the base {len(olds)} of {self.shape}: they "
                f"have to be alike; {OTHERWISE}"
            )
        flags = [[False] * len(news) if each is None else each for each in (base_flags, edit_flags)]
        blackened = tuple(sample for sample, pair in enumerate(zip(*flags, strict=True)) if any(pair))
        if blackened:
            logger.warning(
                "the safety checker blackened the picture of sample(s) %s or of the base: each is as the pipeline "
                "returned it, and its background is not the base's",
                ", ".join(map(str, blackened)),
            )
        with single_thread():  # as fast as several threads, and many times faster where other programs run
            composed = [
                new if sample in blackened else self._compose(old, new, mask[sample])
                for sample, (old, new) in enumerate(zip(olds, news, strict=True))
            ]
        return like(edit, composed), blackened

    def weights(self, mask: Tensor) -> Tensor:
        """Share of the edit in each pixel, fp32 ``[n, H, W]``: exactly 1 near the mask, exactly 0 far from it.

        Args:
            mask: bool ``[n, h, w]`` at latent resolution, on the host.
        """
        return self._levels(mask, self._cell(mask)) / self.feathered

    def _compose(self, old: Any, new: Any, mask: Tensor) -> Any:
        """Both pictures as one; what is further from the mask than it reaches is only copied.

        Args:
            old, new: each an image, or a plane ``[H, W, channels]``.
            mask: bool ``[h, w]``.
        """
        cell = self._cell(mask)
        (top, bottom), (left, right) = self._box(mask, cell) or ((0, 0), (0, 0))
        rows, columns = slice(top * cell[0], bottom * cell[0]), slice(left * cell[1], right * cell[1])
        edited = part(new, rows, columns)
        if edited.numel():
            levels = self._levels(mask[None, top:bottom, left:right], cell)[0]
            edited = _blend(part(old, rows, columns).to(edited.device), edited, levels, self.feathered)
        return with_part(old, rows, columns, edited)

    def _levels(self, mask: Tensor, cell: tuple[int, int]) -> Tensor:
        return feather_levels(mask, cell, self.grown, self.feathered)

    def _cell(self, mask: Tensor) -> tuple[int, int]:
        """Height and width in pixels of a latent cell."""
        return self.shape[0] // mask.shape[-2], self.shape[1] // mask.shape[-1]

    def _box(self, mask: Tensor, cell: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """First and last row and column, exclusive, of the cells that hold something of the edit; None without any."""
        if not mask.any():
            return None
        spans = []
        for pixels, active in zip(cell, (mask.any(1), mask.any(0)), strict=True):
            cells, reach = active.nonzero(), cells_reached(pixels, self.grown, self.feathered)
            spans.append((max(0, int(cells[0]) - reach), min(len(active), int(cells[-1]) + 1 + reach)))
        return spans[0], spans[1]


def _blend(old: Tensor, new: Tensor, levels: Tensor, full: int) -> Tensor:
    """``levels / full`` of the new picture over the old one, bit for bit one of them where that is 1 or 0.

    Args:
        old, new: ``[H, W, channels]``.
        levels: whole numbers from 0 to ``full``, ``[H, W]``, on the host.
    """
    between = ((levels > 0) & (levels < full)).flatten().nonzero()[:, 0]  # few: only these are computed with
    weights = (levels.flatten()[between] / full)[:, None].to(new.device)
    between = between.to(new.device)
    before, after = (each.reshape(-1, each.shape[-1])[between].float() for each in (old, new))
    mixed = before + weights * (after - before)
    mixed = (mixed if new.is_floating_point() else mixed.round()).to(new.dtype)
    blended = torch.where((levels == full).to(new.device)[..., None], new, old)
    return blended.reshape(-1, new.shape[-1]).index_copy(0, between, mixed).view(new.shape)
