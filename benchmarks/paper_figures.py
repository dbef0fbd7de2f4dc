"""The FISEdit paper's figures A2 and A3 on the demo world: every method edits the same pictures.

    python benchmarks/paper_figures.py --clip DIR --cases 32 --device cuda --workers 8 --json FILE --html DIR
    python benchmarks/paper_figures.py --clip DIR --cases 2 --steps 6      # a look, on any CPU
    python benchmarks/paper_figures.py --table FILE [--html DIR]           # of a JSON that is there

Each case is a picture that the model draws and new words of it. A2 is the trade-off between what stays of the picture
and what follows the words, one curve a method, by the paper's parameters; A3 a grid, a row a case, a column a method.
Methods that edit a given picture get this one, and invert it if they do so; those that draw it again get its noise.
Prompt-to-Prompt, pix2pix-zero and Plug-and-Play take as many steps to invert as to denoise. InstructPix2Pix needs a
model that was trained for it (--instruct DIR), which reads the new words as its instruction. FID is over CLIP features,
against dense edits and against rendered pictures of the new words. Seconds are medians of edits made by one process
alone: of the first --timed cases, which are edited again behind the others where there are several workers.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # for the renderer

from tradeoffs.curves import CURVES, INSTRUCT, Setting, settings_of  # noqa: E402
from tradeoffs.page import GRID, PLOT, draw_grid, write_page  # noqa: E402
from tradeoffs.plot import draw  # noqa: E402
from tradeoffs.summary import summarise, table  # noqa: E402
from tradeoffs.workers import BASE, CaseResult, Conditions, picture_file, run_cases  # noqa: E402

from fisedit_compile.cli.runtime import add_runtime_options, describe, finite, start, whole_number  # noqa: E402
from fisedit_compile.quality.cases import Case, load_cases  # noqa: E402
from fisedit_compile.quality.clip_scores import Clip  # noqa: E402
from fisedit_compile.quality.judge import Judge  # noqa: E402

#: Rows of figure A3.
_ROWS = 8


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "demo_model", metavar="DIR")
    parser.add_argument("--judge", type=Path, metavar="DIR", help="folder of the judge (default: the model's)")
    parser.add_argument("--clip", type=Path, metavar="DIR", help="folder of a CLIP model (default: the model's)")
    parser.add_argument("--instruct", type=Path, metavar="DIR", help="a pipeline trained for InstructPix2Pix")
    parser.add_argument("--methods", nargs="+", choices=CURVES, metavar="NAME", help=f"of {', '.join(CURVES)}")
    parser.add_argument("--cases", type=whole_number(1), default=32, metavar="N", help="the first N (default: 32)")
    parser.add_argument("--steps", type=whole_number(2), default=50, metavar="N", help="denoising steps (default: 50)")
    parser.add_argument("--guidance", type=finite, default=5.0, metavar="X", help="guidance scale (default: 5)")
    parser.add_argument(
        "--workers",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="processes, which take the CUDA devices in turns (default: 1)",
    )
    parser.add_argument(
        "--timed", type=whole_number(1), default=2, metavar="N", help="cases that are timed alone (default: 2)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, written after each case")
    parser.add_argument("--html", type=Path, metavar="DIR", help="all pictures, both figures and a page")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="no edits: the table of a --json of before, and with the --html of before its figures",
    )
    add_runtime_options(parser, cuda_dtype="fp32")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 if an edit failed, 2 for arguments that cannot be used."""
    given = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(given)
    try:
        if args.table:
            values = _read(args.table)
            print(_text(values))
            if args.html:
                _figures(args.html, values)
            return 0
        return run(args, shlex.join(["python", "benchmarks/paper_figures.py", *given]))
    except (ValueError, OSError) as error:
        print(f"paper_figures: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, command: str) -> int:
    """Edit, measure, print and write; 1 if an edit failed."""
    conditions, cases = _conditions(args), load_cases("all", args.cases)
    settings = settings_of(conditions.methods)
    about = {
        "command": command,
        "cases": len(cases),
        "workers": args.workers,
        "model": str(args.model),
        "clip": str(conditions.clip),
        "steps": args.steps,
        "guidance": args.guidance,
        "left_out": [CURVES[name].title for name in CURVES if name not in conditions.methods],
        **describe(conditions.device, conditions.dtype),
    }
    results: list[CaseResult] = []
    began, broken = time.perf_counter(), None
    try:
        for result in run_cases(conditions, cases, args.workers):
            results.append(result)
            print(
                f"{len(results)} of {len(cases)}: {result.case}, {time.perf_counter() - began:.0f} s", file=sys.stderr
            )
            _write(args.json, _values(about, settings, results, {}))
    except BrokenProcessPool as error:  # what is there is kept
        broken = f"a worker has died: {error}"
    order = [case.id for case in cases]
    results.sort(key=lambda result: order.index(result.case))
    about |= {"seconds": time.perf_counter() - began, "broken": broken}
    values = _values(about, settings, results, _timed(conditions, cases, results, args))
    _write(args.json, values)
    print(_text(values))
    if args.html:
        _figures(args.html, values)
    return int(bool(values["failed"] or broken))


def _conditions(args: argparse.Namespace) -> Conditions:
    if args.instruct is None and INSTRUCT in (args.methods or ()):
        raise ValueError(f"{INSTRUCT} needs a model that was trained for it: give --instruct DIR")
    for package, group, needed in (("torchmetrics", "quality", True), ("matplotlib", "plot", args.html)):
        if needed and find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install '.[{group}]'")
    device, dtype = start(args)
    methods = args.methods or [name for name in CURVES if name != INSTRUCT or args.instruct]
    for path in (args.json, args.html):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.resolve().parent}")
    judge, clip = args.judge or args.model / "judge", args.clip or args.model / "clip"
    Judge.load(judge), Clip.load(clip)  # refused here and not in a worker
    return Conditions(
        model=args.model,
        judge=judge,
        clip=clip,
        instruct=args.instruct,
        methods=methods,
        steps=args.steps,
        guidance=args.guidance,
        device=device,
        dtype=dtype,
        threads=args.threads or max(1, len(os.sched_getaffinity(0)) // args.workers),
        page=args.html,
    )


def _timed(
    conditions: Conditions, cases: Sequence[Case], results: Sequence[CaseResult], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of edits by one process alone, without those of its first case, in which kernels are compiled."""
    alone = results[: args.timed + 1]
    if args.workers > 1:
        alone = list(run_cases(replace(conditions, page=None), cases[: args.timed + 1], 1))
    seconds: dict[str, list[float]] = {}
    for result in alone[1:] or alone:
        for each in result.figures:
            seconds.setdefault(each.setting, []).append(each.seconds)
    return seconds


def _values(
    about: Mapping[str, Any],
    settings: Sequence[Setting],
    results: Sequence[CaseResult],
    timed: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """All that is known, as ``json.dump`` takes it."""
    return {
        **about,
        "summary": summarise(settings, results, timed),
        "failed": {result.case: result.failed for result in results if result.failed},
        "figures": [asdict(each) for result in results for each in result.figures],
    }


def _read(path: Path) -> dict[str, Any]:
    """What :func:`_write` wrote.

    Raises:
        ValueError: another file.
    """
    values = json.loads(path.read_text())
    if not isinstance(values, dict) or not {"summary", "failed", "figures", "left_out"} <= values.keys():
        raise ValueError(f"--table {path}: this is not a --json of this program")
    return values


def _write(path: Path | None, values: Mapping[str, Any]) -> None:
    if path is not None:
        part = path.with_name(f"{path.name}.part")  # a run cut off while it writes keeps the old file
        part.write_text(json.dumps(values, indent=1) + "\n")
        part.replace(path)


def _text(values: Mapping[str, Any]) -> str:
    """The table, and what it lacks."""
    lines = [table(values["summary"])]
    if values["left_out"]:
        lines.append(f"\nleft out: {', '.join(values['left_out'])}")
    lines += [f"{case}: {name}: {why}" for case, failed in values["failed"].items() for name, why in failed.items()]
    return "\n".join([*lines, *([values["broken"]] if values.get("broken") else [])])


def _figures(folder: Path, values: Mapping[str, Any]) -> None:
    """Draw A2, A3 and the page in a folder that has the pictures, from what :func:`_values` made."""
    rows, failed = values["summary"], values["failed"]
    judged = {each["case"] for each in values["figures"] if each["judged"]}
    known = {each["case"] for each in values["figures"]}  # not one that was being drawn when the run was cut off
    cases = [case for case in load_cases("all", values["cases"]) if case.id in known]
    drawn = [case for case in cases if picture_file(folder, case.id, BASE).exists()]
    settings = [Setting(row["method"], row["value"]) for row in rows]
    methods = dict.fromkeys(row["method"] for row in rows)
    title = f"cases: {len(drawn)}, {values['steps']} steps, guidance {values['guidance']:g}"
    draw(rows, folder / PLOT, title=title)
    grid = [case for case in drawn if case.id in judged] or drawn
    if grid:
        draw_grid(folder, grid[:_ROWS], [Setting(name, CURVES[name].shown) for name in methods]).save(folder / GRID)
    print(write_page(folder, drawn, settings, failed, text=f"{_text(values)}\n\n{values['command']}"))


if __name__ == "__main__":
    sys.exit(main())
