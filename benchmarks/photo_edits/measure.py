"""Runs methods on photos, and makes the table: background, structure, whether the words are seen, and time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image
from tabulate import tabulate
from torch import Tensor

from fisedit_compile.quality.similarity import as_pixels, psnr_inside, ssim_inside
from photo_edits.structure import Features, structure_distance


@dataclass(frozen=True)
class PhotoCase:
    """One edit of a photo.

    Attributes:
        id: unique.
        photo: the photo, RGB.
        prompt, words: what it shows, and what it is to show.
        background: pixels that are to stay, bool ``[H, W]``; of no pixel where all may change.
        judge: of the edited picture, named figures; a bool counts as 1 or 0.
    """

    id: str
    photo: Image.Image
    prompt: str
    words: str
    background: Tensor
    judge: Callable[[Image.Image], dict[str, float]]


@dataclass(frozen=True)
class Figures:
    """Of one method on one case.

    Attributes:
        psnr, ssim: of the background, in dB; at most 54. None where all may change.
        equal: share of the background's pixels that are the photo's, bit for bit.
        structure: structure distance.
        seconds: of the edit, inversion included.
        judged: of the case's judge.
    """

    method: str
    case: str
    psnr: float | None
    ssim: float | None
    equal: float | None
    structure: float
    seconds: float
    judged: dict[str, float]


def measure(case: PhotoCase, method: Any, features: Features, keep_in: Path | None = None) -> Figures:
    """Edit a photo, and hold the picture to it.

    Args:
        method: of :mod:`photo_edits.methods`.
        features: of the structure distance.
        keep_in: folder for the picture; None keeps none.
    """
    start = time.perf_counter()
    picture = method.edit(case.photo, case.prompt, case.words)
    seconds = time.perf_counter() - start
    if picture.size != case.photo.size:
        raise ValueError(f"{method.title}: a picture of {picture.size} of a photo of {case.photo.size}")
    if keep_in is not None:
        keep_in.mkdir(parents=True, exist_ok=True)
        picture.save(keep_in / f"{case.id}.{method.name}.png")
        case.photo.save(keep_in / f"{case.id}.png")
    before, after, outside = as_pixels(case.photo), as_pixels(picture), case.background
    some = bool(outside.any())
    return Figures(
        method=method.title,
        case=case.id,
        psnr=psnr_inside(after, before, outside) if some else None,
        ssim=ssim_inside(after, before, outside) if some else None,
        equal=float((after == before).all(0)[outside].float().mean()) if some else None,
        structure=structure_distance(case.photo, picture, features),
        seconds=seconds,
        judged=case.judge(picture),
    )


def table(figures: Iterable[Figures]) -> str:
    """Means over the cases, a row a method."""
    by_method: dict[str, list[Figures]] = {}
    for each in figures:
        by_method.setdefault(each.method, []).append(each)
    judged = list(dict.fromkeys(name for of in by_method.values() for each in of for name in each.judged))
    rows = [
        [method, len(of), *(_mean([getattr(each, name) for each in of]) for name in ("psnr", "ssim", "equal"))]
        + [1e3 * mean(each.structure for each in of)]
        + [_mean([each.judged.get(name) for each in of]) for name in judged]
        + [mean(each.seconds for each in of)]
        for method, of in by_method.items()
    ]
    heads = ["method", "cases", "background PSNR, dB", "background SSIM", "equal pixels", "structure distance x1000"]
    return tabulate(rows, [*heads, *judged, "seconds"], tablefmt="github", floatfmt=".3f", missingval="-")


def write(path: Path | None, figures: list[Figures], **conditions: Any) -> None:
    """Write all figures and their conditions as JSON; without a path do nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**conditions, "figures": [asdict(each) for each in figures]}, indent=2) + "\n")


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
