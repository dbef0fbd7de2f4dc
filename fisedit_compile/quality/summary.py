"""Figures of many cases: for each variant and each kind, size and all of them; as numbers, and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

import numpy as np

from fisedit_compile.quality.cases import KINDS, SIZES
from fisedit_compile.quality.scores import CaseScores, Scores

#: Heads of the tables, and the names of the figures in them.
_MASK = {
    "IoU": "iou",
    "recall": "recall",
    "precision": "precision",
    "area": "mask_area",
    "true area": "true_area",
    "area / true": "area_ratio",
}
_PICTURE = {
    "SSIM in mask": "ssim_inside",
    "5th percentile": "ssim_inside_p5",
    "PSNR in mask": "psnr_inside",
    "SSIM to best": "ssim_to_best",
    "seam": "seam",
    "seam, dense": "seam_under_mask",
    "latents equal": "latents_equal",
    "far pixels equal": "far_pixels_equal",
}
_JUDGE = {
    "cases": "judged",
    "success": "success",
    "under mask": "success_under_mask",
    "best dense": "success_best_dense",
    "plain": "success_plain",
    "wrong object": "wrong",
    "under mask ": "wrong_under_mask",
    "best dense ": "wrong_best_dense",
    "plain ": "wrong_plain",
    "right": "right",
    "best dense  ": "right_best_dense",
}
_CLIP = {
    "image-image": "clip_image_similarity",
    "best dense": "clip_image_similarity_best_dense",
    "directional": "clip_directional_similarity",
    "best dense ": "clip_directional_similarity_best_dense",
    "accuracy": "clip_follows",
    "best dense  ": "clip_follows_best_dense",
}


def summarise(scores: Scores) -> dict[str, Any]:
    """Means over the cases of each group, a dict that ``json.dump`` takes.

    Returns:
        ``"variants"``: name -> group -> figures; ``"controls"``: kind -> length of control -> figures of the dense
        edits; ``"best_control"``: kind -> length; ``"fid"``: name -> FID to the best dense edits. Groups are kinds,
        sizes and ``"all"``. A figure that no case of a group has is None.
    """
    names = scores.cases[0].variants if scores.cases else {}
    return {
        "variants": {
            name: {group: _figures(cases, name) for group, cases in _groups(scores.cases) if cases} for name in names
        },
        "controls": {
            kind: {str(each.control): {**vars(each)} for each in controls} for kind, controls in scores.controls.items()
        },
        "best_control": dict(scores.best_control),
        "fid": dict(scores.fid),
    }


def tables(summary: dict[str, Any]) -> str:
    """The summary as text: for each variant masks, pictures and the judge's verdicts; then lengths of control."""
    from tabulate import tabulate

    parts = []
    for name, groups in summary["variants"].items():
        for title, heads in (
            ("mask against the cells that the best dense edit changes", _MASK),
            ("pictures: in the mask against the dense U-Net under it, whole against the best dense edit", _PICTURE),
            ("by the judge: shares of the cases whose base shows what its words say", _JUDGE),
            *([("by CLIP, of the edit and of the best dense edit", _CLIP)] if _has_clip(groups) else []),
        ):
            rows = [[group, *(_shown(figures[key]) for key in heads.values())] for group, figures in groups.items()]
            parts.append(f"{name}: {title}\n" + tabulate(rows, ["", *heads], disable_numparse=True))
        if name in summary["fid"]:
            parts.append(f"{name}: FID over CLIP features, to the best dense edits: {_shown(summary['fid'][name])}")
    rows = []
    for kind, controls in summary["controls"].items():
        for each in controls.values():
            mark = "best" if each["control"] == summary["best_control"][kind] else ""
            figures = (each[key] for key in ("success", "wrong", "right", "ssim_to_base"))
            rows.append([kind, f"{each['control']:g}", *map(_shown, figures), mark])
    columns = ["", "control", "success", "wrong object", "right", "SSIM to base", ""]
    parts.append("dense edits by length of control\n" + tabulate(rows, columns, disable_numparse=True))
    return "\n\n".join(parts)


def _has_clip(groups: dict[str, Any]) -> bool:
    return any(figures["clip_follows"] is not None for figures in groups.values())


def _groups(cases: Sequence[CaseScores]) -> Iterable[tuple[str, list[CaseScores]]]:
    yield from ((kind, [each for each in cases if each.case.kind == kind]) for kind in KINDS)
    yield from ((size, [each for each in cases if each.case.size == size]) for size in SIZES)
    yield "all", list(cases)


def _figures(cases: Sequence[CaseScores], name: str) -> dict[str, float | int | None]:
    ours = [each.variants[name] for each in cases]
    masks = [each.mask for each in ours if each.mask]
    judged = [each for each in cases if each.base_shown]
    best = [each.dense[each.best_control] for each in judged]
    plain = [each.dense[0.0] for each in judged]
    verdicts = [each.variants[name].verdict for each in judged]
    under = [each.variants[name].verdict_under_mask for each in judged]
    inside = [each.ssim_inside for each in ours]
    clip = [each.clip for each in ours if each.clip]
    clip_dense = [each.clip_best_dense for each in cases if each.clip_best_dense]
    return {
        "cases": len(cases),
        **{key: _mean(getattr(mask, key) for mask in masks) for key in ("iou", "recall", "precision", "area_ratio")},
        "mask_area": _mean(each.mask_area for each in ours),
        "true_area": _mean(each.true_area for each in cases),
        "ssim_inside": _mean(inside),
        "ssim_inside_p5": float(np.percentile(inside, 5)),
        **{
            key: _mean(getattr(each, key) for each in ours)
            for key in ("psnr_inside", "ssim_to_best", "seam", "seam_under_mask", "latents_equal", "far_pixels_equal")
        },
        "judged": len(judged),
        **{
            f"{what}{suffix}": _mean(getattr(each, what) for each in found)
            for what in ("success", "wrong", "right")
            for suffix, found in (("", verdicts), ("_under_mask", under), ("_best_dense", best), ("_plain", plain))
        },
        **{
            f"clip_{what}{suffix}": _mean(getattr(each, what) for each in figures)
            for what in ("image_similarity", "directional_similarity", "follows")
            for suffix, figures in (("", clip), ("_best_dense", clip_dense))
        },
    }


def _mean(values: Iterable[float]) -> float | None:
    found = [float(value) for value in values]
    return mean(found) if found else None


def _shown(figure: float | int | None) -> str:
    if figure is None:
        return "-"
    return str(figure) if isinstance(figure, int) else f"{figure:.1f}" if abs(figure) >= 10 else f"{figure:.3f}"
