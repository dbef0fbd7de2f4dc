"""One picture that shows an edit: base, edit, mask over base, and difference, side by side with captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

#: The longer side of a panel in pixels stays in this range; smaller and larger pictures are resized.
PANEL_SIDE = (256, 512)

#: Differences are shown this many times as bright, or a change of colour by a few percent would look black.
DIFFERENCE_GAIN = 2

_TINT = (255, 0, 128)  # over the mask; rare in pictures
_OUTLINE = 5  # the filter that finds it; the line is half as wide, inside the mask
_MARGIN, _FONT_SIZE, _LINE = 12, 14, 18
_MOST_LINES = 4


def mask_picture(mask: Any, size: tuple[int, int]) -> Image.Image:
    """A mask, bool ``[h, w]`` at latent resolution, as a picture of ``size`` (width, height): white is edited."""
    picture = Image.fromarray(np.asarray(mask).astype(np.uint8) * 255)
    return picture.resize(size, Image.Resampling.NEAREST)


def draw_overview(base: Image.Image, edit: Image.Image, mask: Any, *, prompt: str, edit_prompt: str) -> Image.Image:
    """Four panels with captions: the base, the edit, the mask over the base, and what differs.

    Args:
        base: the picture before.
        edit: the picture after, of the same size.
        mask: what was edited, bool ``[h, w]`` at latent resolution; a tensor has to be on the CPU.
        prompt, edit_prompt: the captions of the first two panels.

    Raises:
        ValueError: pictures of different sizes, or a mask that is not ``[h, w]``.
    """
    if base.size != edit.size:
        raise ValueError(f"a base of {base.size} and an edit of {edit.size} pixels: they have to be of one size")
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"a mask of shape {mask.shape}: give [h, w], the mask of one sample")
    base, edit = base.convert("RGB"), edit.convert("RGB")
    difference = ImageChops.difference(base, edit).point(lambda value: min(255, DIFFERENCE_GAIN * value))
    panels = [
        (base, f"Base: {prompt}"),
        (edit, f"Edit: {edit_prompt}"),
        (tinted(base, mask_picture(mask, base.size)), f"Mask: {mask.mean():.1%} of the picture edited"),
        (difference, f"Difference, {DIFFERENCE_GAIN} times as bright"),
    ]
    return side_by_side(panels)


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets of :func:`draw_overview` one below the other; a single one is returned as it is."""
    if len(sheets) == 1:
        return sheets[0]
    stack = Image.new("RGB", (max(each.width for each in sheets), sum(each.height for each in sheets)), "white")
    top = 0
    for each in sheets:
        stack.paste(each, (0, top))
        top += each.height
    return stack


def tinted(base: Image.Image, mask: Image.Image) -> Image.Image:
    """The base in grey, with its own colours under a light tint, outlined, inside the mask."""
    colour = Image.new("RGB", base.size, _TINT)
    outline = ImageChops.difference(mask, mask.filter(ImageFilter.MinFilter(_OUTLINE)))
    picture = Image.composite(Image.blend(base, colour, 0.25), base.convert("L").convert("RGB"), mask)
    picture.paste(colour, mask=outline)
    return picture


def side_by_side(panels: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Panels of equal size in a row, each above its caption."""
    longer = max(panels[0][0].size)
    scale = min(max(longer, PANEL_SIDE[0]), PANEL_SIDE[1]) / longer
    width, height = (round(side * scale) for side in panels[0][0].size)
    resampling = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    font = ImageFont.load_default(_FONT_SIZE)
    captions = [_wrapped(caption, width, font) for _, caption in panels]
    text_height = _LINE * max(len(lines) for lines in captions)
    sheet = Image.new(
        "RGB", (_MARGIN + len(panels) * (width + _MARGIN), 2 * _MARGIN + height + _MARGIN // 2 + text_height), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for position, ((picture, _), lines) in enumerate(zip(panels, captions, strict=True)):
        left = _MARGIN + position * (width + _MARGIN)
        sheet.paste(picture.resize((width, height), resampling), (left, _MARGIN))
        for number, line in enumerate(lines):
            draw.text((left, _MARGIN + height + _MARGIN // 2 + number * _LINE), line, fill="black", font=font)
    return sheet


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """Lines of at most ``width`` pixels, broken at spaces, or within a word that is wider; cut after a few lines."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    lines = [line for line in lines if line]
    if len(lines) > _MOST_LINES:
        lines = lines[:_MOST_LINES]
        while font.getlength(lines[-1] + "...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    return lines
