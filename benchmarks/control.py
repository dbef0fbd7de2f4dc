"""How long Prompt-to-Prompt control should last, and from how many steps a mask should be found.

    python benchmarks/control.py --cases 28 --device cuda

Dense edits of the demo world by several lengths of control: of the whole picture, and under the mask that is found from
the first steps. Printed are, for each kind of edit, the judge's verdicts, the structural similarity of edits under the
mask to those of the whole picture, and masks from one to eight steps against the cells that a dense edit changes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tabulate import tabulate

from fisedit_compile import Base, Edit, Editor
from fisedit_compile.editing.plain_pipeline import load_pipeline
from fisedit_compile.masks.difference_mask import difference_mask
from fisedit_compile.quality.cases import Case, load_cases
from fisedit_compile.quality.judge import Judge
from fisedit_compile.quality.regions import changed_cells, score_mask
from fisedit_compile.quality.ssim import ssim
from fisedit_compile.quality.verdicts import judge_edit, shows

CONTROLS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
STEPS_OF_MASK = (1, 2, 4, 8)
#: The steps that the mask of the edits is found from, and the length of control in them.
FOUND_FROM, FOUND_UNDER = 4, 0.8


def main(argv: list[str] | None = None) -> None:
    """Draw, judge and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/demo_model"))
    parser.add_argument("--judge", type=Path, help="folder of the judge (default: the model's)")
    parser.add_argument("--cases", type=int, default=28)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    pipe = load_pipeline(args.model, torch.device(args.device), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    judge = Judge.load(args.judge or args.model / "judge")
    editor = Editor(pipe, {"dense_steps": args.steps, "cross_replace": 1.0})
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case in load_cases("all", args.cases):
        generator = torch.Generator("cpu").manual_seed(case.seed)
        base = editor.generate(case.prompt, num_inference_steps=args.steps, guidance_scale=5.0, generator=generator)
        if shows(judge.look(base.image, case.before), case.before, case.changed):
            for name, value in _measure(editor, base, case, judge).items():
                figures[case.kind][name].append(value)
    names = list(dict.fromkeys(name for each in figures.values() for name in each))
    rows = [[name, *(mean(each[name]) if each[name] else None for each in figures.values())] for name in names]
    print(tabulate(rows, ["", *figures], floatfmt=".3f", missingval="-"))


def _measure(editor: Editor, base: Base, case: Case, judge: Judge) -> dict[str, float]:
    before = judge.look(base.image, case.before)

    def edit(control: float, mask: torch.Tensor | None = None) -> Edit:
        background: Any = "latents" if mask is None else "pixels"
        options = {"dense": True, "cross_replace": control, "background": background}
        return editor.edit(base, case.edit, mask, **options)

    whole = {control: edit(control) for control in CONTROLS}
    latents = whole[FOUND_UNDER].trajectory.latents
    after = [base.latents_after(visit) for visit in range(len(base.visits))]
    masks = {
        steps: difference_mask(torch.stack(after[:steps]), torch.stack(latents[:steps]))[0]
        for steps in {*STEPS_OF_MASK, FOUND_FROM}
        if steps <= len(after)
    }
    found: dict[str, float] = {}
    for control in CONTROLS:
        under = edit(control, masks[FOUND_FROM])
        for where, picture in (("whole", whole[control].image), ("under the mask", under.image)):
            verdict = judge_edit(before, judge.look(picture, case.after), case)
            found[f"success, {where}, control {control:g}"] = verdict.success
        for other in CONTROLS:
            found[f"SSIM, under control {control:g} to whole {other:g}"] = ssim(under.image, whole[other].image)
    for other in CONTROLS:
        region = changed_cells(base.latents[0], whole[other].latents[0])
        for steps, mask in masks.items():
            if (scores := score_mask(mask.to(region.device), region)) is not None:
                of = f"mask of {steps} steps to whole {other:g}"
                found |= {f"{of}, IoU": scores.iou, f"{of}, recall": scores.recall, f"{of}, area": scores.area_ratio}
    return found


if __name__ == "__main__":
    main()
