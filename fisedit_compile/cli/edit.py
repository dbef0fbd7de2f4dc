"""``fisedit-compile edit``: generate a picture, edit it by new words, and report what was saved."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fisedit_compile.cli.edit_options import add_attention
from fisedit_compile.cli.runtime import add_runtime_options, describe, finite, start, whole_number
from fisedit_compile.config import SparsityConfig

if TYPE_CHECKING:
    from PIL import Image

    from fisedit_compile.editing.result import EditReport

_FILES = """\
files written to --out:
  base.png, edit.png  the picture of --prompt, and of --edit
  mask.png            what was recomputed, white; --mask takes it
  overview.png        base, edit, mask over base, difference
  dense.png           with --compare-dense: the dense regeneration
  report.json         all figures (and with --json on stdout)

report.json: wall_seconds.base leaves out the capture of the U-Net's graph, once a process and size, which is
capture_seconds. wall_seconds.edit is one edit of the recorded base, all steps, text encoder and VAE included.
With --compare-dense the plain pipeline draws the new prompt from the same seed, without Prompt-to-Prompt:
wall_seconds.edit_dense is its time, unet_ms.dense_step a call of its U-Net, and ssim_vs_dense says how close
the edit came to it (1: equal). Without, the first two are null and the edit's own dense steps, which carry
over attention maps and are slower than plain ones; unet_ms.dense_of says which it is."""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "edit",
        help="generate a picture and edit it by new words",
        description="Generate a picture, find what new words change in it, and recompute only that.",
        epilog=_FILES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a diffusers pipeline")
    parser.add_argument("--prompt", required=True, metavar="WORDS", help="of the base")
    parser.add_argument("--edit", required=True, metavar="WORDS", help="the base's prompt with other words")
    parser.add_argument("--negative-prompt", metavar="WORDS", help="of both (default: none)")
    parser.add_argument(
        "--mask", type=Path, metavar="FILE", help="picture, white where to edit (default: found from the first steps)"
    )
    parser.add_argument("--steps", type=whole_number(1), default=50, metavar="N", help="denoising steps (default: 50)")
    parser.add_argument(
        "--dense-steps",
        type=_count_or_share,
        default=SparsityConfig.dense_steps,
        metavar="N|SHARE",
        help="steps that run dense before the mask is known: a count, or a share of --steps such as 0.2 "
        f"(default: {SparsityConfig.dense_steps})",
    )
    parser.add_argument(
        "--seed", type=whole_number(0, 2**64 - 1), default=0, metavar="N", help="of the noise (default: 0)"
    )
    parser.add_argument("--guidance", type=finite, default=7.5, metavar="X", help="guidance scale (default: 7.5)")
    parser.add_argument("--height", type=whole_number(1), metavar="PX", help="default: the model's own")
    parser.add_argument("--width", type=whole_number(1), metavar="PX", help="default: the model's own")
    add_attention(parser)
    parser.add_argument(
        "--compare-dense",
        action="store_true",
        help="also regenerate with the plain pipeline, and compare (needs torchmetrics: the optional group quality)",
    )
    add_runtime_options(parser)
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for all files (default: out)")
    parser.add_argument("--json", action="store_true", help="print report.json to stdout, and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the edit and write all files."""
    config = SparsityConfig(attention=args.attention, dense_steps=args.dense_steps)
    _check(args, config)
    mask = _read_mask(args.mask) if args.mask else None
    device, dtype = start(args)
    args.out.mkdir(parents=True, exist_ok=True)

    from fisedit_compile.architectures import latent_size
    from fisedit_compile.editing.editor import Editor
    from fisedit_compile.editing.overview import draw_overview, mask_picture
    from fisedit_compile.editing.plain_pipeline import load_pipeline, regenerate
    from fisedit_compile.quality.ssim import ssim

    pipe = load_pipeline(args.model, device, dtype)
    editor = Editor(pipe, config)
    factor = pipe.vae_scale_factor
    latent_size(args.height or factor, args.width or factor, scale_factor=factor)  # the pipeline would round
    arguments = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "negative_prompt": args.negative_prompt,
        "height": args.height,
        "width": args.width,
    }
    pipe.set_progress_bar_config(desc="base")
    base = editor.generate(args.prompt, generator=_generator(args), **arguments)
    pipe.set_progress_bar_config(desc="edit")
    edit = editor.edit(base, args.edit, mask)
    pictures = {"base": base.image, "edit": edit.image, "mask": mask_picture(edit.mask[0].cpu(), base.image.size)}
    pictures["overview"] = draw_overview(
        base.image, edit.image, edit.mask[0].cpu(), prompt=args.prompt, edit_prompt=args.edit
    )

    report, dense = edit.report, None
    if args.compare_dense:
        pipe.set_progress_bar_config(desc="edit, all dense")
        dense = regenerate(pipe, args.edit, generator=_generator(args), **arguments)
        pictures["dense"] = dense.image
        report = replace(report, unet_ms=_against(median(dense.unet_ms), report.unet_ms["sparse_step"]))
    capture_seconds = editor.unet.build_seconds
    values = report.to_dict()
    values["unet_ms"]["dense_of"] = "plain" if dense else "edit"
    values["wall_seconds"] = {
        "base": base.seconds - capture_seconds,
        "edit": values.pop("seconds"),
        "edit_dense": dense.seconds if dense else None,
    }
    values["capture_seconds"] = capture_seconds
    if dense:
        values["ssim_vs_dense"] = ssim(edit.image, dense.image)
    values.update(
        model=str(args.model),
        prompt=args.prompt,
        edit=args.edit,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        width=base.image.width,
        height=base.image.height,
        attention=args.attention,
        base_bytes=base.nbytes,
        command=args.command_line,
        **describe(device, dtype),
    )
    text = json.dumps(values, indent=2)
    for name, picture in pictures.items():
        picture.save(args.out / f"{name}.png")
    (args.out / "report.json").write_text(text + "\n")
    print(text if args.json else _summary(report, values, args.out))


