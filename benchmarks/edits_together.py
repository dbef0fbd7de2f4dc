"""Edits of different bases in one run of the pipeline (``editor.edit_many``), beside the same edits one by one.

    python benchmarks/edits_together.py --model examples/demo_model --steps 4 --threads 1
    python benchmarks/edits_together.py --arch sd2 --size 768 --dtype bfloat16 --json out/together.json

Bases are as many as edits, each with noise of its own; masks are given, squares at several places, so that all steps
are sparse. Times are medians of whole edits, from words to pixels, behind one of each that is not timed. A model of an
architecture has random weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fisedit_compile import Edit, Editor, EditRequest
from fisedit_compile.architectures import ARCHITECTURES
from fisedit_compile.bench.edit.measure import EDIT, PROMPT
from fisedit_compile.bench.edit.random_pipeline import random_pipeline
from fisedit_compile.cli.runtime import add_runtime_options, describe, start
from fisedit_compile.editing.plain_pipeline import load_pipeline
from fisedit_compile.testing import relative_error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, metavar="DIR", help="folder of a diffusers pipeline")
    model.add_argument("--arch", choices=sorted(ARCHITECTURES), help="random weights of this architecture")
    parser.add_argument("--size", type=int, metavar="N", help="of the square picture (default: the model's)")
    parser.add_argument("--steps", type=int, default=50, metavar="N")
    parser.add_argument("--edits", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="at a time")
    parser.add_argument("--edit-size", type=float, nargs="+", default=[0.05, 0.15, 0.3], metavar="X")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    add_runtime_options(parser)
    args = parser.parse_args(argv)
    device, dtype = start(args)
    if args.model:
        pipe = load_pipeline(args.model, device, dtype)
    else:
        pipe = random_pipeline(
            args.arch, size=args.size or 512, words=(PROMPT, EDIT), scheduler="ddim", device=device, dtype=dtype
        )
    pipe.set_progress_bar_config(disable=True)
    editor = Editor(pipe)
    size = {"height": args.size, "width": args.size} if args.size else {}
    bases = [
        editor.generate(PROMPT, num_inference_steps=args.steps, generator=torch.Generator().manual_seed(seed), **size)
        for seed in range(max(args.edits))
    ]
    rows = []
    for edit_size in args.edit_size:
        for count in args.edits:
            sides = bases[0].latents.shape[2:]
            requests = [EditRequest(base, EDIT, square(*sides, edit_size, i)) for i, base in enumerate(bases[:count])]
            together, many = timed(lambda r=requests: editor.edit_many(r), args.repeats, device)  # type: ignore[misc]
            alone, each = timed(
                lambda r=requests: [editor.edit(a.base, a.prompt, a.mask) for a in r],  # type: ignore[misc]
                args.repeats,
                device,
            )
            error = max(relative_error(a.latents, b.latents) for a, b in zip(many, each, strict=True))
            rows.append(
                {"edit_size": edit_size, "edits": count, "together_s": together, "alone_s": alone, "error": error}
            )
            print(
                f"{edit_size:.0%}: {count} edits {together:.3f} s together, {alone:.3f} s one by one "
                f"({alone / together:.2f} times the throughput); latents differ by {error:.1e}",
                flush=True,
            )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        values = {"rows": rows, "steps": args.steps, "command": " ".join(sys.argv), **describe(device, dtype)}
        args.json.write_text(json.dumps(values, indent=2) + "\n")


def square(height: int, width: int, share: float, place: int) -> torch.Tensor:
    """A mask with a square of this share of the picture, at one of four places."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    side = max(1, round((share * height * width) ** 0.5))
    top, left = (height - side) * (place % 2), (width - side) * (place // 2 % 2)
    mask[top : top + side, left : left + side] = True
    return mask


def timed(work: Callable[[], list[Edit]], repeats: int, device: torch.device) -> tuple[float, list[Edit]]:
    """The median time of some work in seconds, and what it returned."""
    made: Any = work()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        made = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return median(seconds), made


if __name__ == "__main__":
    main()
