"""Procedural backgrounds, a whole batch at a time.

Each painter takes pixel coordinates `x`, `y` in [0, 1] (`[h, w]`, y down) and parameters `p` in [0, 1)
(`[batch, BACKGROUND_PARAMETERS, 1, 1]`) and returns sRGB `[batch, 3, h, w]` in [0, 1].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .scene import Background
from .vocabulary import COLORS, SCENERY

Rgb = tuple[float, float, float]
EDGE = 256.0  # soft edges are one pixel wide


class BackgroundTensors(NamedTuple):
    """A batch of backgrounds, sorted by kind so that each painter runs once."""

    kinds: list[tuple[str, int]]  # each kind and how many of it
    colors: Tensor  # [batch, 2, 3], top and bottom of plain colours and gradients
    parameters: Tensor  # [batch, BACKGROUND_PARAMETERS]
    unsort: Tensor  # [batch], from sorted order back to the caller's


def encode_backgrounds(backgrounds: Sequence[Background]) -> BackgroundTensors:
    order = sorted(range(len(backgrounds)), key=lambda i: backgrounds[i].kind)
    ordered = [backgrounds[i] for i in order]
    ends = [(item.colors[0], item.colors[-1]) if item.colors else ("black", "black") for item in ordered]
    return BackgroundTensors(
        list(Counter(item.kind for item in ordered).items()),
        torch.tensor([[COLORS[top], COLORS[bottom]] for top, bottom in ends]),
        torch.tensor([item.parameters for item in ordered]),
        torch.tensor(order).argsort(),
    )


def paint_backgrounds(batch: BackgroundTensors, size: int) -> Tensor:
    """The backgrounds as pictures `[batch, 3, size, size]`, sRGB in [0, 1], on the device of `batch`."""
    axis = (torch.arange(size, device=batch.colors.device) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pictures, done = [], 0
    for kind, count in batch.kinds:
        p = batch.parameters[done : done + count, :, None, None]
        if kind in SCENERY:
            picture = PAINTERS[kind](x, y, p)
        else:
            ends = batch.colors[done : done + count, :, :, None, None]
            # A plain colour is a gradient between itself and itself; the change is steepest in the middle.
            picture = torch.lerp(ends[:, 0], ends[:, 1], torch.sigmoid((y - 0.5) * 7)) * (0.96 + 0.04 * p[:, :1])
        pictures.append(picture.expand(count, 3, size, size))
        done += count
    return torch.cat(pictures)[batch.unsort].clamp_(0, 1)


def _rgb(like: Tensor, color: Rgb) -> Tensor:
    return _constant(color, like.device)


@cache
def _constant(color: Rgb, device: torch.device) -> Tensor:
    """The color as `[3, 1, 1]`; kept, because each copy to a GPU would wait for all the work queued there."""
    return torch.tensor(color, device=device)[:, None, None]


def _fade(share: Tensor, top: Rgb, bottom: Rgb) -> Tensor:
    """From `top` where `share` is 0 to `bottom` where it is 1; share `[batch, 1, h, w]`."""
    return torch.lerp(_rgb(share, top), _rgb(share, bottom), share.clamp(0, 1))


def _inside(distance: Tensor) -> Tensor:
    """1 where the signed distance (in picture widths) is positive, 0 where negative, one pixel soft."""
    return (distance * EDGE + 0.5).clamp(0, 1)


def _over(picture: Tensor, mask: Tensor, paint: Tensor) -> Tensor:
    return torch.lerp(picture, paint, mask)


def _noise(k: Tensor, seed: Tensor) -> Tensor:
    """A repeatable number in [0, 1) for each integer `k` and `seed`."""
    return torch.frac(torch.sin(k * 12.9898 + seed * 78.233) * 437.585).abs()


def _disc(x: Tensor, y: Tensor, cx: Tensor, cy: Tensor, radius: float) -> Tensor:
    return _inside(radius - torch.sqrt((x - cx) ** 2 + (y - cy) ** 2))


def _ridge(x: Tensor, base: Tensor, p: Tensor, height: float, waves: float) -> Tensor:
    """A rolling line: its y at each x."""
    return base - height * (torch.sin(6.28 * (waves * x + p)) + 0.5 * torch.sin(6.28 * (1.7 * waves * x + 3 * p)))


def _dots(x: Tensor, y: Tensor, seed: Tensor, cells: int, radius: float) -> Tensor:
    """One small disc at a random point of each cell of a grid."""
    u, v = x * cells, y * cells
    column, row = u.floor(), v.floor()
    k = column + row * (cells + 3.0)
    dx = u - column - 0.2 - 0.6 * _noise(k, seed)
    dy = v - row - 0.2 - 0.6 * _noise(k + 0.5, seed)
    return _inside(radius - torch.sqrt(dx**2 + dy**2) / cells)


def sea(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
    horizon = 0.36 + 0.12 * p[:, :1]
    sky = _fade(y / horizon, (0.45, 0.75, 0.97), (0.85, 0.95, 1.0))
    depth = (y - horizon) / (1 - horizon)
    wave = torch.sin(6.28 * (14 * depth.clamp_min(0) ** 0.6 + 0.12 * torch.sin(6.28 * (3 * x + p[:, 1:2])) + p[:, 2:3]))
    water = _fade(depth + 0.06 * wave, (0.16, 0.55, 0.80), (0.05, 0.28, 0.62))
    return _over(sky, _inside(y - horizon), water)


def hills(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
    picture = _fade(y * 1.6, (0.50, 0.78, 0.98), (0.88, 0.96, 1.0))
    tones: tuple[Rgb, ...] = ((0.56, 0.78, 0.45), (0.40, 0.68, 0.33), (0.27, 0.56, 0.25))
    for i, tone in enumerate(tones):
        line = _ridge(x, 0.46 + 0.17 * i + 0.05 * p[:, :1], p[:, i + 1 : i + 2], 0.04, 1.0 + 0.3 * i)
        picture = _over(picture, _inside(y - line), _rgb(x, tone) * (1.06 - 0.25 * (y - line)))
    return picture


def forest(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
    picture = _fade(y * 1.5, (0.72, 0.86, 0.80), (0.86, 0.93, 0.84))
    tones: tuple[Rgb, ...] = ((0.42, 0.62, 0.50), (0.24, 0.47, 0.34), (0.12, 0.33, 0.22))
    for i, tone in enumerate(tones):
        trees = 9.0 - 2 * i
        u = x * trees + 5 * p[:, i : i + 1]
        tall = 0.20 + 0.12 * _noise(u.floor(), p[:, i + 3 : i + 4])
        flank = 1 - 2 * (u - u.floor() - 0.5).abs()  # 0 between two trees, 1 at a tip
        line = 0.42 + 0.17 * i - tall * flank
        picture = _over(picture, _inside((y - line) * 0.5), _rgb(x, tone).expand_as(picture))
    return _over(picture, _inside(y - 0.86), _rgb(x, (0.34, 0.42, 0.20)).expand_as(picture))


def snow(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
    picture = _fade(y * 1.3, (0.62, 0.74, 0.88), (0.84, 0.90, 0.96))
    for i, tone in enumerate(((0.86, 0.91, 0.97), (0.96, 0.98, 1.0))):
        line = _ridge(x, 0.60 + 0.16 * i + 0.05 * p[:, :1], p[:, i + 1 : i + 2], 0.03, 0.8 + 0.4 * i)
        picture = _over(picture, _inside(y - line), _rgb(x, tone).expand_as(picture))
    return _over(picture, _dots(x, y, p[:, 3:4], 7, 0.012), _rgb(x, (1.0, 1.0, 1.0)).expand_as(picture))


def night(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
    picture = _fade(y, (0.03, 0.04, 0.16), (0.13, 0.16, 0.40)).expand(p.shape[0], 3, *x.shape)
    picture = _over(picture, _dots(x, y, p[:, :1], 8, 0.007), _rgb(x, (0.95, 0.95, 0.85)).expand_as(picture))
    moon = _disc(x, y, 0.15 + 0.7 * p[:, 1:2], 0.12 + 0.10 * p[:, 2:3], 0.07)
    return _over(picture, moon, _rgb(x, (0.98, 0.95, 0.78)).expand_as(picture))


def desert(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
    picture = _fade(y * 1.7, (0.55, 0.80, 0.93), (0.98, 0.92, 0.78)).expand(p.shape[0], 3, *x.shape)
    sun = _disc(x, y, 0.15 + 0.7 * p[:, 1:2], 0.14 + 0.06 * p[:, 2:3], 0.075)
    picture = _over(picture, sun, _rgb(x, (1.0, 0.93, 0.55)).expand_as(picture))
    tones: tuple[Rgb, ...] = ((0.93, 0.76, 0.48), (0.88, 0.67, 0.38), (0.80, 0.57, 0.29))
    for i, tone in enumerate(tones):
        line = _ridge(x, 0.52 + 0.17 * i + 0.04 * p[:, :1], p[:, i + 3 : i + 4], 0.035, 0.6 + 0.3 * i)
        picture = _over(picture, _inside(y - line), _rgb(x, tone) * (1.05 - 0.3 * (y - line)))
    return picture


def city(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
    picture = _fade(y * 1.3, (0.46, 0.60, 0.82), (0.86, 0.84, 0.86))
    for i, (tone, columns) in enumerate((((0.58, 0.62, 0.72), 9.0), ((0.30, 0.33, 0.44), 6.0))):
        u = x * columns + p[:, i : i + 1]
        column = u.floor()
        roof = 0.22 + 0.22 * i + 0.28 * _noise(column, p[:, i + 2 : i + 3])
        wall = _inside(y - roof) * (1.0 if i == 0 else _inside((u - column - 0.06) / columns))
        picture = _over(picture, wall, _rgb(x, tone).expand_as(picture))
        if i == 1:
            pane_x, pane_y = torch.frac((u - column) * 3 + 0.05), torch.frac((y - roof) * 18)
            pane = ((pane_x > 0.35) & (pane_x < 0.8) & (pane_y > 0.35) & (pane_y < 0.8)).float() * (y > roof + 0.02)
            picture = _over(picture, pane * wall, _rgb(x, (0.96, 0.84, 0.50)).expand_as(picture))
    return _over(picture, _inside(y - 0.92), _rgb(x, (0.25, 0.25, 0.29)).expand_as(picture))


def sunset(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
    horizon = 0.60 + 0.10 * p[:, :1]
    sky = _fade(y / horizon, (0.36, 0.20, 0.48), (0.98, 0.58, 0.28))
    sun = _disc(x, y, 0.25 + 0.5 * p[:, 1:2], horizon - 0.02, 0.13)
    picture = _over(sky, sun, _rgb(x, (1.0, 0.86, 0.45)).expand_as(sky))
    return _over(picture, _inside(y - horizon), _fade((y - horizon) * 2.5, (0.42, 0.20, 0.36), (0.16, 0.09, 0.24)))


PAINTERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sea": sea,
    "hills": hills,
    "forest": forest,
    "snow": snow,
    "night": night,
    "desert": desert,
    "city": city,
    "sunset": sunset,
}
