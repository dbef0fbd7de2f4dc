"""Edits of photos of the demo world: pictures that its renderer drew, and the model did not.

    python benchmarks/photos.py --device cuda                    # 100 cases, 50 steps
    python benchmarks/photos.py --cases 2 --steps 6              # a look, on any CPU

The cases are those of ``fisedit-compile quality``. Each scene is rendered before and after; what is equal in both is
the background. The judge, which has seen neither the model nor the methods, says whether the edit succeeded
(``success``: what changes is seen as the new words say; ``right``: and nothing else is seen otherwise); only photos
count in which it sees what is to change as it is. The last line is of the same edits of pictures that the model draws
from the same words.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # for the renderer

from photo_edits.measure import Figures, PhotoCase, measure, table, write  # noqa: E402
from photo_edits.methods import METHODS, FisEdit, Settings  # noqa: E402
from photo_edits.rendered import as_picture, render  # noqa: E402
from photo_edits.structure import dino_keys, judge_features  # noqa: E402

from fisedit_compile.cli.runtime import describe  # noqa: E402
from fisedit_compile.editing.plain_pipeline import load_pipeline  # noqa: E402
from fisedit_compile.masks.grown import grown  # noqa: E402
from fisedit_compile.quality.cases import Case, load_cases  # noqa: E402
from fisedit_compile.quality.judge import Judge  # noqa: E402
from fisedit_compile.quality.verdicts import judge_edit, shows  # noqa: E402

#: Pixels around what differs in the rendered pictures that are no background: the rim of a latent cell.
_RIM = 8


def main(argv: list[str] | None = None) -> None:
    """Edit, judge and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "demo_model")
    parser.add_argument("--judge", type=Path, help="folder of the judge (default: the model's)")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dino", type=Path, help="folder of DINO ViT-B/8 (default: the judge's features instead)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, written after each case")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="keep all pictures")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    pipe = load_pipeline(args.model, device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    judge = Judge.load(args.judge or args.model / "judge")
    features = dino_keys(args.dino, device) if args.dino else judge_features(judge)
    settings = Settings(args.steps, args.guidance)
    methods = [METHODS[name](pipe, settings) for name in args.methods]
    own = next((each for each in methods if isinstance(each, FisEdit)), None)
    conditions = {"steps": args.steps, "guidance": args.guidance, "model": str(args.model), "dino": str(args.dino)}
    figures: list[Figures] = []
    generated: list[dict[str, float]] = []
    cases = load_cases("all", args.cases)
    for number, case in enumerate(cases, start=1):
        photo = rendered(case, judge)
        if photo is not None:
            figures += [measure(photo, method, features, args.pictures) for method in methods]
        if own is not None:
            before, after = own.edit_generated(case.prompt, case.edit, case.seed)
            if shows(judge.look(before, case.before), case.before, case.changed):
                generated.append(_verdict(case, judge, before, after))
        write(args.json, figures, generated=generated, **conditions, **describe(device, torch.float32))
        print(f"{number} of {len(cases)}: {case.id}", file=sys.stderr, flush=True)
    print(table(figures))
    if generated:
        shares = ", ".join(f"{name} {mean(each[name] for each in generated):.3f}" for name in ("success", "right"))
        print(f"\nFISEdit of {len(generated)} pictures that the model drew: {shares}")


def rendered(case: Case, judge: Judge) -> PhotoCase | None:
    """A case as a photo; None where the judge does not see in it what is to change."""
    before, after = (render(each, case.seed) for each in (case.before, case.after))
    photo = as_picture(before)
    if not shows(judge.look(photo, case.before), case.before, case.changed):
        return None
    differs = (before - after).abs().amax(0) > 1 / 255
    differs = grown(differs[None], _RIM)[0]
    return PhotoCase(
        case.id, photo, case.prompt, case.edit, ~differs, lambda picture: _verdict(case, judge, photo, picture)
    )


def _verdict(case: Case, judge: Judge, before: Image.Image, after: Image.Image) -> dict[str, float]:
    verdict = judge_edit(judge.look(before, case.before), judge.look(after, case.after), case)
    return {"success": float(verdict.success), "right": float(verdict.right)}


if __name__ == "__main__":
    main()
