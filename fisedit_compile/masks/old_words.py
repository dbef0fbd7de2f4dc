"""Where the words stood that an edit takes away, by the cross-attention maps that the base keeps.

The first steps of an edit show little of what becomes of a large thing, a background above all: where its old and new
latents happen to be alike the difference between them says that nothing changes. But the pixels of a thing attend to
its words, so that the base itself says where all of it stood (Hertz et al., "Prompt-to-Prompt Image Editing with Cross
Attention Control", 2022, their section 3.1).

Where an edit changes several things the difference of one, a background's say, may be so much larger than that of the
others that these lie under the threshold between what changes and what does not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit_compile.ir.layout import Size
from fisedit_compile.masks.difference_mask import WEAK, close_holes, mean_where, otsu_threshold, spread
from fisedit_compile.masks.grown import grown

#: Share of where the old words stood that has to be found changed for all of it to be taken. Of a thing that goes as a
#: whole half and more is, of one that loses a hat, with whose words the whole of it is in touch, a third and less
#: (docs/measurements/masks.md).
_GOES_AS_A_WHOLE = 0.4


def words_of_changes(changes: Sequence[Sequence[Sequence[int]]], tokens: int) -> Tensor:
    """Which tokens each change of each sample takes away, bool ``[n, c, tokens]``; c is the largest number of changes.

    Args:
        changes: positions of these tokens.
        tokens: of a prompt, padding included.
    """
    words = torch.zeros(len(changes), max(map(len, changes), default=0), tokens, dtype=torch.bool)
    for sample, of_sample in enumerate(changes):
        for change, positions in enumerate(of_sample):
            words[sample, change, list(positions)] = True
    return words


def attention_to(words: Tensor, maps: Iterable[Tensor], size: Size) -> Tensor:
    """How strongly each latent cell attends to some words, ``[n, c, h, w]`` fp32, mean over all attentions and heads.

    Args:
        words: of :func:`words_of_changes`, bool ``[n, c, T]``, on the device of the maps.
        maps: of the cross-attentions of one U-Net call, ``[n*H*W, heads, L]`` each, of the first L tokens. Those of a
            resolution that is not that of the latents halved once or more are left out.
        size: of the latents, (h, w).
    """
    samples, changes, _ = words.shape
    alike: dict[tuple[int, int, int], list[Tensor]] = defaultdict(list)
    for each in maps:
        alike[len(each) // samples, each.shape[1], each.shape[2]].append(each)
    sums, counts = dict[Size, Tensor](), Counter[Size]()
    for (pixels, heads, tokens), several in alike.items():  # in few operations, each of all maps of a shape
        if (of := _halved(size, pixels)) is None:
            continue
        weights = words[:, :, :tokens].transpose(1, 2).to(several[0].dtype)
        attended = torch.stack(several).view(len(several), samples, pixels * heads, tokens) @ weights
        attended = attended.view(-1, samples, pixels, heads, changes).float().mean(3).sum(0)  # [n, pixels, c]
        sums[of] = sums[of] + attended if of in sums else attended
        counts[of] += len(several)
    total = torch.zeros(samples, changes, *size, device=words.device)
    for of, attended in sums.items():
        level = (attended / counts[of]).transpose(1, 2).reshape(samples, changes, *of)
        total += F.interpolate(level, size, mode="bilinear") / len(sums)
    return total


def with_old_words(found: Tensor, attention: Tensor) -> Tensor:
    """A mask of what changes, and of changes that take away a thing as a whole all of where it stood.

    Args:
        found: bool ``[n, h, w]``.
        attention: of :func:`attention_to`, ``[n, c, h, w]``; changes that take no words away have none.

    Returns:
        bool ``[n, h, w]``; ``found`` is part of it.
    """
    stood, covered = _stood(found, attention)
    goes = (stood & covered).any(1)
    return torch.where(goes.any(2).any(1)[:, None, None], close_holes(found | goes), found)


def with_hidden_changes(found: Tensor, attention: Tensor, several: Tensor, strength: Tensor) -> Tensor:
    """A mask that was found, and the things that change, too, where the change of another one is so much larger.

    Such a thing is taken where its old words stood, as far as it was not found, and where what is left of the picture
    changes as strongly as it does there and is connected with it.

    Args:
        found: bool ``[n, h, w]``.
        attention: of :func:`attention_to`, ``[n, c, h, w]``.
        several: of which samples several things change, bool ``[n]``; masks of the others stay.
        strength: of :func:`~fisedit_compile.masks.difference_mask.change_strength`, ``[n, h, w]``.

    Returns:
        bool ``[n, h, w]``; ``found`` is part of it.
    """
    stood, covered = _stood(found, attention)
    hidden = stood & ~covered & several[:, None, None, None]
    left = ~grown(found)[:, None]
    seeds, strength = hidden & left, strength[:, None]
    unchanged, changed = mean_where(strength, left & ~stood), mean_where(strength, seeds)
    alike = left & (strength > unchanged + WEAK * (changed - unchanged))
    taken = (hidden | spread(seeds, seeds | alike)).any(1)
    return torch.where(taken.any(2).any(1)[:, None, None], close_holes(found | taken), found)


def _stood(found: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Where the words of each change stood, bool ``[n, c, h, w]``; whether much of it was found, ``[n, c, 1, 1]``."""
    threshold = otsu_threshold(attention.flatten(0, 1)).view(*attention.shape[:2], 1, 1)
    stood = attention > threshold
    cells = stood.sum((2, 3), keepdim=True)
    return stood, (stood & found[:, None]).sum((2, 3), keepdim=True) >= _GOES_AS_A_WHOLE * cells


def _halved(size: Size, pixels: int) -> Size | None:
    """The size that has so many pixels, of latents and their levels; None where none has."""
    height, width = size
    while height * width > pixels:
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == pixels else None
