"""``fisedit-compile bench``: how fast a sparse step is against the dense U-Net."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from fisedit_compile.bench.unet.settings import BASELINES, CURVE, Settings
from fisedit_compile.cli import bench_edit, bench_kernels, bench_start
from fisedit_compile.cli.edit_options import EDIT_SIZES, add_masks
from fisedit_compile.cli.json_file import add_json_option, check_json_path, write_json
from fisedit_compile.cli.model_options import add_model_options, image_size
from fisedit_compile.cli.runtime import add_runtime_options, describe, share, start, whole_number

#: Defaults of --repeats, --warmup and --max-masks by type of device: a dense call of a large U-Net takes seconds on a
#: CPU and milliseconds on a GPU.
_REPEATS, _WARMUP, _MOST_MASKS = {"cpu": 3, "cuda": 30}, {"cpu": 1, "cuda": 5}, {"cpu": 8, "cuda": 100}
#: Repeats with each mask of a file at most; the mean over the masks of the file rests on many more.
_MOST_MASK_REPEATS = 10

_METHOD = """\
Weights are random: what a call costs depends on its shapes alone. Dense calls and sparse steps take turns in one loop;
times are medians. On CUDA a sample is the mean of back-to-back calls that take 10 ms or more together, because the
steps of a pipeline follow one another like that; "latency_ms" and "host_ms" in the file are times of single calls on an
idle device. The mask of an --edit-size is a square in the middle, its side rounded to whole latent cells ('active' in
the file is the share that it really has); all samples of the batch have the same mask.

--masks takes an .npz with an array 'masks', bool [n, h, w], or 'packed', uint8 [n, s * s / 8]: the bits of n square
masks as numpy.packbits gives them. Each is any-pooled to the latents; masks without an active pixel are left out, and
their number is in the file. The row is the mean over the masks.

Progress goes to stderr. The file is written after each attention mode; benchmarks/README.md says what is in it."""


def _by_device(defaults: dict[str, int]) -> str:
    """Defaults by type of device, as the help prints them."""
    return ", ".join(f"{value} on {name.upper()}" for name, value in defaults.items())


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    bench: argparse.ArgumentParser = subparsers.add_parser("bench", help="time sparse steps against the dense U-Net")
    what = bench.add_subparsers(metavar="WHAT", required=True)
    bench_edit.add_parser(what)
    bench_kernels.add_parser(what)
    bench_start.add_parser(what)
    parser = what.add_parser(
        "unet",
        help="one U-Net call",
        description="Time a sparse step against one call of the dense U-Net, eager and compiled.",
        epilog=_METHOD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--edit-size",
        type=share,
        nargs="+",
        metavar="SHARE",
        help=f"shares of the picture that are edited (default: {' '.join(map(str, EDIT_SIZES))}, or none with --curve)",
    )
    parser.add_argument(
        "--curve",
        action="store_true",
        help=f"add edit sizes {' '.join(map(str, CURVE))}, which show where the dense U-Net becomes faster",
    )
    add_masks(parser)
    parser.add_argument(
        "--max-masks",
        type=whole_number(1),
        metavar="N",
        help=f"take at most N masks of the file, evenly spaced (default: {_by_device(_MOST_MASKS)})",
    )
    parser.add_argument(
        "--baseline",
        nargs="+",
        choices=BASELINES,
        default=["eager", "compile"],
        help="the dense U-Net as it is, and under torch.compile: as a user calls it (compile), or in another of its "
        "modes; 'x compiled' is against the fastest of those (default: eager compile)",
    )
    parser.add_argument(
        "--attention",
        nargs="+",
        choices=("masked", "full"),
        default=["masked", "full"],
        help="what recomputed pixels attend to (default: both modes)",
    )
    parser.add_argument(
        "--edits",
        type=whole_number(2),
        metavar="N",
        help="also time N edits in one batch, with squares at different places, against one at a time",
    )
    parser.add_argument(
        "--repeats", type=whole_number(1), metavar="N", help=f"rounds that are timed (default: {_by_device(_REPEATS)})"
    )
    parser.add_argument(
        "--warmup", type=whole_number(1), metavar="N", help=f"rounds before those (default: {_by_device(_WARMUP)})"
    )
    add_runtime_options(parser, cuda_dtype="bf16")
    add_json_option(parser)
    parser.set_defaults(run=run_unet)


def run_unet(args: argparse.Namespace) -> None:
    """Measure, print the table, write the file."""
    check_json_path(args.json)
    device, dtype = start(args)

    from fisedit_compile.architectures import latent_size
    from fisedit_compile.bench.masks import MaskSet
    from fisedit_compile.bench.unet.measure import bench_unet
    from fisedit_compile.bench.unet.table import summary, table

    size = image_size(args)
    latents = latent_size(size, size)
    edit_sizes = args.edit_size or ([] if args.curve else EDIT_SIZES)
    mask_sets = [MaskSet.square(each, latents) for each in dict.fromkeys([*edit_sizes, *(CURVE if args.curve else ())])]
    if args.masks:
        mask_sets.append(MaskSet.of_file(args.masks, latents, args.max_masks or _MOST_MASKS[device.type]))
    repeats = args.repeats or _REPEATS[device.type]
    settings = Settings(
        arch=args.arch,
        size=size,
        batch=args.batch,
        baselines=args.baseline,
        attentions=list(dict.fromkeys(args.attention)),
        compile_sparse=args.compile,
        edits=args.edits or 0,
        repeats=repeats,
        mask_repeats=min(repeats, _MOST_MASK_REPEATS),
        warmup=args.warmup or _WARMUP[device.type],
    )
    conditions = {"command": args.command_line, **asdict(settings), **describe(device, dtype)}
    result = bench_unet(
        settings, mask_sets, device, dtype, keep=lambda so_far: write_json(args.json, {**conditions, **so_far})
    )
    print(
        f"{size}x{size}, {settings.arch}, batch {settings.batch}, {conditions['dtype']}, {conditions['device_name']}, "
        f"{conditions['threads']} thread(s), torch {conditions['versions']['torch']}, {settings.repeats} repeats"
    )
    print(table(result["rows"]))
    if lines := summary(result):
        print(lines)
