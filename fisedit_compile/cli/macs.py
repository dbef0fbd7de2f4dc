"""``fisedit-compile macs``: counts the multiply-accumulates of a U-Net call, dense and sparse, without weights."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from fisedit_compile.cli.edit_options import add_edit_options, add_image_options
from fisedit_compile.cli.json_file import add_json_option, check_json_path, write_json
from fisedit_compile.cli.runtime import describe

if TYPE_CHECKING:
    from fisedit_compile.macs.mask_sets import MaskCounts
    from fisedit_compile.macs.report import MacCount, MacReport

_METHOD = """\
Counting uses shapes alone, on the meta device; nothing is computed. One fused multiply-add is one MAC; convolutions,
linear layers and the two products of attention count, norms, activations and softmax do not. docs/macs.md has the
conventions.

The mask of an --edit-size is a square in the middle of the latents with the nearest whole side; its true share heads
the column. All samples of the batch share it. "once an edit" is what an edit computes once, for its prompt, and a dense
call in every step.

--masks takes an .npz with an array 'masks', bool [n, h, w], or 'packed', uint8 [n, s * s / 8]: the bits of n square
masks as numpy.packbits gives them. Each mask is counted by itself, and the column is the mean. Masks without an active
pixel are left out of it; the mean with them is printed below."""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "macs",
        help="count the multiply-accumulates of a U-Net call, dense and sparse",
        description="Count the multiply-accumulates (MACs) of a U-Net call and of a sparse step.",
        epilog=_METHOD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--arch", metavar="tiny|sd15|sd2|sdxl", help="shape of the U-Net")
    model.add_argument("--model", type=Path, metavar="DIR", help="folder of a diffusers pipeline; no weights are read")
    add_image_options(parser)
    add_edit_options(parser)
    parser.add_argument(
        "--by",
        choices=("op", "resolution", "module"),
        default="op",
        help="what each line of the table sums up (default: op)",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Count, print the table, write the file."""
    check_json_path(args.json)
    gc.disable()  # it would search the growing graphs again and again, which takes 3 of 22 s for SDXL
    try:
        _count(args)
    finally:
        gc.enable()


def _count(args: argparse.Namespace) -> None:
    import torch

    from fisedit_compile.macs.counter import MacCounter
    from fisedit_compile.macs.mask_sets import count_masks
    from fisedit_compile.masks.sample_masks import read_masks

    masks = read_masks(args.masks) if args.masks else None
    model = _model(args)
    size = args.size or model.vae_scale_factor * model.unet.config["sample_size"]
    counter = MacCounter.of(model, height=size, width=size, batch=args.batch, attention=args.attention)
    reports = [counter.report(edit_size=edit_size) for edit_size in args.edit_size]
    columns = [(f"{report.edit_size:.1%}", report) for report in reports]
    rows = [{**report.to_dict(), "masks": {"source": "square"}} for report in reports]
    counts = count_masks(counter, masks) if masks is not None else None
    if counts:
        columns.append((f"{len(counts.reports)} masks", counts.mean))
        rows.append({**counts.mean.to_dict(), "masks": {"source": args.masks.name, **counts.to_dict()}})
    name = args.arch or str(args.model)
    print(f"GMACs of one U-Net call: {name}, image {size}x{size}, batch {args.batch}, {args.attention} attention\n")
    print(_table(columns, args.by))
    if counts:
        print(f"\n{_remark(args.masks, counts)}")
    versions = describe(torch.device("meta"), torch.float32)["versions"]
    write_json(args.json, {"command": args.command_line, "model": name, "versions": versions, "rows": rows})


def _model(args: argparse.Namespace) -> Any:
    """The U-Net on the meta device as ``.unet``, and ``.vae_scale_factor``.

    Raises:
        ValueError: the architecture is unknown, or the folder has no ``UNet2DConditionModel``.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from fisedit_compile.architectures import VAE_SCALE_FACTOR, build_unet

    if args.arch:
        return SimpleNamespace(unet=build_unet(args.arch, device="meta"), vae_scale_factor=VAE_SCALE_FACTOR)
    file, vae = args.model / "unet" / "config.json", args.model / "vae" / "config.json"
    if not file.is_file():
        raise ValueError(f"{args.model} is no folder of a diffusers pipeline with a U-Net (no unet/config.json in it)")
    config = json.loads(file.read_text())
    if config.get("_class_name") != UNet2DConditionModel.__name__:
        raise ValueError(f"{file}: a {config.get('_class_name')} cannot be counted, wanted is a UNet2DConditionModel")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    levels = len(json.loads(vae.read_text())["block_out_channels"]) if vae.is_file() else 0
    return SimpleNamespace(unet=unet.eval(), vae_scale_factor=2 ** (levels - 1) if levels else VAE_SCALE_FACTOR)


def _remark(file: Path, counts: MaskCounts) -> str:
    """Lines that say how the counts of a file's masks spread."""
    p5, p50, p95 = (f"{counts.percentile(q) / 1e9:,.2f}" for q in (5, 50, 95))
    empty = f" (with the {counts.empty} empty ones {counts.mean_with_empty / 1e9:,.2f})" if counts.empty else ""
    return (
        f"{file.name}: {len(counts.reports)} masks, {counts.mean.edit_size:.1%} edited on average\n"
        f"mean {counts.mean.total / 1e9:,.2f}{empty}, 5th percentile {p5}, median {p50}, 95th percentile {p95}"
    )


def _table(columns: list[tuple[str, MacReport]], by: str) -> str:
    """A table for people with a column for the dense call and one for each edit, in G (1e9) MACs."""
    from fisedit_compile.macs.report import lineage

    heads, reports = zip(*columns, strict=True)
    dense: MacCount = reports[0].dense

    def line(label: str, of: Callable[[MacCount], int]) -> list[str]:
        return [label, *(f"{of(count) / 1e9:,.2f}" for count in (dense, *(report.counted for report in reports)))]

    rows = [["", "dense", *heads], line("total", lambda count: count.total)]
    rows.append(["", "", *(f"{report.ratio:.2f}x" if report.ratio else "-" for report in reports)])
    rows.append(line("without attention products", lambda count: count.without_attention))
    rows.append(
        ["once an edit", "", *(f"{report.prompt.total / 1e9:,.2f}" if report.prompt else "" for report in reports)]
    )
    if by == "module":
        for path in dict.fromkeys(lineage(path)[0] for path in dense.by_module):
            rows.append(line(path, lambda count, path=path: count.of_module(path)))  # type: ignore[misc]
    else:
        for key in getattr(dense, f"by_{by}"):
            rows.append(line(key, lambda count, key=key: getattr(count, f"by_{by}").get(key, 0)))  # type: ignore[misc]
    return tabulate(rows, tablefmt="plain", stralign="right", colalign=("left",), disable_numparse=True)
