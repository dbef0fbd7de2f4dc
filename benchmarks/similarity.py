"""When is a stored picture's prompt similar enough to a request's? Cosines of prompts that differ in one thing or more.

Of the cases of ``fisedit-compile quality``: a case's two prompts, which differ in one thing; prompts of different
cases; and the most similar of many stored prompts of other cases, which is what a request meets whose own picture was
never drawn.

    python benchmarks/similarity.py --model examples/demo_model
    python benchmarks/similarity.py --model examples/demo_model --draw 40 --steps 50 --device cuda

The second also draws: as many requests, half of them with one thing changed, half the most similar of other cases, and
prints by cosine how large the masks are that edits find, and what an edit takes of the time of a new picture.
"""

from __future__ import annotations

import argparse
import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from fisedit_compile.quality.cases import KINDS, load_cases
from fisedit_compile.serving.words import WordEncoder

STORED = 100
PAIRS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="of a pipeline, or of a text model")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98])
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="requests to draw (default: none)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="denoising steps (default: 50)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    words, cases, chance = WordEncoder.of_folder(args.model), load_cases(), random.Random(0)
    pairs = {kind: [(case.prompt, case.edit) for case in cases if case.kind == kind] for kind in KINDS}
    similar = {kind: cosines(words, of_kind) for kind, of_kind in pairs.items()}
    similar["all of these"] = np.concatenate(list(similar.values()))
    prompts = [case.prompt for case in cases]
    similar["other cases"] = cosines(words, [tuple(chance.sample(prompts, 2)) for _ in range(PAIRS)])
    similar[f"the nearest of {STORED}"] = cosines(words, [nearest_pair(words, prompts, chance) for _ in range(PAIRS)])

    rows = [
        [name, *np.percentile(values, [1, 10, 50, 90, 99]), *((values >= least).mean() for least in args.thresholds)]
        for name, values in similar.items()
    ]
    heads = ["prompts", *(f"p{share}" for share in (1, 10, 50, 90, 99)), *(f">= {least}" for least in args.thresholds)]
    formats = ["", *[".3f"] * 5, *[".1%"] * len(args.thresholds)]
    print(tabulate(rows, heads, tablefmt="github", floatfmt=formats))
    if args.draw:
        changed = chance.sample([(case.prompt, case.edit) for case in cases], args.draw // 2)
        others = [nearest_pair(words, prompts, chance) for _ in range(args.draw - len(changed))]
        drawn = draw(args, words, [*changed, *others])
        print(tabulate(drawn, ["cosine", "requests", "mask", "too large", "time"], tablefmt="github", floatfmt=".2f"))


def draw(args: argparse.Namespace, words: WordEncoder, pairs: list[tuple[str, str]]) -> list[list[object]]:
    """By ranges of cosines: how many, the mean of the masks' areas, the share of masks over ``dense_above``, and the
    mean of the times of edits over those of new pictures, the failed ones with what both took."""
    from fisedit_compile import Editor, LargeMaskError
    from fisedit_compile.editing.plain_pipeline import load_pipeline

    dtype = torch.float32 if args.device == "cpu" else torch.float16
    pipe = load_pipeline(args.model, torch.device(args.device), dtype)
    pipe.set_progress_bar_config(disable=True)
    editor = Editor(pipe)
    found = []
    for i, (before, after) in enumerate([pairs[0], *pairs]):  # the first twice: graphs are built on first use
        arguments = {"num_inference_steps": args.steps, "guidance_scale": 5.0}
        base = editor.generate(before, generator=torch.Generator().manual_seed(i), **arguments)
        start = time.perf_counter()
        try:
            editor.edit(base, after, largest_mask=editor.config.dense_above)
            failed = 0.0
        except LargeMaskError:
            failed = base.seconds
        seconds = time.perf_counter() - start + failed
        area = editor.edit(base, after).report.mask_area
        found.append((float(words.encode(before) @ words.encode(after)), area, failed > 0, seconds / base.seconds))
    bounds = [-1.0, *args.thresholds, 1.01]
    rows: list[list[object]] = []
    for low, high in pairwise(bounds):
        of_range = np.array([each for each in found[1:] if low <= each[0] < high])
        if len(of_range):
            rows.append([f"{low} to {min(high, 1.0)}", len(of_range), *of_range[:, 1:].mean(axis=0)])
    return rows


def cosines(words: WordEncoder, pairs: list[tuple[str, ...]]) -> np.ndarray:
    """Of two prompts each."""
    return np.array([float(words.encode(one) @ words.encode(other)) for one, other in pairs])


def nearest_pair(words: WordEncoder, prompts: list[str], chance: random.Random) -> tuple[str, str]:
    """The most similar of some prompts to another one, and that."""
    asked, *stored = chance.sample(prompts, STORED + 1)
    return max(stored, key=lambda each: float(words.encode(asked) @ words.encode(each))), asked


if __name__ == "__main__":
    main()
