"""Options that say how a base is generated, shared by the commands that generate one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisedit_compile.cli.edit_options import add_attention
from fisedit_compile.cli.runtime import finite, whole_number
from fisedit_compile.config import SparsityConfig

if TYPE_CHECKING:
    from fisedit_compile.editing.base import Base
    from fisedit_compile.editing.editor import Editor

#: Option -> its value where it is not given. A saved base has its own: it has to be known whether an option was given.
_DEFAULTS: dict[str, Any] = {
    "negative_prompt": None,
    "steps": 50,
    "dense_steps": SparsityConfig.dense_steps,
    "seed": 0,
    "guidance": 7.5,
    "height": None,
    "width": None,
    "attention": SparsityConfig.attention,
}


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Add what a base is generated from, but for ``--model`` and ``--prompt``; for :func:`settle_base_options`."""
    parser.add_argument("--negative-prompt", metavar="WORDS", help="of both (default: none)")
    parser.add_argument("--steps", type=whole_number(1), metavar="N", help="denoising steps (default: 50)")
    parser.add_argument(
        "--dense-steps",
        type=_count_or_share,
        metavar="N|SHARE",
        help="steps that run dense before the mask is known: a count, or a share of --steps such as 0.2 "
        f"(default: {SparsityConfig.dense_steps})",
    )
    parser.add_argument("--seed", type=whole_number(0, 2**64 - 1), metavar="N", help="of the noise (default: 0)")
    parser.add_argument("--guidance", type=finite, metavar="X", help="guidance scale (default: 7.5)")
    parser.add_argument("--height", type=whole_number(1), metavar="PX", help="default: the model's own")
    parser.add_argument("--width", type=whole_number(1), metavar="PX", help="default: the model's own")
    add_attention(parser)
    parser.set_defaults(**dict.fromkeys(_DEFAULTS))


def refuse_base_options(args: argparse.Namespace, base: Path) -> None:
    """Hold a command that is given a saved base to that.

    Raises:
        ValueError: an option that the base has settled was given, too.
    """
    given = [f"--{name.replace('_', '-')}" for name in _DEFAULTS if getattr(args, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: the base in {base} was generated with its own: leave that out")


def settle_base_options(args: argparse.Namespace) -> SparsityConfig:
    """Give options that were not given their defaults.

    Raises:
        ValueError: a value that the config does not take, or no step that would run sparse.
    """
    for name, value in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    config = SparsityConfig(attention=args.attention, dense_steps=args.dense_steps)
    if config.count_dense_steps(args.steps) == args.steps:
        raise ValueError(f"all {args.steps} steps would run dense: lower --dense-steps or raise --steps")
    return config


def generate_base(editor: Editor, args: argparse.Namespace) -> Base:
    """The base of ``--prompt`` and the options.

    Raises:
        ValueError: a height or width that the pipeline would round.
    """
    import torch

    from fisedit_compile.architectures import latent_size

    factor = editor.pipe.vae_scale_factor
    latent_size(args.height or factor, args.width or factor, scale_factor=factor)
    editor.pipe.set_progress_bar_config(desc="base")
    return editor.generate(
        args.prompt,
        generator=torch.Generator("cpu").manual_seed(args.seed),  # on the CPU: the same noise for every device
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
    )


def _count_or_share(text: str) -> int | float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a count of steps nor a share of them") from None
