"""Table A1 of the FISEdit paper (Yu et al. 2023, appendix B.2), counted and timed anew.

    python benchmarks/table_a1.py --arch sd2 --size 768 --device cuda --json table_a1.json

Every method really runs, with random weights of the true shapes: what a method costs depends on its shapes alone.
``--device meta`` runs none of them and only counts.
"""

from __future__ import annotations

import argparse
import json
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
from baselines.measure import COUNTED, FAILED, OK, Factory, Row, measure
from baselines.models import GUIDANCE, Kit
from baselines.paper import PAPER, PaperFigures
from baselines.pix2pix_zero import Pix2PixZero
from baselines.plug_and_play import PlugAndPlay
from baselines.prompt_to_prompt import PromptToPrompt
from baselines.sdedit import SDEdit
from baselines.text_to_image import CompiledTextToImage, TextToImage
from baselines.tome import TokenMerging

from fisedit_compile import FiseditError, SparsityConfig
from fisedit_compile.architectures import latent_size
from fisedit_compile.cli.bench_masks import MaskSet
from fisedit_compile.cli.runtime import DTYPES, describe, start, whole_number

#: Of the masks of a file that many are edited with: enough for a mean, few enough for a coffee.
MOST_MASKS = 5

_WHOLE_PICTURE: dict[str, Factory] = {
    "sdtp": TextToImage,
    "sdip": Inpainting,
    "prompt-to-prompt": PromptToPrompt,
    "pix2pix-zero": Pix2PixZero,
    "ppap": PlugAndPlay,
    "instruct-pix2pix": InstructPix2Pix,
    "sdedit": SDEdit,
    "diffedit": DiffEdit,
}
_INSTEAD: dict[str, Factory] = {"compiled": CompiledTextToImage, "deepcache": DeepCache, "tome": TokenMerging}
_EDIT_SIZES = {"fisedit-5": 0.05, "fisedit-15": 0.15, "fisedit-30": 0.30}
_REAL = "fisedit-real"

_METHOD_HEADS = ["method", "needs training", "edits a part", "U-Net calls", "TMACs an image", "GMACs a step"]
_METHOD_HEADS += ["paper's GMACs", "s an image", "calls/s", "paper's calls/s (A100)", "peak GiB"]
_CALL_HEADS = ["method", "call", "calls an image", "GMACs each", "ms each"]

#: In the order of the table: the paper's methods, ours, and what a user may take instead.
NAMES = (*_WHOLE_PICTURE, *_EDIT_SIZES, _REAL, *_INSTEAD)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Table A1 of the FISEdit paper, counted and timed anew.")
    parser.add_argument("--arch", default="sd2", metavar="tiny|tiny-sd15|sd15|sd2", help="shapes (default: sd2)")
    parser.add_argument("--size", type=whole_number(8), default=768, metavar="PX", help="of the image (default: 768)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        metavar="cuda|cpu|meta",
        help="meta counts and runs nothing (default: cuda where there is one)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="(default: bf16 on CUDA, else fp32)")
    parser.add_argument("--steps", type=whole_number(2), default=50, metavar="N", help="denoising steps (default: 50)")
    parser.add_argument(
        "--methods", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=f"of {', '.join(NAMES)}"
    )
    parser.add_argument("--masks", type=Path, metavar="FILE.npz", help="real masks, for a FISEdit row of their own")
    parser.add_argument(
        "--attention", choices=("full", "masked"), default="full", help="of FISEdit, see SparsityConfig (default: full)"
    )
    parser.add_argument("--compile", action="store_true", help="lower FISEdit's graphs through torch.compile, too")
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="threads of torch on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and conditions to FILE")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 if a method failed, 2 for arguments that cannot be used."""
    given = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(given)
    try:
        if args.json and not args.json.resolve().parent.is_dir():
            raise ValueError(f"--json {args.json}: there is no folder {args.json.resolve().parent}")
        conditions, rows = run(args)
    except (FiseditError, ValueError, OSError) as error:
        print(f"table_a1: error: {error}", file=sys.stderr)
        return 2
    conditions["command"] = shlex.join(["python", "benchmarks/table_a1.py", *given])
    print(f"{describe_conditions(conditions)}\n\n{markdown(rows, conditions)}")
    if args.json:
        results = [{**row.to_dict(), "paper": _paper(row, conditions)._asdict()} for row in rows]
        args.json.write_text(json.dumps({**conditions, "rows": results}, indent=2) + "\n")
    return int(any(row.status.startswith(FAILED) for row in rows))


def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Measure all methods asked for; the conditions, and the rows in the order of the table."""
    diffusers.logging.set_verbosity_error()  # some pipelines warn that they will get no new features
    only_count = args.device == "meta"
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    device, dtype = start(argparse.Namespace(**{**vars(args), "device": "cpu" if only_count else args.device}))
    config = SparsityConfig(attention=args.attention, compile=args.compile)
    kit = None if only_count else Kit(args.arch, args.size, device, dtype)
    # Nothing that is counted depends on the dtype, and the CPU is slow in the short ones.
    counting_kit = Kit(args.arch, args.size, torch.device("cpu"), torch.float32, counting=True)
    rows = {}
    for name, factory in _factories(args, config).items():
        print(f"{name} ...", file=sys.stderr)
        rows[name] = measure(name, factory, kit, counting_kit, args.steps)
        if rows[name].status not in (OK, COUNTED):
            print(f"{name}: {rows[name].status}", file=sys.stderr)
    conditions = {key: getattr(args, key) for key in ("arch", "size", "steps", "attention", "compile")}
    conditions.update({"guidance_scale": GUIDANCE, "dense_steps": config.count_dense_steps(args.steps)})
    conditions.update(describe(device, dtype) | ({"device": "meta"} if only_count else {}))
    conditions["versions"].update({name: version for name in ("DeepCache", "tomesd") if (version := _version(name))})
    return conditions, [rows[name] for name in NAMES if name in rows]


