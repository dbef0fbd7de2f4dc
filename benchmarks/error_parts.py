"""What makes a sparse edit other than the dense U-Net under its mask.

    python benchmarks/error_parts.py --cases 10 --device cuda

Edits of the demo world without control. While the dense U-Net makes one under the mask, what a base keeps of a call is
recorded of it. Then sparse steps make the edit again, and take a part of that in the place of the base's: statistics of
group norms, keys and values outside the mask, or the maps that convolutions read around it. Or they compute another
number of cells around the mask. Printed is the structural similarity of each to the dense edit, inside the mask.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from tabulate import tabulate
from torch import Tensor

import fisedit_compile.editing.running_edit as running_edit
from fisedit_compile import Base, Edit, Editor, SparseUNet
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.editing.edit_run import EditRun
from fisedit_compile.editing.plain_pipeline import load_pipeline
from fisedit_compile.errors import FiseditError
from fisedit_compile.ir.call import Call
from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.quality.cases import load_cases
from fisedit_compile.quality.regions import enlarge
from fisedit_compile.quality.similarity import as_pixels, ssim_inside

#: Name -> what is the dense edit's, and how many cells around the mask are computed.
VARIANTS: dict[str, tuple[tuple[str, ...], int]] = {
    "as it was": ((), 0),
    "statistics": (("statistics",), 0),
    "keys, values": (("keys, values",), 0),
    "maps": (("maps",), 0),
    "statistics and maps": (("statistics", "maps"), 0),
    "a cell around it": ((), 1),
    "two cells": ((), 2),
    "a cell, and statistics": (("statistics",), 1),
}


def main(argv: list[str] | None = None) -> None:
    """Draw, compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/demo_model"))
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    pipe = load_pipeline(args.model, torch.device(args.device), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    editor = Editor(pipe, {"cache": "exact", "cross_replace": 0.0})
    rows: list[list[Any]] = []
    for case in load_cases("all", args.cases):
        noise = torch.Generator("cpu").manual_seed(case.seed)
        base = editor.generate(case.prompt, num_inference_steps=args.steps, guidance_scale=5.0, generator=noise)
        try:
            mask = editor.edit(base, case.edit).mask
        except FiseditError as error:
            print(f"left out, {case.id}: {error}")
            continue
        rows.append([case.id, float(mask.float().mean()), *similarities(editor, base, case.edit, mask)])
        print(tabulate([rows[-1]], tablefmt="plain", floatfmt=".3f", missingval="ran dense"), flush=True)
    columns = [[row[i] for row in rows if row[i] is not None] for i in range(1, 2 + len(VARIANTS))]
    rows.append(["mean", *(mean(column) if column else None for column in columns)])
    print(tabulate(rows, ["", "mask", *VARIANTS], floatfmt=".3f", missingval="ran dense"))


def similarities(editor: Editor, base: Base, prompt: str, mask: Tensor) -> list[float | None]:
    """Of the edits by each of :data:`VARIANTS` to the dense one under the mask; None for one whose steps ran dense."""
    recorded: list[Recorded] = []

    def record(unet: SparseUNet, call: Call) -> Tensor:
        out, cache = unet.record(call, samples=len(mask))
        recorded.append(cache)
        return out

    with patch.object(SparseUNet, "dense", record):
        dense = editor.edit(base, prompt, mask, dense=True)
    found = []
    for kinds, cells in VARIANTS.values():
        with patch.object(EditRun, "_cache", _mixed(recorded, kinds)), patch.object(running_edit, "RIM", cells):
            edit = editor.edit(base, prompt, mask)
        found.append(None if edit.report.ran_dense else _similarity(edit, dense, mask))
    return found


def _mixed(recorded: Sequence[Recorded], kinds: Sequence[str]) -> Any:
    """A way to get what the base keeps of a call, in which some kinds of entries are the dense edit's."""
    of_base = EditRun._cache

    def cache(run: EditRun, call: Call, edits: Any, **options: Any) -> Recorded:
        base, edit = of_base(run, call, edits, **options), recorded[run.calls_made]
        return base.with_values({entry: edit[entry] if _kind(entry, base) in kinds else base[entry] for entry in base})

    return cache


def _kind(entry: CacheEntry, cache: Recorded) -> str:
    if entry.kind in ("scale", "shift"):
        return "statistics"
    if entry.kind != "map" or cache[entry].shape[1:].numel() <= 4:  # the prediction, which is the base's outside
        return "another"
    return "keys, values" if cache[entry].ndim == 3 else "maps"  # these have heads


def _similarity(edit: Edit, dense: Edit, mask: Tensor) -> float:
    ours, theirs = as_pixels(edit.image), as_pixels(dense.image)
    return ssim_inside(ours, theirs, enlarge(mask[0].cpu(), (ours.shape[1], ours.shape[2])))


if __name__ == "__main__":
    main()
