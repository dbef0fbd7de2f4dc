"""The sprites: Microsoft Fluent Emoji (MIT) at 96 px, from the npm package `@lobehub/fluent-emoji-3d`.

The archive `objects.npz` beside this file is what the world draws from; build it again with
`python -m demo_world.sprites PACKAGE_FOLDER` run in `examples/`.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .vocabulary import CODE_POINTS, COLORS, TINTABLE, TINTS

SPRITE_SIZE = 96
ARCHIVE = Path(__file__).with_name("objects.npz")


def build_archive(package: Path, archive: Path = ARCHIVE) -> None:
    """Write `archive` (names `[n]`, RGBA uint8 `[n, 96, 96, 4]`) from an npm package's `assets/*.webp`.

    Raises ValueError when the folder lacks one of the sprites.
    """
    sprites = []
    for name, code_point in CODE_POINTS.items():
        file = package / "assets" / f"{code_point}.webp"
        if not file.is_file():
            raise ValueError(
                f"{file}, the sprite of {name!r}, is missing; run `npm pack @lobehub/fluent-emoji-3d`, "
                "unpack what it fetched and give its folder `package`"
            )
        size = (SPRITE_SIZE, SPRITE_SIZE)
        rgba = np.asarray(Image.open(file).convert("RGBA").resize(size, Image.Resampling.LANCZOS)).copy()
        rgba[rgba[..., 3] == 0] = 0  # invisible colours only cost bytes
        sprites.append(rgba)
    np.savez_compressed(archive, names=np.array(list(CODE_POINTS)), sprites=np.stack(sprites))


@cache
def sprite_index() -> dict[str, int]:
    """The row in `load_sprites()` of each name, plain ("cat") or tinted ("blue car")."""
    names = [*CODE_POINTS, *(f"{color} {name}" for name in TINTABLE for color in TINTS)]
    return {name: row for row, name in enumerate(names, start=1)}


def load_sprites() -> torch.Tensor:
    """The sprites, premultiplied RGBA float32 `[n, 4, 96, 96]`; row 0 is empty, for unused layers.

    Raises ValueError when the archive was built for another list of names.
    """
    with np.load(ARCHIVE) as data:
        if list(data["names"]) != list(CODE_POINTS):
            raise ValueError(f"{ARCHIVE} holds other sprites than vocabulary.py names; build it again")
        straight = torch.from_numpy(data["sprites"]).permute(0, 3, 1, 2).float() / 255  # [n, 4, 96, 96]
    index = sprite_index()
    tinted = [_tint(straight[index[name] - 1], color) for name in TINTABLE for color in TINTS]
    sprites = torch.cat([torch.zeros_like(straight[:1]), straight, torch.stack(tinted)])
    sprites[:, :3] *= sprites[:, 3:]
    return sprites


def _tint(sprite: torch.Tensor, color: str) -> torch.Tensor:
    """`sprite` (straight RGBA `[4, h, w]`) with its main hue turned to `color`; greys and other hues stay."""
    rgb, alpha = sprite[:3], sprite[3]
    value, low = rgb.amax(0), rgb.amin(0)
    chroma = value - low
    # Hue as an angle on the opponent-colour plane: smooth, so that the blend below has no seams.
    first = rgb[0] - 0.5 * (rgb[1] + rgb[2])
    second = 0.75**0.5 * (rgb[1] - rgb[2])
    weight = chroma * alpha
    main = torch.atan2((second * weight).sum(), (first * weight).sum())
    distance = torch.atan2(second, first) - main
    distance = torch.atan2(torch.sin(distance), torch.cos(distance)).abs()
    near = ((1.2 - distance) / 0.4).clamp(0, 1)  # all within 0.8 rad, none beyond 1.2 rad
    share = near * ((chroma / value.clamp_min(1e-3) - 0.15) / 0.25).clamp(0, 1)

    luma = (rgb * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    middle = (luma * weight * share).sum() / (weight * share).sum()
    shade = luma / middle  # 1 at the sprite's mean brightness, so light and shadow survive
    target = torch.tensor(COLORS[color])[:, None, None]
    lighter = target + (1 - target) * (0.6 * (shade - 1)).clamp(0, 1)
    tinted = torch.where(shade < 1, target * shade, lighter)
    return torch.cat([rgb + share * (tinted - rgb), sprite[3:]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="folder of the unpacked npm package")
    build_archive(parser.parse_args().package)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size / 1e6:.2f} MB")
