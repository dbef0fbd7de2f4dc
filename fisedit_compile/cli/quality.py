"""``fisedit-compile quality``: how good edits are, on cases in which one thing changes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fisedit_compile.cli.json_file import add_json_option, check_json_path, write_json
from fisedit_compile.cli.pipelines import add_scheduler_option
from fisedit_compile.cli.runtime import add_runtime_options, describe, finite, start, whole_number
from fisedit_compile.config import SparsityConfig
from fisedit_compile.errors import FiseditError

logger = logging.getLogger(__name__)

DEFAULT = "defaults"

_EPILOG = """\
Each case is two prompts of the demo world, which differ in one thing, and a seed. References are dense edits at
several lengths of Prompt-to-Prompt control, of which the best for each kind of edit counts: the one that most often
changes the right thing alone, by the judge, and of equal ones that nearest to the base. The judge is a classifier of
rendered pictures (examples/train_judge.py), by default in the folder judge of the model. SSIM and PSNR inside the mask
are against the dense U-Net under the same mask; the true region is what the best dense edit changes."""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "quality",
        help="measure how good edits are",
        description="Edit pictures of the demo world, and hold them to dense edits and to a judge of what they show.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a diffusers pipeline")
    parser.add_argument("--judge", type=Path, metavar="DIR", help="folder of the judge (default: judge in --model)")
    parser.add_argument(
        "--subset", choices=("quick", "all"), default="quick", help="20 cases, or all 200 (default: quick)"
    )
    parser.add_argument("--cases", type=whole_number(1), metavar="N", help="the first N of the subset alone")
    parser.add_argument("--steps", type=whole_number(2), default=50, metavar="N", help="denoising steps (default: 50)")
    parser.add_argument("--guidance", type=finite, default=5.0, metavar="X", help="guidance scale (default: 5)")
    add_scheduler_option(parser)
    parser.add_argument(
        "--variant",
        action="append",
        type=_variant,
        metavar="FIELD=VALUE,...",
        help="config to measure, such as attention=masked,stride=1; give it again to measure several against the same "
        "references (default: one with all defaults)",
    )
    parser.add_argument(
        "--control",
        type=_share,
        nargs="+",
        default=[0.0, 0.2, 0.4, 0.6, 0.8],
        metavar="SHARE",
        help="lengths of control of the dense edits, shares of the steps; 0 is always among them "
        "(default: 0 0.2 0.4 0.6 0.8)",
    )
    parser.add_argument(
        "--reference-stride",
        type=_stride,
        default=1,
        metavar="N|auto",
        help="dense edits visit every N-th step of their base (default: 1, all)",
    )
    parser.add_argument(
        "--clip",
        type=Path,
        metavar="DIR",
        help="folder of a CLIP model, for the paper's figures (default: without them)",
    )
    parser.add_argument(
        "--workers",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="draw in N processes, each with a model of its own; CUDA devices are taken in turns (default: 1)",
    )
    add_runtime_options(parser)
    add_json_option(parser)
    parser.add_argument("--html", type=Path, metavar="DIR", help="write a page of all pictures to DIR/index.html")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure, print tables, and write what was asked for."""
    variants = dict(args.variant or [(DEFAULT, SparsityConfig())])
    _check(args, variants)

    from fisedit_compile.quality.cases import check_words, load_cases
    from fisedit_compile.quality.clip_scores import Clip
    from fisedit_compile.quality.judge import Judge

    cases = load_cases(args.subset, args.cases)
    if not (args.model / "tokenizer").is_dir() and (args.model / "model_index.json").is_file():
        raise ValueError(
            f"--model {args.model}: the folder has no tokenizer, and the cases are words: give one that has"
        )
    device, dtype = start(args)

    from fisedit_compile.quality.page import write_page
    from fisedit_compile.quality.runs import CaseRun, RunSettings
    from fisedit_compile.quality.scores import score_runs
    from fisedit_compile.quality.summary import summarise, tables
    from fisedit_compile.quality.workers import Drawing

    settings = RunSettings(variants, args.control, args.reference_stride, args.steps, args.guidance)
    drawing = Drawing(args.model, device, dtype, settings, args.scheduler)
    pipe = drawing.pipeline()
    check_words(cases, pipe)
    judge = Judge.load(args.judge or args.model / "judge")
    clip = Clip.load(args.clip) if args.clip else None
    for case in cases:
        judge.check(case.before)
        judge.check(case.after)
    began, runs, failed = time.perf_counter(), list[CaseRun](), dict[str, str]()
    for number, (case, drawn) in enumerate(drawing.draw(pipe, cases, args.workers), start=1):
        if isinstance(drawn, FiseditError):
            failed[case.id] = str(drawn)
        else:
            runs.append(drawn)
        logger.info("%d of %d cases (%s): %.0f s", number, len(cases), case.id, time.perf_counter() - began)
    if not runs:
        raise FiseditError("no case could be edited: " + "; ".join(f"{case}: {why}" for case, why in failed.items()))
    logger.info("scoring %d cases ...", len(runs))
    scores = score_runs(runs, judge, clip, threads=args.workers)
    summary = summarise(scores)
    text = "\n\n".join([tables(summary), *(f"left out, {case}: {why}" for case, why in failed.items())])
    print(text)
    write_json(
        args.json,
        {
            "summary": summary,
            "cases": [asdict(each) for each in scores.cases],
            "failed": failed,
            "judge_accuracy": dict(judge.config.accuracy),
            "variants": {name: asdict(config) for name, config in variants.items()},
            "model": str(args.model),
            "clip": str(args.clip) if args.clip else None,
            "steps": args.steps,
            "scheduler": type(pipe.scheduler).__name__,
            "guidance": args.guidance,
            "controls": sorted({0.0, *args.control}),
            "reference_stride": args.reference_stride,
            "seconds": time.perf_counter() - began,
            "command": args.command_line,
            **describe(device, dtype),
        },
    )
    if args.html:
        print(f"\npictures: {write_page(args.html, runs, scores, tables=text, title=args.command_line)}")


