"""Edits of photos of the demo world: pictures that its renderer drew, and the model did not.

    python benchmarks/photos.py --device cuda --workers 4        # 100 cases, 50 steps
    python benchmarks/photos.py --cases 2 --steps 6              # a look, on any CPU

The cases are those of ``fisedit-compile quality``. Each scene is rendered before and after; what is equal in both is
the background. The judge, which has seen neither the model nor the methods, says whether the edit succeeded
(``success``: what changes is seen as the new words say; ``right``: and nothing else is seen otherwise); only photos
count in which it sees what is to change as it is. The last line is of the same edits of pictures that the model draws
from the same words.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from statistics import mean, median

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # for the renderer

from photo_edits.cases import CaseResult, Conditions, run_cases  # noqa: E402
from photo_edits.measure import table, write  # noqa: E402
from photo_edits.methods import METHODS, Settings  # noqa: E402

from fisedit_compile.cli.runtime import describe, whole_number  # noqa: E402
from fisedit_compile.quality.cases import load_cases  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Edit, judge and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "demo_model")
    parser.add_argument("--judge", type=Path, help="folder of the judge (default: the model's)")
    parser.add_argument("--cases", type=whole_number(1), default=100, metavar="N")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dino", type=Path, help="folder of DINO ViT-B/8 (default: the judge's features instead)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--workers", type=whole_number(1), default=1, metavar="N", help="processes that share the devices; seconds grow"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, written after each case")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="keep all pictures")
    args = parser.parse_args(argv)
    conditions = Conditions(
        model=args.model,
        judge=args.judge or args.model / "judge",
        dino=args.dino,
        methods=args.methods,
        settings=Settings(args.steps, args.guidance),
        device=torch.device(args.device),
        threads=torch.get_num_threads() if args.workers == 1 else max(1, len(os.sched_getaffinity(0)) // args.workers),
        pictures=args.pictures,
    )
    cases = load_cases("all", args.cases)
    done: list[CaseResult] = []
    for result in run_cases(conditions, cases, args.workers):
        done.append(result)
        _write(args, conditions, done)
        print(f"{len(done)} of {len(cases)}: {result.case}", file=sys.stderr, flush=True)
    print(table(figure for each in done for figure in each.figures))
    generated = [each.generated for each in done if each.generated is not None]
    if generated:
        shares = ", ".join(f"{name} {mean(each[name] for each in generated):.3f}" for name in ("success", "right"))
        print(f"\nFISEdit of {len(generated)} pictures that the model drew: {shares}")
    inverted, drawn = ([each.seconds[kind] for each in done if kind in each.seconds] for kind in ("inverted", "drawn"))
    if inverted and drawn:
        print(
            f"A base takes {median(inverted):.2f} s of a photo, {median(drawn):.2f} s where the model draws the "
            f"picture: {median(inverted) / median(drawn):.2f} times as long (medians)"
        )


def _write(args: argparse.Namespace, conditions: Conditions, done: list[CaseResult]) -> None:
    settings = {name: getattr(args, name) for name in ("steps", "guidance", "workers")}
    write(
        args.json,
        [figure for each in done for figure in each.figures],
        generated=[each.generated for each in done if each.generated is not None],
        base_seconds=[{"case": each.case, **each.seconds} for each in done],
        model=str(args.model),
        dino=str(args.dino),
        **settings,
        **describe(conditions.device, torch.float32),
    )


if __name__ == "__main__":
    main()
