"""Options that name a U-Net with random weights, shared by the benchmarks."""

from __future__ import annotations

import argparse

from fisedit_compile.cli.edit_options import add_image_options


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--arch``, ``--size``, ``--batch`` and ``--compile``."""
    parser.add_argument(
        "--arch", default="sd15", metavar="tiny|sd15|sd2|sdxl", help="shape of the U-Net (default: sd15)"
    )
    add_image_options(parser)
    parser.add_argument("--compile", action="store_true", help="lower the sparse graphs through torch.compile")


def image_size(args: argparse.Namespace) -> int:
    """The side of the image in pixels: ``--size``, or the architecture's own.

    Raises:
        ValueError: the architecture is unknown.
    """
    from fisedit_compile.architectures import ARCHITECTURES, VAE_SCALE_FACTOR

    if args.arch not in ARCHITECTURES:
        raise ValueError(f"--arch {args.arch}: choose one of {', '.join(ARCHITECTURES)}")
    return args.size or VAE_SCALE_FACTOR * ARCHITECTURES[args.arch]["sample_size"]
