"""``fisedit-compile bench edit``: whole edits, from words to pixels, against the compiled pipeline."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fisedit_compile.cli.config_fields import add_set_option, config_fields
from fisedit_compile.cli.edit_options import add_edit_options
from fisedit_compile.cli.json_file import check_json_path, write_json
from fisedit_compile.cli.runtime import add_runtime_options, describe, start, whole_number
from fisedit_compile.config import SparsityConfig

_METHOD = """\
Weights are random, so masks are given. A time is the median wall time of a picture from words to PIL; the device is
waited for before and after it. "compiled" is the pipeline with its U-Net under torch.compile in the mode that
--baseline names and its decoder under torch.compile, in the same process, at the base's steps and at as many as the
edit makes. "rest" is what an edit takes beside its U-Net calls, text encoder, decoder and conversion to PIL: the
pipeline's loop, and preparing."""


def add_parser(what: Any) -> None:
    """Add the subcommand to those of ``bench``."""
    parser = what.add_parser(
        "edit",
        help="whole edits, from words to pixels",
        description="Time whole edits of a recorded base against the same pipeline under torch.compile.",
        epilog=_METHOD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", default="sd15", metavar="tiny|sd15|sd2|sdxl", help="shapes (default: sd15)")
    parser.add_argument("--size", type=whole_number(1), metavar="PX", help="of the square image (default: the model's)")
    parser.add_argument("--steps", type=whole_number(2), default=50, metavar="N", help="of the base (default: 50)")
    parser.add_argument("--scheduler", choices=("ddim", "dpm++2m", "euler"), default="ddim", help="(default: ddim)")
    parser.add_argument("--guidance", type=float, default=7.5, metavar="SCALE", help="1: without (default: 7.5)")
    add_edit_options(parser)
    parser.add_argument(
        "--max-masks", type=whole_number(1), default=16, metavar="N", help="of the file, evenly spaced (default: 16)"
    )
    add_set_option(parser)
    parser.add_argument(
        "--baseline",
        choices=("compile", "reduce-overhead", "max-autotune-no-cudagraphs", "none"),
        default="reduce-overhead",
        help="mode of torch.compile of the opponent's U-Net; none leaves it out (default: reduce-overhead)",
    )
    parser.add_argument("--repeats", type=whole_number(1), default=5, metavar="N", help="timed pictures (default: 5)")
    add_runtime_options(parser, cuda_dtype="bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and conditions to FILE")
    parser.set_defaults(run=run_edit)


def run_edit(args: argparse.Namespace) -> None:
    """Measure, print the table, write the file."""
    check_json_path(args.json)
    config = SparsityConfig.of({"attention": args.attention, **config_fields(args.set)})
    device, dtype = start(args)

    from fisedit_compile.architectures import ARCHITECTURES, latent_size
    from fisedit_compile.bench.edit.measure import Settings, bench_edit
    from fisedit_compile.bench.masks import MaskSet
    from fisedit_compile.cli.model_options import image_size

    if args.arch not in ARCHITECTURES:
        raise ValueError(f"--arch {args.arch}: choose one of {', '.join(ARCHITECTURES)}")
    size = image_size(args)
    latents = latent_size(size, size)
    masks = [MaskSet.square(each, latents) for each in args.edit_size]
    if args.masks:
        masks.append(MaskSet.of_file(args.masks, latents, args.max_masks))
    settings = Settings(args.arch, size, args.steps, args.scheduler, args.guidance, args.baseline, args.repeats)
    conditions = {"command": args.command_line, **asdict(settings), **describe(device, dtype)}
    result = bench_edit(
        settings, masks, config, device, dtype, keep=lambda so_far: write_json(args.json, {**conditions, **so_far})
    )
    print(
        f"{size}x{size}, {args.arch}, {args.steps} steps ({args.scheduler}), {conditions['dtype']}, "
        f"{conditions['device_name']}, torch {conditions['versions']['torch']}"
    )
    print(_table(result, settings.steps))


def _ratio(compiled: float | None, edit: float) -> str:
    return "" if compiled is None else f"{compiled / edit:.2f}x"


def _table(result: dict[str, Any], steps: int) -> str:
    from tabulate import tabulate

    compiled, parts = result.get("compiled_ms", {}), result["parts_ms"]
    rows = []
    for row in result["rows"]:
        made = row["dense_steps"] + row["sparse_steps"]
        dense, sparse = ((row[f"{kind}_step_ms"] or 0) * row[f"{kind}_steps"] for kind in ("dense", "sparse"))
        decoder = parts["vae"] if row["decode_ms"] is None else row["decode_ms"]
        rest = row["edit_ms"] - dense - sparse - decoder - parts["text"] - parts["to_pil"]
        rows.append(
            [f"{row['active']:.1%} ({row['source']})", row["edit_ms"], dense, sparse, decoder, rest, made]
            + [
                f"{compiled[count] / row['edit_ms']:.2f}x" if count in compiled else ""
                for count in (str(steps), str(made))
            ]
        )
    heads = ["edited", "edit ms", "dense ms", "sparse ms", "decoder ms", "rest ms", "steps made"]
    lines = [tabulate(rows, [*heads, f"x compiled, {steps} steps", "x compiled, as many"], floatfmt=".1f")]
    lines.append("text {text:.1f}, dense decoder {vae:.1f}, to PIL {to_pil:.1f} ms".format(**parts))
    lines.append(
        f"a picture: plain {result['plain_ms']:.1f} ms, recorded {result['recording_ms']:.1f} ms"
        + "".join(f", compiled at {count} steps {value:.1f} ms" for count, value in compiled.items())
    )
    lines.append(f"base: {result['base_gib']:.2f} GiB")
    return "\n".join(lines)
