"""``fisedit-compile bench``: how fast a sparse step is against the dense U-Net."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fisedit_compile.cli import bench_kernels
from fisedit_compile.cli.runtime import add_runtime_options, describe, share, start, whole_number

_EDIT_SIZES = (0.05, 0.15, 0.30)
#: A dense call of a large U-Net takes seconds on a CPU and milliseconds on a GPU.
_REPEATS, _WARMUP, _MOST_MASKS = {"cpu": 3, "cuda": 30}, {"cpu": 1, "cuda": 5}, {"cpu": 8, "cuda": 100}

_METHOD = """\
Weights are random: what a call costs depends on its shapes alone. Dense calls and sparse steps take turns in one
loop; times are medians. A mask of --edit-size is a square in the middle, its side rounded to whole latent cells
('active' in the file is the share it really has); all samples of the batch have the same.

--masks takes an array 'masks', bool [n, h, w], or 'packed', uint8 [n, s * s / 8]: the bits of n square masks as
numpy.packbits gives them. Each is any-pooled to the latents; a mask without an active pixel is left out and
counted. The row is the mean over the masks."""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    bench: argparse.ArgumentParser = subparsers.add_parser("bench", help="time sparse steps against the dense U-Net")
    what = bench.add_subparsers(metavar="WHAT", required=True)
    bench_kernels.add_parser(what)
    parser = what.add_parser(
        "unet",
        help="one U-Net call",
        description="Time one U-Net call: dense, eager and compiled, against a sparse step.",
        epilog=_METHOD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch", default="sd15", metavar="tiny|sd15|sd2|sdxl", help="shape of the U-Net (default: sd15)"
    )
    parser.add_argument(
        "--size", type=whole_number(1), metavar="PX", help="of the square image (default: the architecture's own)"
    )
    parser.add_argument(
        "--batch", type=whole_number(1), default=2, metavar="N", help="2 is one picture with guidance (default: 2)"
    )
    parser.add_argument(
        "--edit-size",
        type=share,
        nargs="+",
        default=list(_EDIT_SIZES),
        metavar="SHARE",
        help="of the picture that is edited (default: 0.05 0.15 0.30)",
    )
    parser.add_argument("--masks", type=Path, metavar="FILE.npz", help="also masks of a file")
    parser.add_argument(
        "--max-masks", type=whole_number(1), metavar="N", help="of the file, evenly spaced (default: CPU 8, CUDA 100)"
    )
    parser.add_argument(
        "--baseline",
        nargs="+",
        choices=("eager", "compile"),
        default=["eager", "compile"],
        help="the dense U-Net as it is, and under torch.compile (default: both)",
    )
    parser.add_argument(
        "--attention", nargs="+", choices=("masked", "full"), default=["masked", "full"], help="(default: both)"
    )
    parser.add_argument("--compile", action="store_true", help="lower the sparse graphs through torch.compile, too")
    parser.add_argument("--repeats", type=whole_number(1), metavar="N", help="of the loop (default: CPU 3, CUDA 30)")
    parser.add_argument(
        "--warmup", type=whole_number(1), metavar="N", help="rounds before them (default: CPU 1, CUDA 5)"
    )
    add_runtime_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and conditions to FILE")
    parser.set_defaults(run=run_unet)


def run_unet(args: argparse.Namespace) -> None:
    """Measure, print the table, write the file."""
    if args.json and not args.json.resolve().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no folder {args.json.resolve().parent}")  # not after minutes
    device, dtype = start(args)

    from fisedit_compile.architectures import ARCHITECTURES, VAE_SCALE_FACTOR, latent_size
    from fisedit_compile.cli.bench_masks import MaskSet
    from fisedit_compile.cli.bench_unet import Settings, bench_unet, table

    if args.arch not in ARCHITECTURES:
        raise ValueError(f"--arch {args.arch}: choose one of {', '.join(ARCHITECTURES)}")
    size = args.size or VAE_SCALE_FACTOR * ARCHITECTURES[args.arch]["sample_size"]
    latents = latent_size(size, size)
    mask_sets = [MaskSet.square(share, latents) for share in args.edit_size]
    if args.masks:
        mask_sets.append(MaskSet.of_file(args.masks, latents, args.max_masks or _MOST_MASKS[device.type]))
    settings = Settings(
        arch=args.arch,
        size=size,
        batch=args.batch,
        baselines=args.baseline,
        attentions=args.attention,
        compile_sparse=args.compile,
        repeats=args.repeats or _REPEATS[device.type],
        warmup=args.warmup or _WARMUP[device.type],
    )
    conditions = {"command": args.command_line, **asdict(settings), **describe(device, dtype)}
    result = bench_unet(settings, mask_sets, device, dtype)
    print(
        f"{size}x{size}, {settings.arch}, batch {settings.batch}, {conditions['dtype']}, {conditions['device_name']}, "
        f"{conditions['threads']} thread(s), torch {conditions['versions']['torch']}, {settings.repeats} repeats"
    )
    print(table(result["rows"]))
    if args.json:
        args.json.write_text(json.dumps({**conditions, **result}, indent=2) + "\n")
