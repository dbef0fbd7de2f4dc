"""``fisedit-compile edit``: generate a picture or load its base, edit it by new words, and report what was saved."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fisedit_compile.cli.base_options import (
    add_base_options,
    generate_base,
    refuse_base_options,
    settle_base_options,
)
from fisedit_compile.cli.runtime import DTYPES, add_runtime_options, describe, start
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
capture_seconds; with --base it is null, and wall_seconds.load the time to read the base. wall_seconds.edit is one
edit of the recorded base, all steps, text encoder and VAE included, without the capture. seed is null with --base.
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
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--prompt", metavar="WORDS", help="of the base")
    base.add_argument(
        "--base", type=Path, metavar="DIR", help="saved base, which is then not generated; it settles all options of it"
    )
    parser.add_argument("--edit", required=True, metavar="WORDS", help="the base's prompt with other words")
    parser.add_argument(
        "--mask", type=Path, metavar="FILE", help="picture, white where to edit (default: found from the first steps)"
    )
    add_base_options(parser)
    parser.add_argument("--save-base", type=Path, metavar="DIR", help="save the base, for --base of later edits")
    parser.add_argument(
        "--background",
        choices=("pixels", "latents"),
        default="pixels",
        help="away from the mask the base's own pixels, or what is decoded of its latents (default: pixels)",
    )
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
    config = _settle(args)
    mask = _read_mask(args.mask) if args.mask else None
    device, dtype = start(args)
    args.out.mkdir(parents=True, exist_ok=True)

    from fisedit_compile.editing.editor import Editor
    from fisedit_compile.editing.overview import draw_overview, mask_picture
    from fisedit_compile.editing.plain_pipeline import load_pipeline, regenerate
    from fisedit_compile.quality.ssim import ssim

    pipe = load_pipeline(args.model, device, dtype)
    editor = Editor(pipe, config)
    begun = time.perf_counter()
    base = editor.load(args.base) if args.base else generate_base(editor, args)
    load_seconds = time.perf_counter() - begun if args.base else None
    if args.save_base:
        base.save(args.save_base)
    pipe.set_progress_bar_config(desc="edit")
    edit = editor.edit(base, args.edit, mask, background=args.background)
    pictures = {"base": base.image, "edit": edit.image, "mask": mask_picture(edit.mask[0].cpu(), base.image.size)}
    pictures["overview"] = draw_overview(
        base.image, edit.image, edit.mask[0].cpu(), prompt=base.prompts[0], edit_prompt=args.edit
    )

    report, dense, capture_seconds = edit.report, None, editor.unet.build_seconds
    if args.base:  # the edit's calls are the first of the process, and wait for the capture
        report = replace(report, seconds=report.seconds - capture_seconds)
    if args.compare_dense:
        pipe.set_progress_bar_config(desc="edit, all dense")
        dense = regenerate(pipe, args.edit, generator=base.rewound_generators()[0], **base.arguments)
        pictures["dense"] = dense.image
        report = replace(report, unet_ms=_against(median(dense.unet_ms), report.unet_ms["sparse_step"]))
    values = report.to_dict()
    values["unet_ms"]["dense_of"] = "plain" if dense else "edit"
    values["wall_seconds"] = {
        "base": None if args.base else base.seconds - capture_seconds,
        "load": load_seconds,
        "edit": values.pop("seconds"),
        "edit_dense": dense.seconds if dense else None,
    }
    values["capture_seconds"] = capture_seconds
    if dense:
        values["ssim_vs_dense"] = ssim(edit.image, dense.image)
    values.update(
        model=str(args.model),
        base=str(args.base or args.save_base) if args.base or args.save_base else None,
        prompt=base.prompts[0],
        edit=args.edit,
        negative_prompt=base.arguments.get("negative_prompt"),
        seed=args.seed,
        steps=base.arguments["num_inference_steps"],
        guidance=base.arguments["guidance_scale"],
        width=base.image.width,
        height=base.image.height,
        attention=config.attention,
        base_bytes=base.nbytes,
        command=args.command_line,
        **describe(device, dtype),
    )
    text = json.dumps(values, indent=2)
    for name, picture in pictures.items():
        picture.save(args.out / f"{name}.png")
    (args.out / "report.json").write_text(text + "\n")
    print(text if args.json else _summary(report, values, args.out))


def _settle(args: argparse.Namespace) -> SparsityConfig:
    """The options of the base, its own if it was saved; what would fail after it was generated has to fail before."""
    if args.compare_dense and find_spec("torchmetrics") is None:
        raise ValueError("--compare-dense needs torchmetrics: install it, or this package's optional group 'quality'")
    if args.base:
        config, prompt, dense = _settled_by_base(args)
    else:
        config, prompt = settle_base_options(args), args.prompt
        dense = config.count_dense_steps(args.steps)
        if args.save_base:
            from fisedit_compile.cache.write_base import check_target

            check_target(args.save_base)
    if prompt == args.edit:
        raise ValueError(f"--edit is the same as --prompt ({prompt!r}): change at least one word")
    if dense == 0 and not args.mask:
        raise ValueError("--dense-steps 0 leaves no step to find a mask from: give --mask, or run some dense steps")
    return config


def _settled_by_base(args: argparse.Namespace) -> tuple[SparsityConfig, str, int]:
    """Config, prompt and dense steps of a saved base, and its device and dtype where no others were asked for."""
    from fisedit_compile.cache.read_base import open_base

    refuse_base_options(args, args.base)
    if args.save_base:
        raise ValueError(f"--save-base: the base in {args.base} is saved already: leave one of the two out")
    with open_base(args.base) as opened:
        summary = opened.manifest.summary
    if summary["latents"][0] != 1 or not summary["pil"]:
        raise ValueError(f"{args.base} is no base of one picture: edit it from Python, by editor.load(...)")
    if args.dtype == "auto":
        args.dtype = next((name for name, dtype in DTYPES.items() if dtype == summary["dtype"]), "auto")
    if args.device == "auto" and summary["device"] == "cpu":
        args.device = "cpu"
    config = SparsityConfig(**summary["config"])
    return config, summary["prompts"][0], config.count_dense_steps(summary["visited_steps"])


def _read_mask(path: Path) -> Image.Image:
    from PIL import Image

    from fisedit_compile.masks.user_mask import as_mask

    picture = Image.open(path)
    as_mask(picture, samples=1, size=(1, 1))  # raises where there is nothing to edit
    return picture


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