def _check(args: argparse.Namespace, config: SparsityConfig) -> None:
    """What would fail after the base was generated has to fail before."""
    if args.prompt == args.edit:
        raise ValueError(f"--edit is the same as --prompt ({args.prompt!r}): change at least one word")
    dense = config.count_dense_steps(args.steps)
    if dense == args.steps:
        raise ValueError(f"all {args.steps} steps would run dense: lower --dense-steps or raise --steps")
    if args.compare_dense and find_spec("torchmetrics") is None:
        raise ValueError("--compare-dense needs torchmetrics: install it, or this package's optional group 'quality'")
    if dense == 0 and not args.mask:
        raise ValueError("--dense-steps 0 leaves no step to find a mask from: give --mask, or run some dense steps")


def _read_mask(path: Path) -> Image.Image:
    from PIL import Image

    from fisedit_compile.masks.user_mask import as_mask

    picture = Image.open(path)
    as_mask(picture, samples=1, size=(1, 1))  # raises where there is nothing to edit
    return picture


def _generator(args: argparse.Namespace) -> Any:
    import torch

    return torch.Generator("cpu").manual_seed(args.seed)  # on the CPU: the same noise for every device


def _against(dense_ms: float, sparse_ms: float | None) -> dict[str, float | None]:
    return {"dense_step": dense_ms, "sparse_step": sparse_ms, "speedup": dense_ms / sparse_ms if sparse_ms else None}


def _summary(report: EditReport, values: dict[str, Any], out: Path) -> str:
    lines = [str(report)]
    dense = values["wall_seconds"]["edit_dense"]
    if dense:
        edit = values["wall_seconds"]["edit"]
        lines.append(
            f"dense regeneration {dense:.1f} s: the edit is {dense / edit:.1f} times as fast; "
            f"SSIM of the two {values['ssim_vs_dense']:.3f}"
        )
    return "\n".join([*lines, f"pictures and report.json are in {out}"])


def _count_or_share(text: str) -> int | float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a count of steps nor a share of them") from None
