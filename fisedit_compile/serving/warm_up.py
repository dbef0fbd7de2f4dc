"""Pictures that a replica draws before its first request, so that nobody waits for what is made on first use."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from fisedit_compile.editing.running_edit import RIM
from fisedit_compile.errors import FiseditError
from fisedit_compile.masks.grown import grown
from fisedit_compile.planning.buckets import MASK_SHARES
from fisedit_compile.serving.requests import Settings

if TYPE_CHECKING:
    from fisedit_compile.editing.editor import Editor
    from fisedit_compile.serving.artist import Artist

logger = logging.getLogger(__name__)

#: Words of a picture and of its edit.
_WORDS = ("a cat", "a dog")

#: Steps of these pictures. On a CPU a dense and a sparse one; a GPU has graphs also of the steps that edits of longer
#: pictures do not visit, and is quick.
_STEPS = {"cpu": 2, "cuda": 30}

#: Pictures that a compiled pipeline draws until its CUDA graphs are captured and replayed.
_UNTIL_REPLAY = 3

#: Of how many latents in each direction a ragged region has one square. With sides of 14 or 15 of them, at odd
#: positions, it grows at coarser levels by as much as buckets of the class "ragged" have room for: less for large ones.
_SQUARE = 16


def draw_edits(editor: Editor, side: int, batch: int) -> None:
    """Draw a picture with its base and edit it, within masks of many sizes and one that is found.

    Args:
        editor: the editor.
        side: of the picture, in pixels.
        batch: edits that will be made together at most; there are graphs for each number of them.
    """
    from fisedit_compile.editing.edit_request import EditRequest

    kind = editor.pipe.device.type
    picture: dict[str, Any] = {"num_inference_steps": _STEPS[kind], "width": side, "height": side}
    base = editor.generate(_WORDS[0], generator=torch.Generator().manual_seed(0), **picture)
    masks = _masks(side // editor.pipe.vae_scale_factor, kind, editor.config.dense_above)
    edits = [EditRequest(base, _WORDS[1], mask) for mask in masks]
    # Those within masks that are found have dense steps, with the base's attention maps or without.
    edits += [EditRequest(base, _WORDS[1]), EditRequest(base, _WORDS[1], cross_replace=0.0)]
    for count in (2**i for i in range(batch.bit_length())):
        for edit in edits:
            try:
                editor.edit_many([edit] * count)
            except (FiseditError, ValueError) as error:  # a model to which both are one word, or that changes nothing
                logger.info("edits before the first request: %s", error)


def draw_unrecorded(artist: Artist, side: int) -> None:
    """Draw pictures without their bases, so that what is compiled is there, and recorded by CUDA graphs."""
    for seed in range(_UNTIL_REPLAY):
        artist.unrecorded(_WORDS[0], Settings(side, side, _STEPS["cpu"], guidance=5.0), seed, None)


def _masks(latents: int, kind: str, largest: float) -> Iterator[Image.Image]:
    """Masks of which each has a graph of its own: on a CPU a small and a large one, on a GPU one of each common bucket.

    Args:
        latents: of a side of the picture.
        kind: of the device.
        largest: share of the picture from which on edits run dense, so that there are no graphs of larger masks.
    """
    shares = (0.01, 0.25) if kind == "cpu" else [share for share in MASK_SHARES if share <= largest]
    for share in shares:
        cells = max(int(latents * math.sqrt(share)), RIM + 1)  # rounded down, to stay within the share
        compact = torch.zeros(latents, latents, dtype=torch.bool)
        compact[:cells, :cells] = True
        yield _computing(compact)
        if kind == "cuda":
            yield _computing(_ragged(latents, int(share * latents**2), 14 if share < 0.3 else 15))


def _computing(region: torch.Tensor) -> Image.Image:
    """The mask of an edit that computes a region, which is the mask and some cells around it."""
    mask = ~grown(~region[None], RIM)[0]
    return Image.fromarray(mask.numpy().astype(np.uint8) * 255)


def _ragged(latents: int, count: int, square_side: int) -> torch.Tensor:
    """A region of ``count`` latents in squares, at odd positions, so that coarser levels have a larger share of it."""
    region = torch.zeros(latents, latents, dtype=torch.bool)
    starts = range(1, latents, _SQUARE)
    places = [(y, x) for y in starts for x in starts]
    places.sort(key=lambda place: sum(place) // _SQUARE % 2)  # as the white ones of a chessboard, and then the black
    for y, x in places:
        square = region[y : y + square_side, x : x + square_side]
        rows = min(len(square), count // square.shape[1])
        square[:rows] = True
        count -= rows * square.shape[1]
    return region
