"""Options that name an image and its edits, shared by the commands that count or time edits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fisedit_compile.cli.runtime import share, whole_number
from fisedit_compile.config import SparsityConfig

#: The edit sizes of a command by default: the paper's three shares of the picture.
EDIT_SIZES = (0.05, 0.15, 0.30)


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--size`` and ``--batch``."""
    parser.add_argument(
        "--size", type=whole_number(1), metavar="PX", help="side of the square image (default: the model's own)"
    )
    parser.add_argument(
        "--batch",
        type=whole_number(1),
        default=2,
        metavar="N",
        help="samples of the U-Net's batch; one picture under guidance takes 2 (default: 2)",
    )


def add_edit_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--edit-size``, ``--masks`` and ``--attention``."""
    add_edit_sizes(parser, EDIT_SIZES)
    add_masks(parser)
    add_attention(parser)


def add_edit_sizes(parser: argparse.ArgumentParser, default: Sequence[float]) -> None:
    """Add ``--edit-size`` for several sizes, with these as ``default``."""
    parser.add_argument(
        "--edit-size",
        type=share,
        nargs="+",
        default=list(default),
        metavar="SHARE",
        help=f"shares of the picture that are edited (default: {' '.join(map(str, default))})",
    )


def add_masks(parser: argparse.ArgumentParser) -> None:
    """Add ``--masks``."""
    parser.add_argument("--masks", type=Path, metavar="FILE.npz", help="take the masks of a file, too")


def add_attention(parser: argparse.ArgumentParser) -> None:
    """Add ``--attention`` for one mode."""
    parser.add_argument(
        "--attention",
        choices=("masked", "full"),
        default=SparsityConfig.attention,
        help="what a recomputed pixel attends to: recomputed pixels alone, or all pixels "
        f"(default: {SparsityConfig.attention})",
    )
