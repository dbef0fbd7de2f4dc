"""Where the time of a whole edit goes around its U-Net calls.

    python benchmarks/edit_timeline.py --arch sd2 --size 768 --steps 50 --device cuda

Random weights, a mask in the middle of the picture, and other words each time. Printed are medians in milliseconds: of
the whole edit, from its begin to the first U-Net call, from there to the end of the last one, and what comes behind.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from tabulate import tabulate
from torch import Tensor

from fisedit_compile import Editor
from fisedit_compile.bench.edit.random_pipeline import random_pipeline
from fisedit_compile.masks.sample_masks import square_mask
from fisedit_compile.runtime.timer import UNetTimer

PROMPT = "a photo of a cat on a chair"


def main(argv: list[str] | None = None) -> None:
    """Time edits of each share of the picture, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="tiny")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--edit-size", type=float, nargs="+", default=[0.05, 0.3])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    warm = 3  # edits that are not timed: graphs are captured in the first two
    edits = [f"a photo of a dog{i} on a chair" for i in range(len(args.edit_size) * (warm + args.repeats))]
    words = iter(edits)
    pipe = random_pipeline(
        args.arch,
        size=args.size,
        words=(PROMPT, *edits),
        scheduler="ddim",
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    rows = []
    with torch.inference_mode():
        editor = Editor(pipe)
        noise = torch.Generator("cpu").manual_seed(0)
        size = {"height": args.size, "width": args.size}
        base = editor.generate(PROMPT, num_inference_steps=args.steps, generator=noise, **size)
        for share in args.edit_size:
            mask = square_mask(share, base.latents.shape[2:])  # type: ignore[arg-type]
            for _ in range(warm):
                editor.edit(base, next(words), mask)
            times = [_parts(lambda mask=mask: editor.edit(base, next(words), mask)) for _ in range(args.repeats)]  # type: ignore[misc]
            rows.append([f"{share:.0%}", *map(median, zip(*times, strict=True))])
    print(tabulate(rows, ["", "edit", "before", "loop", "behind"], floatfmt=".1f"))


def _parts(edit: Callable[[], Any]) -> tuple[float, float, float, float]:
    """Milliseconds of an edit, before its first U-Net call, from there to the end of its last, and behind."""
    began: list[float] = []
    marks: list[Any] = []
    timed = UNetTimer.time

    def note(timer: UNetTimer, kind: str, device: torch.device, run: Callable[[], Tensor]) -> Tensor:
        began.append(time.perf_counter())
        marks.append(UNetTimer._mark(device))
        out = timed(timer, kind, device, run)
        marks.append(UNetTimer._mark(device))
        return out

    _wait()
    start = time.perf_counter()
    with patch.object(UNetTimer, "time", note):
        edit()
    _wait()
    whole, before = (time.perf_counter() - start) * 1e3, (began[0] - start) * 1e3
    first, last = marks[0], marks[-1]
    loop = (last - first) * 1e3 if isinstance(first, float) else first.elapsed_time(last)
    return whole, before, loop, whole - before - loop


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
