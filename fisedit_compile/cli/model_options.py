"""The options of the benchmarks that name a U-Net with random weights."""

from __future__ import annotations

import argparse

from fisedit_compile.cli.edit_options import add_image_options


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """``--arch``, ``--size`` and ``--batch``."""
    parser.add_argument(
        "--arch", default="sd15", metavar="tiny|sd15|sd2|sdxl", help="shape of the U-Net (default: sd15)"
    )
    add_image_options(parser)


def image_size(args: argparse.Namespace) -> int:
    """The size of the image in pixels.

    Raises:
        ValueError: an architecture that is not known.
    """
    from fisedit_compile.architectures import ARCHITECTURES, VAE_SCALE_FACTOR

    if args.arch not in ARCHITECTURES:
        raise ValueError(f"--arch {args.arch}: choose one of {', '.join(ARCHITECTURES)}")
    return args.size or VAE_SCALE_FACTOR * ARCHITECTURES[args.arch]["sample_size"]
