"""What makes a sparse edit other than the dense U-Net under its mask.

    python benchmarks/error_parts.py --cases 10 --device cuda
    python benchmarks/error_parts.py --ids object-large-04 object-large-11

Edits of the demo world without control. While the dense U-Net makes one under the mask, what a base keeps of a call is
recorded of it. Then sparse steps make the edit again, and take a part of that in the place of the base's: statistics of
group norms, keys and values outside the mask, or the maps that convolutions read around it. Or they compute another
number of cells around the mask. Or statistics are the base's, changed as the dense edit changed them at another of its
steps; or they follow the edit, as those of large masks do, whatever the size of this one. In all other columns they are
the base's. Printed is the structural similarity of each to the dense edit, inside the mask.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from tabulate import tabulate
from torch import Tensor

import fisedit_compile.editing.running_edit as running_edit
import fisedit_compile.planning.edit_plan as edit_plan
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


class Variant(NamedTuple):
    """How sparse steps make an edit again.

    Attributes:
        kinds: what of a call they take of the dense edit, see :func:`_kind`.
        cells: how many around the mask they compute.
        step: of the dense edit, for each step, as which the base's statistics are changed; None: not at all.
        follow: whether statistics follow the edit, however small its mask is.
    """

    kinds: tuple[str, ...] = ()
    cells: int = 0
    step: Callable[[int], int] | None = None
    follow: bool = False


VARIANTS = {
    "as it was": Variant(),
    "statistics": Variant(("statistics",)),
    "keys, values": Variant(("keys, values",)),
    "maps": Variant(("maps",)),
    "statistics and maps": Variant(("statistics", "maps")),
    "a cell around it": Variant(cells=1),
    "two cells": Variant(cells=2),
    "a cell, and statistics": Variant(("statistics",), 1),
    "of a step before": Variant((), 1, lambda step: max(step - 1, 0)),
    "of every fourth": Variant((), 1, lambda step: step // 4 * 4),
    "of the second": Variant((), 1, lambda step: min(step, 1)),
    "a cell, and they follow": Variant(cells=1, follow=True),
}


def main(argv: list[str] | None = None) -> None:
    """Draw, compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/demo_model"))
    parser.add_argument("--cases", type=int, default=10, help="the first ones")
    parser.add_argument("--ids", nargs="+", metavar="CASE", help="these instead, by name")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    pipe = load_pipeline(args.model, torch.device(args.device), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    editor = Editor(pipe, {"cache": "exact", "cross_replace": 0.0})
    rows: list[list[Any]] = []
    every = load_cases("all", None if args.ids else args.cases)
    if unknown := set(args.ids or ()) - {case.id for case in every}:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    for case in [case for case in every if not args.ids or case.id in args.ids]:
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
    for variant in VARIANTS.values():
        cache = _mixed(base, recorded, variant)
        above = patch.object(edit_plan, "FOLLOW_ABOVE", 0.0 if variant.follow else 1.0)
        with patch.object(EditRun, "_cache", cache), patch.object(running_edit, "RIM", variant.cells), above:
            edit = editor.edit(base, prompt, mask)
        found.append(None if edit.report.ran_dense else _similarity(edit, dense, mask))
    return found


def _mixed(base: Base, recorded: Sequence[Recorded], variant: Variant) -> Any:
    """A way to get what the base keeps of a call, part of which is the dense edit's."""
    of_base = EditRun._cache

    def cache(run: EditRun, call: Call, edits: Any, **options: Any) -> Recorded:
        kept, edit = of_base(run, call, edits, **options), recorded[run.calls_made]
        values = {entry: edit[entry] if _kind(entry, kept) in variant.kinds else kept[entry] for entry in kept}
        if variant.step is not None:
            step = variant.step(run.calls_made)
            values |= _changed_statistics(kept, base.calls[step].cache, recorded[step])
        return kept.with_values(values)

    return cache


def _changed_statistics(now: Recorded, before: Recorded, after: Recorded) -> dict[CacheEntry, Tensor]:
    """The base's scale and shift at one step, changed as they were at another: by a factor, and what is added to it."""
    changed = {}
    for scale in (entry for entry in now if entry.kind == "scale"):
        shift = CacheEntry(scale.node, "shift")
        factor = after[scale] / before[scale]
        added = (after[shift] - factor * before[shift]) / after[scale]
        changed[scale] = now[scale] * factor
        changed[shift] = now[shift] * factor + added * changed[scale]
    return changed


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
