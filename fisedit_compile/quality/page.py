"""A static page of all cases: pictures beside each other, and what was measured of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fisedit_compile.editing.overview import mask_picture, tinted
from fisedit_compile.quality.runs import CaseRun
from fisedit_compile.quality.scores import CaseScores, Scores, VariantScores
from fisedit_compile.quality.verdicts import Verdict

_STYLE = """\
body { font: 14px sans-serif; margin: 2em; } table { border-collapse: collapse; }
td, th { padding: 4px; vertical-align: top; text-align: left; } td img { width: 192px; image-rendering: auto; }
td p { margin: 2px 0; max-width: 192px; } pre { background: #f4f4f4; padding: 1em; overflow-x: auto; }
tr.case td { border-top: 1px solid #aaa; padding-top: 10px; } .bad { color: #b00; }"""


def write_page(folder: Path, runs: Sequence[CaseRun], scores: Scores, *, tables: str, title: str) -> Path:
    """Write ``index.html`` and its pictures.

    Args:
        folder: for all files; files of these names are overwritten.
        runs, scores: the same cases in the same order.
        tables: the summary as text.
        title: what was run.

    Returns:
        The page's path.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    names = list(runs[0].variants)
    heads = ["base", "best dense edit", "plain new picture"]
    heads += [f"{name}: {what}" for name in names for what in ("ours", "dense U-Net under our mask", "our mask")]
    rows = [_row(run, each, names, pictures) for run, each in zip(runs, scores.cases, strict=True)]
    page = folder / "index.html"
    page.write_text(
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Quality of edits</title>\n'
        f"<style>\n{_STYLE}\n</style>\n<h1>Quality of edits</h1>\n<p><code>{escape(title)}</code></p>\n"
        f"<pre>{escape(tables)}</pre>\n<table>\n<tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>\n"
        + "\n".join(rows)
        + "\n</table>\n</html>\n"
    )
    return page


def _row(run: CaseRun, scores: CaseScores, names: Sequence[str], folder: Path) -> str:
    case, best = run.case, scores.dense[scores.best_control]
    plain = scores.dense[0.0]
    cells = [
        _cell(run.base, folder, f"{case.id}-base", case.prompt, "" if scores.base_shown else "not as its words say"),
        _cell(
            run.dense[scores.best_control].picture,
            folder,
            f"{case.id}-dense",
            f"control {scores.best_control:g}, changes {scores.true_area:.1%}",
            _faults(best.success, best.wrong),
        ),
        _cell(run.dense[0.0].picture, folder, f"{case.id}-plain", "no control", _faults(plain.success, plain.wrong)),
    ]
    for name in names:
        edit, measured = run.variants[name], scores.variants[name]
        stem = f"{case.id}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        outlined = tinted(run.base.convert("RGB"), mask_picture(edit.mask, run.base.size))
        cells += [
            _cell(edit.picture, folder, f"{stem}-ours", _figures(measured), _verdict(measured.verdict)),
            _cell(edit.under_mask, folder, f"{stem}-under", "", _verdict(measured.verdict_under_mask)),
            _cell(outlined, folder, f"{stem}-mask", _mask_figures(measured), ""),
        ]
    count = len(cells)
    head = f"<b>{escape(case.id)}</b>, seed {case.seed}: {escape(case.edit)}"
    return f'<tr class="case"><td colspan="{count}">{head}</td></tr>\n<tr>{"".join(cells)}</tr>'


def _cell(picture: Any, folder: Path, name: str, caption: str, fault: str) -> str:
    picture.save(folder / f"{name}.png")
    lines = f"<p>{escape(caption)}</p>" if caption else ""
    lines += f'<p class="bad">{escape(fault)}</p>' if fault else ""
    return f'<td><img loading="lazy" src="{escape(folder.name)}/{escape(name)}.png" alt="{escape(name)}">{lines}</td>'


def _figures(scores: VariantScores) -> str:
    return (
        f"SSIM in mask {scores.ssim_inside:.3f} ({scores.psnr_inside:.1f} dB), to best {scores.ssim_to_best:.3f}; "
        f"seam {scores.seam:.1f}"
    )


def _mask_figures(scores: VariantScores) -> str:
    text = f"{scores.mask_area:.1%} of the picture"
    if scores.mask:
        text += f"; IoU {scores.mask.iou:.2f}, recall {scores.mask.recall:.2f}, precision {scores.mask.precision:.2f}"
    return text


def _verdict(verdict: Verdict) -> str:
    return _faults(verdict.success, verdict.wrong)


def _faults(success: bool, wrong: bool) -> str:
    faults = [] if success else ["not as the new words say"]
    faults += ["another object changed"] if wrong else []
    return ", ".join(faults)
