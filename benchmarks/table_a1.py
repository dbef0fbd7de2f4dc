"""Counts and times the methods of Table A1 of the FISEdit paper (Yu et al. 2023, appendix B.2) anew.

    python benchmarks/table_a1.py --arch sd2 --size 768 --device cuda --json table_a1.json

Every method really runs, with random weights of the true shapes: what a method costs depends on its shapes alone.
``--device meta`` runs none of them and only counts.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import diffusers
import torch
from baselines.deepcache import DeepCache
from baselines.diffedit import DiffEdit
from baselines.fisedit import FISEdit
from baselines.inpainting import Inpainting
from baselines.instruct_pix2pix import InstructPix2Pix
from baselines.measure import FAILED, Factory, measure
from baselines.models import GUIDANCE, Kit
from baselines.pix2pix_zero import Pix2PixZero
from baselines.plug_and_play import PlugAndPlay
from baselines.prompt_to_prompt import PromptToPrompt
from baselines.results import Results
from baselines.sdedit import SDEdit
from baselines.text import describe_conditions, markdown
from baselines.text_to_image import CompiledTextToImage, TextToImage
from baselines.tome import TokenMerging

from fisedit_compile import FiseditError, SparsityConfig
from fisedit_compile.architectures import latent_size
from fisedit_compile.bench.masks import MaskSet
from fisedit_compile.bench.progress import say
from fisedit_compile.cli.runtime import DTYPES, describe, start, whole_number

#: At most this many masks of a file are edited with: enough for a mean, and an edit with each takes only seconds.
MOST_MASKS = 5

_PAPER_METHODS: dict[str, Factory] = {
    "sdtp": TextToImage,
    "sdip": Inpainting,
    "prompt-to-prompt": PromptToPrompt,
    "pix2pix-zero": Pix2PixZero,
    "ppap": PlugAndPlay,
    "instruct-pix2pix": InstructPix2Pix,
    "sdedit": SDEdit,
    "diffedit": DiffEdit,
}
_ALTERNATIVES: dict[str, Factory] = {"compiled": CompiledTextToImage, "deepcache": DeepCache, "tome": TokenMerging}
_FISEDIT_SIZES = {"fisedit-5": 0.05, "fisedit-15": 0.15, "fisedit-30": 0.30}
_FISEDIT_REAL = "fisedit-real"

#: The methods in the order of the table: the paper's others, this project, and what a user may take instead of editing.
GROUPS = {
    "paper": (*_PAPER_METHODS,),
    "fisedit": (*_FISEDIT_SIZES, _FISEDIT_REAL),
    "instead": (*_ALTERNATIVES,),
}
NAMES = sum(GROUPS.values(), ())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Table A1 of the FISEdit paper, counted and timed anew.")
    parser.add_argument("--arch", default="sd2", metavar="tiny|tiny-sd15|sd15|sd2", help="model (default: sd2)")
    parser.add_argument(
        "--size", type=whole_number(8), default=768, metavar="PX", help="side of the image (default: 768)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        metavar="cuda|cpu|meta",
        help="meta counts and runs nothing (default: cuda where there is one)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="(default: bf16 on CUDA, else fp32)")
    parser.add_argument("--steps", type=whole_number(2), default=50, metavar="N", help="denoising steps (default: 50)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=(*GROUPS, *NAMES),
        default=list(GROUPS),
        metavar="NAME",
        help=f"methods among {', '.join(NAMES)}, or groups of them: {', '.join(GROUPS)} (default: all)",
    )
    parser.add_argument("--masks", type=Path, metavar="FILE.npz", help="real masks, for a FISEdit row of their own")
    parser.add_argument(
        "--attention", choices=("full", "masked"), default="full", help="FISEdit's self-attention (default: full)"
    )
    parser.add_argument("--compile", action="store_true", help="lower FISEdit's graphs through torch.compile, too")
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="threads of torch on the CPU")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write all figures and conditions to FILE, method by method; one of an earlier run is extended",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 if a method failed, 2 for arguments that cannot be used."""
    given = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(given)
    try:
        results, failed = run(args, shlex.join(["python", "benchmarks/table_a1.py", *given]))
    except (FiseditError, ValueError, OSError) as error:
        print(f"table_a1: error: {error}", file=sys.stderr)
        return 2
    print(f"{describe_conditions(results.conditions)}\n\n{markdown(results.rows, results.conditions)}")
    return int(failed)


def run(args: argparse.Namespace, command: str) -> tuple[Results, bool]:
    """Measure the methods that are asked for.

    Returns:
        All results, those of an earlier run included, and whether a method failed.
    """
    diffusers.logging.set_verbosity_error()  # some pipelines warn that they will get no new features
    only_count = args.device == "meta"
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    device, dtype = start(argparse.Namespace(**{**vars(args), "device": "cpu" if only_count else args.device}))
    if device.index is not None:
        torch.cuda.set_device(device)
    config = SparsityConfig(attention=args.attention, compile=args.compile, stride=1)  # every step, as the paper
    kit = None if only_count else Kit(args.arch, args.size, device, dtype)
    # Counts do not depend on the dtype, and the CPU is slow in half precision.
    counting_kit = Kit(args.arch, args.size, torch.device("cpu"), torch.float32, counting=True)
    factories = factories_of(args, config)
    where = {**describe(device, dtype), **({"device": "meta"} if only_count else {})}
    results = Results(args.json, conditions_of(args, config, where, command), NAMES)

    failed = False
    for name, factory in factories.items():
        row = measure(name, factory, kit, counting_kit, args.steps, say)
        failed |= row.status.startswith(FAILED)
        results.add(row)
    return results, failed


def conditions_of(
    args: argparse.Namespace, config: SparsityConfig, where: dict[str, Any], command: str
) -> dict[str, Any]:
    """Everything that the figures depend on; ``where`` is what ``describe`` returns."""
    conditions = {key: getattr(args, key) for key in ("arch", "size", "steps", "attention", "compile")}
    conditions.update({"guidance_scale": GUIDANCE, **where})
    installed = {name: version for name in ("DeepCache", "tomesd") if (version := _version(name))}
    conditions["versions"] = {**where["versions"], **installed}
    return {**conditions, "masks": args.masks and args.masks.name, "commands": [command]}


def factories_of(args: argparse.Namespace, config: SparsityConfig) -> dict[str, Factory]:
    """The methods to measure, in the order in which they run: FISEdit is last, because its base stays in memory."""
    latents = latent_size(args.size, args.size)
    factories = {**_PAPER_METHODS, **_ALTERNATIVES}
    for name, share in _FISEDIT_SIZES.items():
        factories[name] = partial(FISEdit, masks=MaskSet.square(share, latents), config=config)
    if args.masks:
        factories[_FISEDIT_REAL] = partial(
            FISEdit, masks=MaskSet.of_file(args.masks, latents, MOST_MASKS), config=config
        )
    elif _FISEDIT_REAL in args.methods:
        raise ValueError(f"{_FISEDIT_REAL} edits with real masks: give --masks FILE.npz")
    names = {name for given in args.methods for name in GROUPS.get(given, (given,))}
    return {name: factory for name, factory in factories.items() if name in names}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