def _factories(args: argparse.Namespace, config: SparsityConfig) -> dict[str, Factory]:
    """The methods to measure, in the order in which they run: FISEdit last, since its base stays in memory."""
    latents = latent_size(args.size, args.size)
    factories = {**_WHOLE_PICTURE, **_INSTEAD}
    for name, share in _EDIT_SIZES.items():
        factories[name] = partial(FISEdit, masks=MaskSet.square(share, latents), config=config)
    if args.masks:
        factories[_REAL] = partial(FISEdit, masks=MaskSet.of_file(args.masks, latents, MOST_MASKS), config=config)
    elif args.methods == [_REAL]:
        raise ValueError(f"{_REAL} needs the masks: give --masks FILE.npz")
    return {name: factory for name, factory in factories.items() if name in args.methods}


def describe_conditions(conditions: dict[str, Any]) -> str:
    """Everything that the figures depend on, as text."""
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    if conditions["device"] == "meta":
        where = "counted on the meta device, nothing ran"
    else:
        where = f"{conditions['device_name']}, {conditions['dtype']}, {conditions['threads']} CPU thread(s)"
    compiled = "compiled" if conditions["compile"] else "not compiled"
    return (
        f"{conditions['arch']} at {conditions['size']}x{conditions['size']}, {conditions['steps']} DDIM steps, "
        f"guidance {conditions['guidance_scale']}, one picture at a time, random weights; {where}.\n"
        f"FISEdit: {conditions['attention']} attention, {conditions['dense_steps']} dense steps before the sparse "
        f"ones, masks given, {compiled}; its base was generated before. Other methods are eager unless they say so.\n"
        "MACs are those of the U-Net: convolutions, linear layers and attention's products, gradients included; a step "
        "is one of the steps asked for. Seconds are from words to pixels, calls/s of the denoising loops alone.\n"
        f"{versions}.\n`{conditions['command']}`"
    )


def markdown(rows: list[Row], conditions: dict[str, Any]) -> str:
    """The table, and below it the calls of each method by kind."""
    methods: list[list[str]] = []
    calls: list[list[str]] = []
    for row in rows:
        paper = _paper(row, conditions)
        ran = row.status in (OK, COUNTED)
        methods.append([row.title, *("yes" if each else "no" for each in (row.needs_training, row.edits_part))])
        methods[-1] += [_number(row.calls), _number(row.macs, 1e12), _number(row.macs_a_step, 1e9)]
        methods[-1] += [_number(paper.gmacs), _number(row.seconds) if ran else row.status]
        methods[-1] += [_number(row.calls_per_second), _number(paper.calls_per_second), _number(row.peak_gib)]
        for kind in row.kinds:
            number = _number(kind.calls / row.images)
            macs = kind.macs / (kind.calls or row.images)
            calls.append([row.title, kind.kind, number, _number(macs, 1e9), _number(kind.milliseconds)])
    return _table(_METHOD_HEADS, methods) + "\n\n" + _table(_CALL_HEADS, calls)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _paper(row: Row, conditions: dict[str, Any]) -> PaperFigures:
    """What the paper prints, where it was measured as the row was."""
    same = (conditions["arch"], conditions["size"], conditions["steps"]) == ("sd2", 768, 50)
    return PAPER.get(row.name, PaperFigures()) if same else PaperFigures()


def _number(value: float | None, unit: float = 1.0) -> str:
    """Three digits, or all of those before the point."""
    if value is None:
        return "n/a"
    value /= unit
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
