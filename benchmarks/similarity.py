"""When is a stored picture's prompt similar enough to a request's? Cosines of prompts that differ in one thing or more.

Of the cases of ``fisedit-compile quality``: a case's two prompts, which differ in one thing; prompts of different
cases; and the most similar of many stored prompts of other cases, which is what a request meets whose own picture was
never drawn.

    python benchmarks/similarity.py --model examples/demo_model
    python benchmarks/similarity.py --model examples/demo_model --draw 40 --steps 50 --device cuda

The second also draws: as many pictures, each then changed once, twice and three times (an object or the background,
as users of ``serve_load.py`` do), by an edit of the first picture and anew. Printed are, by the number of changes and
by the cosine, what edits cost and how often edits and new pictures show what was asked for: all of it, and all of what
changes.
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

from fisedit_compile import Base, Editor, MaskError
from fisedit_compile.bench.serving.trace import Asked, World
from fisedit_compile.editing.plain_pipeline import load_pipeline
from fisedit_compile.quality.cases import KINDS, Scene, load_cases
from fisedit_compile.quality.judge import Judge, Sight
from fisedit_compile.quality.verdicts import shows
from fisedit_compile.serving.words import WordEncoder

STORED = 100
PAIRS = 4000
CHANGES = 3

_DRAWN = ["", "requests", "cosine", "mask", "none found", "time / new"]
_DRAWN += ["edit shows all", "new shows all", "edit shows changes", "new shows changes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="of a pipeline, or of a text model")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98])
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="pictures to draw (default: none)")
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
        print(tabulate(draw(args, words, chance), _DRAWN, tablefmt="github", floatfmt=".2f"))


def draw(args: argparse.Namespace, words: WordEncoder, chance: random.Random) -> list[list[object]]:
    """A row for each number of changes and range of cosines; the columns are :data:`_DRAWN`."""
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    pipe = load_pipeline(args.model, torch.device(args.device), dtype)
    pipe.set_progress_bar_config(disable=True)
    editor, judge, world = Editor(pipe), Judge.load(args.model / "judge"), World()
    found: list[tuple[str, list[float]]] = []
    for i in range(args.draw + 1):
        picture = world.draw(chance)
        before = world.asked(picture, i)
        base = new_picture(editor, before, args.steps)
        places: set[str] = set()
        for changes in range(1, CHANGES + 1):
            picture, place = world.change(picture, chance)
            places.add(place)
            after = world.asked(picture, i)
            if after.prompt == before.prompt:
                continue
            fresh = new_picture(editor, after, args.steps)
            largest = editor.config.dense_above if len(base.visits) == args.steps else 1.0  # as a service does
            start = time.perf_counter()
            try:
                image, failed = editor.edit(base, after.prompt, largest_mask=largest, cross_replace=0), False
            except MaskError:
                image, failed = None, True
            seconds = time.perf_counter() - start + failed * fresh.seconds
            shown = (image or fresh).image  # a service draws it anew then
            cosine = float(words.encode(before.prompt) @ words.encode(after.prompt))
            area = image.report.mask_area if image else float("nan")
            sights = [judge.look(each, after.scene) for each in (shown, fresh.image)]
            all_of_it = [shows_all(sight, after.scene) for sight in sights]
            what_changes = [all(shows(sight, after.scene, each) for each in places) for sight in sights]
            values = [cosine, area, failed, seconds / fresh.seconds, *all_of_it, *what_changes]
            if i:  # the first builds graphs
                found += [(f"{changes} changed", values), (band(cosine, args.thresholds), values)]
    names = sorted({name for name, _ in found})
    return [[name, *summary([values for other, values in found if other == name])] for name in names]


def new_picture(editor: Editor, asked: Asked, steps: int) -> Base:
    assert asked.seed is not None
    generator = torch.Generator().manual_seed(asked.seed)
    return editor.generate(asked.prompt, num_inference_steps=steps, guidance_scale=5.0, generator=generator)


def shows_all(sight: Sight, scene: Scene) -> bool:
    return all(shows(sight, scene, place) for place in (*scene.items, "background"))


def band(cosine: float, thresholds: list[float]) -> str:
    """The range of cosines that one lies in."""
    bounds = [-1.0, *thresholds, 1.0]
    return next(f"cosine {low:5.2f} to {high:.2f}" for low, high in pairwise(bounds) if cosine <= high)


def summary(values: list[list[float]]) -> list[float]:
    return [len(values), *np.nanmean(np.array(values, float), axis=0)]


def cosines(words: WordEncoder, pairs: list[tuple[str, ...]]) -> np.ndarray:
    """Of two prompts each."""
    return np.array([float(words.encode(one) @ words.encode(other)) for one, other in pairs])


def nearest_pair(words: WordEncoder, prompts: list[str], chance: random.Random) -> tuple[str, str]:
    """The most similar of some prompts to another one, and that."""
    asked, *stored = chance.sample(prompts, STORED + 1)
    return max(stored, key=lambda each: float(words.encode(asked) @ words.encode(each))), asked


if __name__ == "__main__":
    main()
