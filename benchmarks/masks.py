"""How well the mask that an edit finds covers what its words change, by how it is made from the difference.

    python benchmarks/masks.py --cases 20 --steps 17 --device cuda

Cases are those of ``fisedit-compile quality``. An edit of all steps under Prompt-to-Prompt control says what truly
changes (80 % of the steps are controlled, 40 % where something is added); masks are made from the first fifth of the
steps of the edit with 80 %, as an editor makes them, before small holes are closed. One also takes all of where the
words stood that go, of a thing that goes as a whole; with a cell around it it is what an edit may change, and the last
is cut down to what changes. Printed are, for each way and kind of edit, intersection over union, recall, precision,
and the mask's area over the true one, means over the cases.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from fisedit_compile import Editor
from fisedit_compile.editing.plain_pipeline import load_pipeline
from fisedit_compile.editing.prompt_alignment import removed_tokens
from fisedit_compile.editing.running_edit import RIM
from fisedit_compile.masks.changed_part import changed_part
from fisedit_compile.masks.difference_mask import difference, find_region, otsu_threshold, smooth
from fisedit_compile.masks.grown import grown
from fisedit_compile.masks.old_words import attention_to, with_old_words, words_of_changes
from fisedit_compile.quality.cases import Case, load_cases
from fisedit_compile.quality.regions import MaskScores, changed_cells, score_mask

MODEL = Path(__file__).parents[1] / "examples" / "demo_model"
GUIDANCE = 5.0
CONTROL, CONTROL_OF_ADDED = 0.8, 0.4

#: Share of the steps from which a mask is found.
COMPARED = 0.2

#: The mask that the difference gives by default, and the same with where old words stood.
DEFAULT, OLD_WORDS = "smoothed, weak neighbours over 0.2", "and where old words stood"

#: That with a cell around it, which edits compute and leave free; and less what an edit of all steps does not change.
WITH_RIM, CHANGED = "and a cell around it", "and cut down to what changes"

Way = Callable[[Tensor], Tensor]


def otsu(strength: Tensor) -> Tensor:
    """What is over Otsu's threshold."""
    return strength > otsu_threshold(strength)[:, None, None]


WAYS: dict[str, Way] = {
    "Otsu's threshold": otsu,
    "grown by a cell": lambda strength: grown(otsu(strength)),
    **{
        f"{name}weak neighbours over {weak}": lambda strength, weak=weak, before=before: find_region(  # type: ignore[misc]
            before(strength), weak
        )
        for name, before in (("", lambda strength: strength), ("smoothed, ", smooth))
        for weak in (0.25, 0.2, 0.15)
    },
}


def main() -> None:
    """Draw, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--steps", type=int, default=17)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pipe = load_pipeline(args.model, torch.device(args.device), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    editor = Editor(pipe, {"dense_steps": args.steps, "cross_replace": CONTROL, "stride": 1})
    scores: dict[tuple[str, str], list[MaskScores]] = defaultdict(list)
    for count, case in enumerate(load_cases("all", args.cases), 1):
        strength, attention, finals = measure(editor, case, args.steps)
        region = changed_cells(finals[0][0], finals[1][0])
        masks = {name: way(strength) for name, way in WAYS.items()}
        masks[OLD_WORDS] = with_old_words(masks[DEFAULT], attention)
        masks[WITH_RIM] = grown(masks[OLD_WORDS], RIM)
        masks[CHANGED] = changed_part(masks[WITH_RIM], *finals)
        for name, mask in masks.items():
            if (score := score_mask(mask[0], region)) is not None:
                scores[name, case.kind].append(score)
        print(f"{count} of {args.cases} cases", flush=True)
    rows = [
        [kind, name, len(found), *(sum(getattr(each, field) for each in found) / len(found) for field in FIELDS)]
        for (name, kind), found in sorted(scores.items(), key=lambda item: item[0][1])
    ]
    print(tabulate(rows, headers=["kind", "mask", "cases", *FIELDS], floatfmt=".2f"))


FIELDS = ("iou", "recall", "precision", "area_ratio")


def measure(editor: Editor, case: Case, steps: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """What a mask is found from, and the final latents ``[1, c, h, w]`` of the base and of what it truly becomes.

    A mask is found from the difference ``[1, h, w]`` that an edit sees in its first steps, and from how strongly the
    base attends to the words that go, ``[1, h, w]``, in the last one of these.
    """
    base = editor.generate(
        case.prompt,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(case.seed),
    )
    latents: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(values["latents"].cpu())
        return {}

    asked: dict[str, Any] = {"dense": True, "background": "latents"}
    true = editor.edit(base, case.edit, cross_replace=CONTROL, callback_on_step_end=keep, **asked)
    if case.kind == "added":
        true = editor.edit(base, case.edit, cross_replace=CONTROL_OF_ADDED, **asked)
    compared = math.ceil(COMPARED * steps)
    before = torch.stack([each.cpu() for each in base.step_latents[:compared]])
    strength = difference(before, torch.stack(latents[:compared]))
    removed = removed_tokens(editor.pipe, base.prompts, [case.edit], {})
    maps = [kept.cpu() for entry, kept in base.calls[compared - 1].cache.items() if entry.kind == "attention"]
    height, width = base.latents.shape[2:]
    attention = attention_to(words_of_changes(removed, maps[0].shape[2]), maps, (height, width))
    return strength, attention, (base.latents.cpu(), true.latents.cpu())


if __name__ == "__main__":
    main()
