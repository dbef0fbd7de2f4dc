"""``fisedit-compile edit``: generate a picture, or take a photo or a saved base, and edit it by new words."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisedit_compile.cli.base_options import (
    add_base_options,
    make_base,
)
from fisedit_compile.cli.edit_files import EditFiles
from fisedit_compile.cli.edit_report import Made, report_values
from fisedit_compile.cli.edit_rounds import Change, add_changes
from fisedit_compile.cli.edit_settings import read_mask, settle
from fisedit_compile.cli.pipelines import add_model_option, open_pipeline
from fisedit_compile.cli.runtime import add_runtime_options, describe, start

if TYPE_CHECKING:
    from fisedit_compile.editing.base import Base
    from fisedit_compile.editing.editor import Editor
    from fisedit_compile.editing.result import Edit

_EPILOG = """\
examples:
  two edits of one picture, and a third that changes the second:
    fisedit-compile edit --model DIR --prompt "a cat on a chair" --seed 7 \\
        --edit "a dog on a chair" --edit "a lion on a chair" --then "a lion on a throne"
  a photo; without --prompt it needs a mask, and is filled in by the words:
    fisedit-compile edit --model DIR --photo cat.jpg --prompt "a cat on a chair" --edit "a dog on a chair"
    fisedit-compile edit --model DIR --photo cat.jpg --mask mask.png --edit "a red cushion"
  a base that is drawn once, whoever asks for it with the same settings:
    fisedit-compile edit --model DIR --bases ~/bases --prompt "a cat on a chair" --edit "a dog on a chair"

files written to --out, each whole or not at all:
  base.png, edit.png  the picture of --prompt (or the photo), and of --edit
  mask.png            what was edited, white; --mask takes it
  overview.png        base, edit, mask over base, difference; a row an edit
  dense.png           with --compare-dense: the dense regeneration
  report.json         all figures (and with --json on stdout)
With several edits their files have numbers, edit-1.png and so on, in the order of the command line. base.png and
edit.png say prompt, seed and settings in the text chunk that A1111's "PNG Info" reads. ComfyUI keeps other chunks, and
makes a workflow of this one. Neither draws the same picture from it: their noise is another one.

