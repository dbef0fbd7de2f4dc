"""How much of an edit is lost where it visits every second, third or fourth step of its base.

    python benchmarks/stride.py --device cuda

Edits of the demo model by each stride, with one and the same mask, against the edit that visits all steps: SSIM and
PSNR inside the mask, the mask that the stride would find by itself, and the bytes of the base. It needs the group
"quality".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from tabulate import tabulate
from torchmetrics.functional.image import structural_similarity_index_measure

from fisedit_compile import Base, Edit, Editor

MODEL = Path(__file__).parents[1] / "examples" / "demo_model"
GUIDANCE = 5.0

SCHEDULERS = {"ddim": DDIMScheduler, "dpm++2m": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}

#: A prompt and the words of its edit.
PAIRS = [
    (
        "a cat on the left and a red car on the right, on a green background",
        "a dog on the left and a red car on the right, on a green background",
    ),
    (
        "a bear on the left and an owl on the right, in the snow",
        "a bear wearing a hat on the left and an owl on the right, in the snow",
    ),
    (
        "a pig on the left and a cactus on the right, on a green background",
        "a pig on the left and a sunflower on the right, on a green background",
    ),
    (
        "a yellow balloon on the left and a fox on the right, in the snow",
        "a red balloon on the left and a fox on the right, in the snow",
    ),
    (
        "a frog wearing a crown on the left and a tree on the right, on a green background",
        "a frog on the left and a tree on the right, on a green background",
    ),
    (
        "a lion on the left and a blue car on the right, on a green background",
        "a tiger on the left and a blue car on the right, on a green background",
    ),
]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 21])
    parser.add_argument("--strides", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=list(SCHEDULERS))
    args = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(MODEL).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    editors = {stride: Editor(pipe, {"stride": stride}) for stride in (1, *args.strides)}
    rows = []
    for name in args.schedulers:
        pipe.scheduler = SCHEDULERS[name].from_config(config)
        found = {stride: [] for stride in args.strides}
        for pair in PAIRS:
            for seed in args.seeds:
                whole_base, whole = edited(editors[1], pair, seed, args.steps)
                for stride in args.strides:
                    found[stride].append(compared(editors[stride], pair, seed, args.steps, whole_base, whole))
        for stride, figures in found.items():
            ssim, psnr, iou, size, made = zip(*figures, strict=True)
            rows.append([name, stride, made[0], mean(ssim), min(ssim), mean(psnr), mean(iou), mean(size)])
    heads = ["scheduler", "stride", "steps made", "SSIM", "lowest", "PSNR", "found IoU", "base"]
    print(tabulate(rows, heads, floatfmt=("", "", "", ".4f", ".4f", ".1f", ".2f", ".2f")))


def edited(editor: Editor, pair: tuple[str, str], seed: int, steps: int, mask: Any = None) -> tuple[Base, Edit]:
    """A base and its edit, the whole picture as the decoder gives it."""
    generator = torch.Generator().manual_seed(seed)
    base = editor.generate(pair[0], num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator)
    return base, editor.edit(base, pair[1], mask=mask, background="latents")


def compared(
    editor: Editor, pair: tuple[str, str], seed: int, steps: int, whole_base: Base, whole: Edit
) -> tuple[float, float, float, float, int]:
    """SSIM and PSNR inside the mask, IoU of the mask that is found, share of the base's bytes, and steps made."""
    base, edit = edited(editor, pair, seed, steps, mask=whole.mask[0].float())
    found = edited(editor, pair, seed, steps)[1].mask
    picture, reference = pixels(edit), pixels(whole)
    scale = picture.shape[-1] // whole.mask.shape[-1]
    inside = whole.mask[0].cpu().repeat_interleave(scale, 0).repeat_interleave(scale, 1).expand_as(picture)
    _, similar = structural_similarity_index_measure(picture, reference, data_range=1.0, return_full_image=True)
    error = float((picture - reference)[inside].square().mean())
    iou = float((found & whole.mask).sum() / (found | whole.mask).sum())
    made = edit.report.dense_steps + edit.report.sparse_steps
    return float(similar[inside].mean()), -10 * np.log10(error + 1e-12), iou, base.nbytes / whole_base.nbytes, made


def pixels(edit: Edit) -> torch.Tensor:
    """The first picture, ``[1, 3, H, W]`` in [0, 1]."""
    return torch.from_numpy(np.array(edit.image)).permute(2, 0, 1)[None] / 255


if __name__ == "__main__":
    main()