def _check(args: argparse.Namespace, variants: dict[str, SparsityConfig]) -> None:
    """What would fail after minutes has to fail before."""
    check_json_path(args.json)
    if args.json and not os.access(args.json if args.json.exists() else args.json.resolve().parent, os.W_OK):
        raise ValueError(f"--json {args.json}: it cannot be written; name a file in a folder that you may write to")
    if args.html:
        try:
            (args.html / "pictures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--html {args.html}: the folder cannot be made ({error.strerror}); name another"
            ) from None
        if not all(os.access(folder, os.W_OK) for folder in (args.html, args.html / "pictures")):
            raise ValueError(f"--html {args.html}: the folder cannot be written to; name another")
    if args.variant and len(variants) < len(args.variant):
        raise ValueError("--variant: the same one is given twice; leave one out")
    from fisedit_compile.editing.stride import choose_stride, visited_steps

    for name, config in variants.items():
        visits = len(visited_steps(args.steps, choose_stride(config.stride, args.steps, "")))
        if not 0 < config.count_dense_steps(visits) < visits:
            raise ValueError(
                f"--variant {name}: {config.count_dense_steps(visits)} of the {visits} steps that an edit makes would "
                "run dense; at least one has to, for a mask to be found, and not all: change dense_steps or --steps"
            )
    if args.reference_stride != "auto" and args.reference_stride >= args.steps:
        raise ValueError(f"--reference-stride {args.reference_stride}: give fewer than the {args.steps} steps, or auto")
    if find_spec("torchmetrics") is None:
        raise ValueError("quality needs torchmetrics: install it, or this package's optional group 'quality'")


def _variant(text: str) -> tuple[str, SparsityConfig]:
    fields = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r} is no field and value, such as attention=masked")
        try:
            fields[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            fields[name.strip()] = value
    try:
        return text, SparsityConfig.of(fields)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _share(text: str) -> float:
    value = finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of the steps in [0, 1]")
    return value


def _stride(text: str) -> int | str:
    return "auto" if text == "auto" else whole_number(1)(text)
