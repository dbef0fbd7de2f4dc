"""``fisedit-compile blocks``: predicts and measures how long each way to cover a mask (APSC) takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from fisedit_compile.cli.edit_options import add_edit_options, add_image_options
from fisedit_compile.cli.json_file import add_json_option, check_json_path, write_json
from fisedit_compile.cli.model_options import image_size
from fisedit_compile.cli.runtime import add_runtime_options, describe, start, whole_number
from fisedit_compile.config import SparsityConfig

if TYPE_CHECKING:
    from fisedit_compile.cost_model.block_comparison import Comparison
    from fisedit_compile.cost_model.calibration import Calibration

_MOST_MASKS = 5

_METHOD = """\
A time is that of all layers of a resolution together: convolutions, linear layers, attentions and the gather of halo
rows. Of the choices, "pixel" computes the mask itself, "paper" the tiles of the block that the paper's printed
objective chooses, "whole" every pixel, and "measured" the candidate that is predicted to take the least time.
Predictions come from timing each distinct layer at six numbers of rows; "measured us" comes from timing it at the very
number of rows of each choice. Norms, and the padding of rows to a CUDA graph's sizes, are in neither. Attention is
timed with the rows divided evenly among the samples.

The mask of an --edit-size is a square in the middle of the latents. Of the masks of a file (see fisedit-compile macs
--help), up to --max-masks are taken, evenly spaced over those that are not empty, and the columns are means over them;
"error" is the mean relative error of the predictions. On the CPU only the tiny architectures are measured."""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "blocks",
        help="compare the ways to cover a mask: the paper's blocks, pixel by pixel, whole",
        description="Predict and measure what each choice of blocks takes, resolution by resolution.",
        epilog=_METHOD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", required=True, metavar="tiny|sd15|sd2|sdxl", help="shape of the U-Net")
    add_image_options(parser)
    add_edit_options(parser)
    parser.add_argument(
        "--max-masks",
        type=whole_number(1),
        default=_MOST_MASKS,
        metavar="N",
        help=f"take at most N masks of the file, evenly spaced (default: {_MOST_MASKS})",
    )
    add_runtime_options(parser, cuda_dtype="bf16")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Calibrate, compare, print the table, write the file."""
    check_json_path(args.json)
    size = image_size(args)
    device, dtype = start(args)
    if device.type == "cpu" and not args.arch.startswith("tiny"):
        raise ValueError(
            f"blocks --arch {args.arch} on the CPU: timing its layers takes minutes there; "
            "give a tiny architecture or --device cuda"
        )

    from fisedit_compile.architectures import build_unet, unet_inputs
    from fisedit_compile.bench.masks import MaskSet
    from fisedit_compile.compiler.lower import lower
    from fisedit_compile.cost_model.block_comparison import BlockComparer
    from fisedit_compile.cost_model.calibration import calibrate
    from fisedit_compile.cost_model.layer_timer import LayerTimer
    from fisedit_compile.cost_model.row_costs import RowCosts
    from fisedit_compile.cost_model.row_layers import row_layers
    from fisedit_compile.ir.call import bind

    unet = build_unet(args.arch, device="meta", dtype=dtype)  # layers are timed with random values of these shapes
    inputs, keywords = unet_inputs(unet, batch=args.batch, height=size, width=size)
    height, width = inputs[0].shape[2:]
    latents = (int(height), int(width))
    sets = [MaskSet.square(edit_size, latents) for edit_size in args.edit_size]
    if args.masks:
        sets.append(MaskSet.of_file(args.masks, latents, args.max_masks))
    lowered = lower(unet, bind(unet, inputs, keywords), SparsityConfig(attention=args.attention))
    layers = tuple(row_layers(lowered))
    costs = RowCosts(layers, calibrate(layers, device, dtype))
    comparer = BlockComparer(lowered, costs, LayerTimer(device, dtype))
    rows: list[Comparison] = []
    for masks in sets:
        several = f", {len(masks.masks)} masks" if masks.source != "square" else ""
        rows += comparer.compare(f"{masks.source} {masks.active:.1%}{several}", masks.masks)
    conditions = {"command": args.command_line, **describe(device, dtype), "attention": args.attention}
    print(f"{args.arch}, image {size}x{size}, batch {args.batch}, {args.attention} attention")
    print(f"{conditions['device_name']}, {conditions['dtype']}, torch {conditions['versions']['torch']}")
    print(f"{_remark(costs.calibration)}\n")
    print(_table(rows))
    result = {**conditions, "arch": args.arch, "size": size, "batch": args.batch}
    result["calibration"] = costs.calibration.to_dict()
    write_json(args.json, {**result, "rows": [row.to_dict() for row in rows]})


def _remark(calibration: Calibration) -> str:
    """A line that names the model that predicts, and its error at points left out of its fit."""
    errors = [f"{name} {error:.1%}" for name, error in calibration.held_out.items()]
    return f"cost model: {calibration.model} (error at points left out: {', '.join(errors) or 'unknown'})"


def _table(rows: Sequence[Comparison]) -> str:
    """A table of every choice at every resolution for each set of masks, and of the sums over the resolutions."""
    from fisedit_compile.cost_model.block_comparison import CHOICES
    from fisedit_compile.ir.layout import size_text

    shown = [["masks", "size", "choice", "block", "rows", "predicted us", "measured us", "error"]]
    for source in dict.fromkeys(row.source for row in rows):
        own = [row for row in rows if row.source == source]
        for row in own:
            shown.append([
                source, size_text(row.size), row.choice, row.blocks, f"{row.mean('rows'):.0f}",
                f"{row.mean('predicted'):.1f}", f"{row.mean('measured'):.1f}", f"{row.mean_error:.1%}",
            ])  # fmt: skip
        for choice in CHOICES:
            sums = [sum(row.mean(of) for row in own if row.choice == choice) for of in ("predicted", "measured")]
            shown.append([source, "all", choice, "", "", *(f"{each:.1f}" for each in sums), ""])
    return tabulate(shown, tablefmt="plain", stralign="right", colalign=("left",) * 4, disable_numparse=True)