report.json: wall_seconds.base leaves out the making of the U-Net's graphs, once a process and size, which is
capture_seconds; it is null where the base was loaded, and wall_seconds.load the time to read it. wall_seconds.edit is
one edit of the recorded base, all steps, text encoder and VAE included, without the graphs; wall_seconds.rebase the
time before it to record the picture that --then changes. seed is null with --base and --photo. With several edits
what is of one edit is in the list "edits".
With --compare-dense the plain pipeline draws the new prompt from the same seed, without Prompt-to-Prompt:
wall_seconds.edit_dense is its time, unet_ms.dense_step a call of its U-Net, and ssim_vs_dense says how close
the edit came to it (1: equal). Without, the first two are null and the edit's own dense steps, which carry
over attention maps and are slower than plain ones; unet_ms.dense_of says which it is."""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "edit",
        help="edit a picture by new words",
        description="Generate a picture or take a photo, find what new words change in it, and recompute only that.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_option(parser)
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--prompt", metavar="WORDS", help="of the base")
    base.add_argument(
        "--base", type=Path, metavar="DIR", help="saved base, which is then not generated; it settles all options of it"
    )
    add_changes(parser)
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="picture, white where to edit, for all edits (default: found from the first steps of each)",
    )
    add_base_options(parser)
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--save-base", type=Path, metavar="DIR", help="save the base, for --base of later edits")
    kept.add_argument(
        "--bases",
        type=Path,
        metavar="DIR",
        help="folder of bases: one of exactly these settings is taken from there, or made and kept there",
    )
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
    """Make the edits and write all files."""
    config = settle(args)
    mask = read_mask(args.mask) if args.mask else None
    device, dtype = start(args)
    if args.bases:
        from fisedit_compile.cli.kept_bases import base_name

        args.base_name = base_name(args, config, device, dtype)

    from fisedit_compile.editing.editor import Editor

    editor = Editor(open_pipeline(args.model, args.scheduler, device, dtype), config)
    args.out.mkdir(parents=True, exist_ok=True)
    base, where, seconds = _base(editor, args)
    seed = None if args.base or args.photo else args.seed
    files = EditFiles(args.out, args.model, len(args.changes))
    files.write_base(base)
    made: list[Made] = []
    before: Base = base
    edit: Edit | None = None
    for number, change in enumerate(args.changes, start=1):
        rebase_seconds = None
        if change.further and edit is not None:
            _announce(editor, args.changes, number, "record")
            begun = time.perf_counter()
            before = editor.base_of(edit)
            rebase_seconds = time.perf_counter() - begun
        else:
            before = base
        captured = editor.unet.build_seconds
        _announce(editor, args.changes, number, "edit")
        edit = editor.edit(before, change.words, mask, background=args.background)
        captured = editor.unet.build_seconds - captured
        dense = _regenerate(editor, args.changes, number, base) if args.compare_dense else None
        files.write_edit(before, edit, number)
        if dense:
            files.write(files.name("dense", number), dense.image)
        of = files.name("edit", number - 1) if change.further else "base"
        made.append(Made.of_edit(edit, of=of, capture_seconds=captured, rebase_seconds=rebase_seconds, dense=dense))
    shared = {
        "wall_seconds": seconds,
        "capture_seconds": editor.unet.build_seconds,
        "model": str(args.model),
        "base": None if where is None else str(where),
        "photo": None if args.photo is None else str(args.photo),
        "prompt": base.prompts[0],
        "negative_prompt": base.arguments.get("negative_prompt"),
        "seed": seed,
        "steps": base.arguments["num_inference_steps"],
        "guidance": base.arguments["guidance_scale"],
        "scheduler": base.schedule.name,
        "width": base.image.width,
        "height": base.image.height,
        "attention": config.attention,
        "base_bytes": base.nbytes,
        "command": args.command_line,
        **describe(device, dtype),
    }
    text = json.dumps(report_values(made, shared), indent=2)
    files.write_report(text)
    print(text if args.json else _summary(made, files))


def _base(editor: Editor, args: argparse.Namespace) -> tuple[Base, Path | None, dict[str, float | None]]:
    """The base, where it is saved, and the seconds that making or loading it took."""
    from fisedit_compile.cli.kept_bases import KeptBases

    begun = time.perf_counter()
    kept = KeptBases(args.bases) if args.bases else None
    where = args.base or (kept.folder_of(args.base_name) if kept else args.save_base)
    loaded = editor.load(args.base) if args.base else kept.find(editor, args.base_name) if kept else None
    if loaded is not None:
        return loaded, where, {"base": None, "load": time.perf_counter() - begun}
    begun = time.perf_counter()
    base = make_base(editor, args)
    seconds = {"base": time.perf_counter() - begun - editor.unet.build_seconds, "load": None}
    if args.save_base:
        base.save(args.save_base)
    if kept:
        where = kept.keep(base, args.base_name)
    return base, where, seconds


def _regenerate(editor: Editor, changes: list[Change], number: int, base: Base) -> Any:
    from fisedit_compile.editing.plain_pipeline import regenerate

    _announce(editor, changes, number, "edit, all dense")
    generator = base.rewound_generators()[0]
    dense = regenerate(editor.pipe, changes[number - 1].words, generator=generator, **base.arguments)
    return dense if base.frame is None else replace(dense, image=base.frame.restored([dense.image])[0])


def _announce(editor: Editor, changes: list[Change], number: int, what: str) -> None:
    """Say beside the pipeline's progress bar what it does."""
    count = len(changes)
    editor.pipe.set_progress_bar_config(desc=what if count == 1 else f"{what} {number} of {count}")


def _summary(made: list[Made], files: EditFiles) -> str:
    lines = []
    for number, each in enumerate(made, start=1):
        lines.append(str(each) if len(made) == 1 else f"{files.name('edit', number)}, {each.words!r}: {each}")
    return "\n".join([*lines, f"pictures and report.json are in {files.out}"])
