"""The options that name an image and its edits, for the commands that count or compare edits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fisedit_compile.cli.runtime import share, whole_number
from fisedit_compile.config import SparsityConfig

_EDIT_SIZES = (0.05, 0.15, 0.30)


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """``--size`` and ``--batch``."""
    parser.add_argument("--size", type=whole_number(1), metavar="PX", help="of the square image (default: the model's)")
    parser.add_argument(
        "--batch", type=whole_number(1), default=2, metavar="N", help="2 is one picture with guidance (default: 2)"
    )


def add_edit_options(parser: argparse.ArgumentParser) -> None:
    """``--edit-size``, ``--masks`` and ``--attention``."""
    add_edit_sizes(parser, _EDIT_SIZES)
    parser.add_argument("--masks", type=Path, metavar="FILE.npz", help="also masks of a file")
    add_attention(parser)


def add_edit_sizes(parser: argparse.ArgumentParser, default: Sequence[float]) -> None:
    """``--edit-size``."""
    parser.add_argument(
        "--edit-size",
        type=share,
        nargs="+",
        default=list(default),
        metavar="SHARE",
        help=f"of the picture that is edited (default: {' '.join(map(str, default))})",
    )


def add_attention(parser: argparse.ArgumentParser) -> None:
    """``--attention``, one mode."""
    parser.add_argument(
        "--attention",
        choices=("masked", "full"),
        default=SparsityConfig.attention,
        help="what a recomputed pixel attends to: recomputed pixels alone, or all pixels "
        f"(default: {SparsityConfig.attention})",
    )
