"""Options that say how a base is made, shared by the commands that make one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisedit_compile.cli.config_fields import add_set_option, config_fields
from fisedit_compile.cli.edit_options import add_attention
from fisedit_compile.cli.pipelines import add_scheduler_option
from fisedit_compile.cli.runtime import finite, whole_number
from fisedit_compile.config import SparsityConfig

if TYPE_CHECKING:
    from fisedit_compile.editing.base import Base
    from fisedit_compile.editing.editor import Editor

#: Option -> its value where it is not given. A saved base has its own: it has to be known whether an option was given.
_DEFAULTS: dict[str, Any] = {
    "photo": None,
    "box": None,
    "negative_prompt": None,
    "scheduler": None,
    "steps": 50,
    "dense_steps": SparsityConfig.dense_steps,
    "seed": 0,
    "guidance": 7.5,
    "height": None,
    "width": None,
    "attention": SparsityConfig.attention,
    "set": [],
}

#: What a photo decides.
_OF_NOISE = ("seed", "height", "width")


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Add what a base is made of, but for ``--model`` and ``--prompt``; for :func:`settle_base_options`."""
    parser.add_argument(
        "--photo",
        type=Path,
        metavar="FILE",
        help="picture to edit instead of generating one; --prompt says what it shows",
    )
    parser.add_argument(
        "--box",
        type=whole_number(0),
        nargs=4,
        metavar=("LEFT", "UPPER", "RIGHT", "LOWER"),
        help="part of the photo that may change, in pixels, where the model cannot do with all of it",
    )
    parser.add_argument("--negative-prompt", "--negative", metavar="WORDS", help="of base and edits (default: none)")
    add_scheduler_option(parser)
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
    add_set_option(parser)
    parser.set_defaults(**dict.fromkeys(_DEFAULTS))


def refuse_base_options(args: argparse.Namespace, base: Path) -> None:
    """Hold a command that is given a saved base to that.

    Raises:
        ValueError: an option that the base has settled was given, too.
    """
    if given := _given(args, _DEFAULTS):
        raise ValueError(f"{given}: the base in {base} was generated with its own: leave that out")


def settle_base_options(args: argparse.Namespace) -> SparsityConfig:
    """Give options that were not given their defaults.

    Raises:
        ValueError: an option that a photo decides, or one that is given twice; a value that the config does not take,
            or no step that would run sparse.
    """
    if args.photo is not None:
        if given := _given(args, _OF_NOISE):
            raise ValueError(f"{given}: the photo decides it: leave that out")
        args.prompt = args.prompt or ""
    elif args.box is not None:
        raise ValueError("--box is a part of --photo: give that, too, or leave it out")
    elif args.prompt is None:
        raise ValueError("nothing to edit: give --prompt, --photo or --base")
    fields = config_fields(args.set or [])
    for name in ("attention", "dense_steps"):
        if name in fields and getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} and --set {name}=...: leave one of the two out")
    for name, value in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    config = SparsityConfig.of({"attention": args.attention, "dense_steps": args.dense_steps, **fields})
    if config.count_dense_steps(args.steps) == args.steps > 1:  # an edit of a single step brings its mask
        raise ValueError(f"all {args.steps} steps would run dense: lower --dense-steps or raise --steps")
    return config


def make_base(editor: Editor, args: argparse.Namespace) -> Base:
    """The base of ``--prompt`` or ``--photo`` and the options.

    Raises:
        ValueError: a height or width that the pipeline would round, or a photo that cannot be edited.
        OSError: no photo that can be read.
    """
    import torch

    from fisedit_compile.architectures import latent_size

    shared = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    if args.negative_prompt is not None:
        shared["negative_prompt"] = args.negative_prompt
    if args.photo is not None:
        from fisedit_compile.editing.photo import open_photo

        editor.pipe.set_progress_bar_config(desc="photo")
        return editor.invert(open_photo(args.photo), args.prompt, box=args.box, **shared)
    factor = editor.pipe.vae_scale_factor
    latent_size(args.height or factor, args.width or factor, scale_factor=factor)
    editor.pipe.set_progress_bar_config(desc="base")
    generator = torch.Generator("cpu").manual_seed(args.seed)  # on the CPU: the same noise for every device
    return editor.generate(args.prompt, generator=generator, height=args.height, width=args.width, **shared)


def _given(args: argparse.Namespace, names: Any) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None)


def _count_or_share(text: str) -> int | float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a count of steps nor a share of them") from None
