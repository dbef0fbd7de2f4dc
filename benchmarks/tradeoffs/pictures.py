"""What all methods are given of a case, and what their edits are held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from photo_edits.rendered import as_picture, render
from PIL import Image
from torch import Tensor

from fisedit_compile import Editor
from fisedit_compile.editing.overview import mask_picture
from fisedit_compile.masks.grown import grown
from fisedit_compile.quality.cases import Case
from fisedit_compile.quality.regions import changed_cells, enlarge

#: Pixels around the cells that the dense edit changes which are no background.
_RIM = 8

#: The difference of the latents is averaged by this many boxes of this side in cells, one after the other, so that
#: masks of a given size are whole regions.
_BOXES, _BOX = 3, 9


@dataclass(frozen=True)
class CasePictures:
    """Of one case.

    Attributes:
        case: the case.
        base: the picture before.
        dense: the dense edit: Prompt-to-Prompt control, as long as it is by default, and all steps.
        rendered: what the renderer draws for the new words.
        outside: bool ``[H, W]``: pixels that the dense edit leaves.
        masks: edited size -> the cells that it changes most, as a picture of the base's size.
    """

    case: Case
    base: Image.Image
    dense: Image.Image
    rendered: Image.Image
    outside: Tensor
    masks: Mapping[float, Image.Image]


class References:
    """Draws dense edits.

    Args:
        pipe: the pipeline.
        steps, guidance: of bases and edits.
    """

    def __init__(self, pipe: Any, steps: int, guidance: float) -> None:
        self._editor = Editor(pipe, {"dense_steps": steps, "stride": 1})
        self._arguments: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}

    def draw(self, case: Case, sizes: Sequence[float]) -> CasePictures:
        """The pictures of a case, with masks of some edited sizes."""
        generator = torch.Generator("cpu").manual_seed(case.seed)
        base = self._editor.generate(case.prompt, generator=generator, **self._arguments)
        dense = self._editor.edit(base, case.edit, dense=True, background="latents")
        before, after = base.latents[0].cpu(), dense.latents[0].cpu()
        width, height = base.image.size
        region = grown(enlarge(changed_cells(before, after), (height, width))[None], _RIM)[0]
        masks = {size: mask_picture(most_changed(before, after, size), base.image.size) for size in sizes}
        rendered = as_picture(render(case.after, case.seed))
        return CasePictures(case, base.image, dense.image, rendered, ~region, masks)


def most_changed(before: Tensor, after: Tensor, share: float) -> Tensor:
    """The share of the cells, bool ``[h, w]``, around which latents ``[c, h, w]`` differ most."""
    difference = (after.double() - before.double()).square().mean(0, keepdim=True)
    for _ in range(_BOXES):
        difference = F.avg_pool2d(difference, _BOX, stride=1, padding=_BOX // 2, count_include_pad=False)
    flat = difference.flatten()
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.topk(round(share * len(flat))).indices] = True
    return chosen.view(difference.shape[1:])
