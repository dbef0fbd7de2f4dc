"""Where the words stood that an edit takes away, by the cross-attention maps that the base keeps.

The first steps of an edit show little of what becomes of a large thing, a background above all: where its old and new
latents happen to be alike the difference between them says that nothing changes. But the pixels of a thing attend to
its words, so that the base itself says where all of it stood (Hertz et al., "Prompt-to-Prompt Image Editing with Cross
Attention Control", 2022, their section 3.1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit_compile.ir.layout import Size
from fisedit_compile.masks.difference_mask import close_holes, otsu_threshold

#: Share of where the old words stood that has to be found changed for all of it to be taken. Of a thing that goes as a
#: whole half and more is, of one that loses a hat, with whose words the whole of it is in touch, a third and less
#: (docs/measurements/masks.md).
_GOES_AS_A_WHOLE = 0.4


def attention_to(words: Tensor, maps: Iterable[Tensor], size: Size) -> Tensor:
    """How strongly each latent cell attends to some words, ``[n, h, w]`` fp32, mean over all attentions and heads.

    Args:
        words: positions of their tokens, bool ``[n, T]``, on the device of the maps.
        maps: of the cross-attentions of one U-Net call, ``[n*H*W, heads, L]`` each, of the first L tokens. Those of a
            resolution that is not that of the latents halved once or more are left out.
        size: of the latents, (h, w).
    """
    sums: dict[Size, list[Tensor]] = defaultdict(list)
    for each in maps:
        pixels = len(each) // len(words)
        if (of := _halved(size, pixels)) is None:
            continue
        weights = words[:, : each.shape[2]].to(each.dtype)
        attended = each.view(len(words), -1, each.shape[2]) @ weights[:, :, None]
        sums[of].append(attended.view(len(words), pixels, -1).float().mean(2))
    total = torch.zeros(len(words), *size, device=words.device)
    for of, found in sums.items():
        level = torch.stack(found).mean(0).view(len(words), 1, *of)
        total += F.interpolate(level, size, mode="bilinear")[:, 0] / len(sums)
    return total


def with_old_words(found: Tensor, attention: Tensor) -> Tensor:
    """A mask of what changes, and of samples that lose a thing as a whole all of where it stood.

    Args:
        found: bool ``[n, h, w]``.
        attention: of :func:`attention_to`; samples that lose no words have none.

    Returns:
        bool ``[n, h, w]``; ``found`` is part of it.
    """
    stood = attention > otsu_threshold(attention)[:, None, None]
    covered = (stood & found).sum((1, 2)) >= _GOES_AS_A_WHOLE * stood.sum((1, 2))
    whole = close_holes(found | stood)
    return torch.where((covered & stood.any(2).any(1))[:, None, None], whole, found)


def _halved(size: Size, pixels: int) -> Size | None:
    """The size that has so many pixels, of latents and their levels; None where none has."""
    height, width = size
    while height * width > pixels:
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == pixels else None
