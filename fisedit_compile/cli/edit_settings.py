"""The options of ``fisedit-compile edit`` held to each other, and what a saved base settles of them."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fisedit_compile.cli.base_options import refuse_base_options, settle_base_options
from fisedit_compile.cli.edit_rounds import check_changes
from fisedit_compile.cli.runtime import DTYPES
from fisedit_compile.config import SparsityConfig

if TYPE_CHECKING:
    from PIL import Image


def settle(args: argparse.Namespace) -> SparsityConfig:
    """The options of the base, its own if it was saved; what would fail after it was generated has to fail before.

    Raises:
        ValueError: options that do not go together.
        SavedBaseError: no saved base, or no place for one.
    """
    if args.compare_dense and find_spec("torchmetrics") is None:
        raise ValueError("--compare-dense needs torchmetrics: install it, or this package's optional group 'quality'")
    if args.base:
        config, prompt, dense = _settled_by_base(args)
    else:
        config = settle_base_options(args)
        prompt, dense = args.prompt, config.count_dense_steps(args.steps)
        if dense == args.steps and not args.mask:
            raise ValueError(f"all {args.steps} steps would run dense: raise --steps, or give --mask")
        if args.photo and not prompt and not args.mask:
            raise ValueError("--photo without --prompt has no words that new ones could be held to: give --mask, too")
        if args.save_base:
            from fisedit_compile.cache.write_base import check_target

            check_target(args.save_base)
    check_changes(args.changes, prompt)
    if dense == 0 and not args.mask:
        raise ValueError("--dense-steps 0 leaves no step to find a mask from: give --mask, or run some dense steps")
    return config


def _settled_by_base(args: argparse.Namespace) -> tuple[SparsityConfig, str, int]:
    """Config, prompt and dense steps of a saved base; its scheduler; its device and dtype where none were asked for."""
    from fisedit_compile.cache.read_base import open_base

    refuse_base_options(args, args.base)
    if args.save_base or args.bases:
        option = "--save-base" if args.save_base else "--bases"
        raise ValueError(f"{option}: the base in {args.base} is saved already: leave one of the two out")
    with open_base(args.base) as opened:
        summary = opened.manifest.summary
    if summary["latents"][0] != 1 or not summary["pil"]:
        raise ValueError(f"{args.base} is no base of one picture: edit it from Python, by editor.load(...)")
    if args.dtype == "auto":
        args.dtype = next((name for name, dtype in DTYPES.items() if dtype == summary["dtype"]), "auto")
    if args.device == "auto" and summary["device"] == "cpu":
        args.device = "cpu"
    from fisedit_compile.editing.schedulers import SCHEDULERS

    if summary["scheduler"] in SCHEDULERS:  # any other has to be the model's own
        args.scheduler = summary["scheduler"]
    config = SparsityConfig(**summary["config"])
    return config, summary["prompts"][0], config.count_dense_steps(summary["visited_steps"])


def read_mask(path: Path) -> Image.Image:
    """The picture of ``--mask``.

    Raises:
        OSError: no picture that can be read.
        MaskError: nothing of it is white.
    """
    from PIL import Image

    from fisedit_compile.masks.user_mask import as_mask

    picture = Image.open(path)
    as_mask(picture, samples=1, size=(1, 1))  # raises where there is nothing to edit
    return picture
