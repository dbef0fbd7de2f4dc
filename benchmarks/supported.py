"""Makes docs/support.md: which pipelines, what is added to them, and which schedulers work, each tried.

    python benchmarks/supported.py

The cells are those of tests/test_support.py, whose models are as small as they can be; it takes some ten minutes of one
core. A cell that neither works nor is refused ends it with an error.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import traceback
import warnings
from collections import defaultdict
from importlib import metadata
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.cells import FEW, Cell, Outcome, cells, tried  # noqa: E402
from support.kinds import KINDS  # noqa: E402

from fisedit_compile.config import SparsityConfig, is_whole  # noqa: E402
from fisedit_compile.macs.counter import count_macs  # noqa: E402

_HEAD = """\
# What is supported

{works} of {all} cells work; the others are refused by a named error. A cell is a pipeline of diffusers with what is
added to it, and a scheduler. `python benchmarks/supported.py` tried each on {date} and made this page; every run of
the tests tries some of them (`tests/test_support.py`; all with `FISEDIT_ALL_CELLS=1`). Versions:
{versions}.

## What a cell is held to

Models are as small as they can be and their weights random; two resolutions, of which the larger is sparse.

1. The recorded picture is the plain pipeline's.
2. An edit of the same words, all of whose steps are sparse, gives the base again, under a mask and within rounding.
3. An edit of other words under a mask leaves the latents outside it as they are, bit for bit, and changes them inside.
4. Inside the mask it is what the plain pipeline draws when each layer reads the base's values outside the mask, and
   group norms the base's statistics (those of the tiles that a large mask covers exchanged): a second implementation,
   by a patch of `torch.nn`'s layers, without any graph and without Prompt-to-Prompt control
   (`tests/support/masked_reference.py`). The largest error of all cells is {error:.1%}
   of what the words change, by {error_of}.
   Rescaled guidance and FreeU take statistics of the whole prediction, where the reference has other values outside
   the mask.
5. An edit of the edit, under what that mask leaves, leaves what was edited first as it is, bit for bit.
6. An edit whose mask is found leaves the background as it is (not of a single step, from which none can be found).
7. What is refused is refused before the U-Net is called.

## Pipelines

"sparse" is the share of the multiply-accumulates at sparse resolutions that a step with an empty mask does not make;
"stayed dense" refers to the operations there that have no form on rows, below the table. ControlNets, adapters and
encoders beside the U-Net run as they do without an editor.
"""


def main() -> None:
    """Try all cells, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORDS", help="cells whose names hold these, without a page")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    outcomes: dict[Cell, Outcome] = {}
    failed, shares = [], {}
    chosen = [cell for cell in cells() if args.only in str(cell)]
    for number, cell in enumerate(chosen, start=1):
        start = time.perf_counter()
        try:
            outcomes[cell] = tried(cell.kind).outcome(cell)
            said = outcomes[cell].refused or f"works, error {outcomes[cell].error:.2%}"
        except Exception as error:
            failed.append(cell)
            said = f"FAILED: {''.join(traceback.format_exception(error))}"
        print(f"{number} of {len(chosen)}, {cell} ({time.perf_counter() - start:.1f} s): {said}", flush=True)
        last = number == len(chosen) or chosen[number].kind != cell.kind
        if last and any(not each.refused for of, each in outcomes.items() if of.kind == cell.kind):
            shares[cell.kind] = (tried(cell.kind).sparse_share(), tried(cell.kind).left_dense())
        if last:
            tried.cache_clear()
    if failed:
        sys.exit(f"{len(failed)} cell(s) failed: {'; '.join(map(str, failed))}")
    if not args.only:
        (ROOT / "docs" / "support.md").write_text(_page(outcomes, shares))


def _page(outcomes: dict[Cell, Outcome], shares: dict[str, tuple[float, list[str]]]) -> str:
    works = {cell: each for cell, each in outcomes.items() if not each.refused}
    worst = max(works, key=lambda cell: works[cell].error)
    packages = ("torch", "diffusers", "transformers", "peft")
    head = _HEAD.format(
        works=len(works),
        all=len(outcomes),
        date=time.strftime("%Y-%m-%d"),
        versions=", ".join([f"Python {platform.python_version()}", *(f"{p} {metadata.version(p)}" for p in packages)]),
        error=works[worst].error,
        error_of=f"{KINDS[worst.kind]}",
    )
    reasons: dict[str, dict[str, None]] = defaultdict(dict)
    for cell, each in outcomes.items():
        if each.refused:
            all_of_it = all(other.refused for of, other in outcomes.items() if of.kind == cell.kind)
            reasons[each.refused][str(KINDS[cell.kind]) if all_of_it else str(cell.title)] = None
    parts = [head + "\n" + _pipelines(outcomes, shares), "## Schedulers", _schedulers(outcomes), "## Refused"]
    parts.append("\n".join(f"- {', '.join(of)}: `{why}`" for why, of in reasons.items()))
    parts += [_OTHERS, "## Models of real sizes", _MODELS, _models(), _VERSIONS]
    return "\n\n".join(parts) + "\n"


def _mark(outcome: Outcome | None) -> str:
    return "" if outcome is None else "refused" if outcome.refused else "yes"


def _pipelines(outcomes: dict[Cell, Outcome], shares: dict[str, tuple[float, list[str]]]) -> str:
    rows, notes = [], dict[str, int]()
    for name, kind in KINDS.items():
        of = {cell.scheduler: each for cell, each in outcomes.items() if cell.kind == name}
        if set(of) == {"LCMScheduler"}:
            marks = ["", "", "", _mark(of["LCMScheduler"])]
        else:
            marks = [*(_mark(of.get(scheduler)) for scheduler in FEW), _mark(of.get("LCMScheduler"))]
        share, dense = shares.get(name, (None, []))
        said = "-" if share is None else f"{share:.1%}"
        numbers = [str(notes.setdefault(each, len(notes) + 1)) for each in dense]
        left = "-" if share is None else ", ".join(numbers) or "nothing"
        rows.append([kind.pipeline, kind.added, *marks, said, left])
    short = [name.removesuffix("Scheduler") for name in FEW]
    heads = ["pipeline", "with", *short, "LCM", "sparse", "stayed dense"]
    listed = "\n".join(f"{number}. {note}" for note, number in notes.items())
    return "\n\n".join([tabulate(rows, heads, tablefmt="github", disable_numparse=True), listed])


def _schedulers(outcomes: dict[Cell, Outcome]) -> str:
    plain = {"SD": "SD StableDiffusionPipeline", "SDXL": "SDXL StableDiffusionXLPipeline"}
    by_title: dict[str, dict[str, Outcome]] = defaultdict(dict)
    for cell, each in outcomes.items():
        for model, kind in plain.items():
            if cell.kind == kind:
                by_title[cell.title][model] = each
    rows = [[title, *(_mark(of.get(model)) for model in plain)] for title, of in by_title.items()]
    return tabulate(rows, ["scheduler", "StableDiffusion", "StableDiffusionXL"], tablefmt="github")


def _models() -> str:
    rows, below = [], SparsityConfig.dense_below
    for arch, size in (("sd15", 512), ("sd2", 768), ("sdxl", 1024)):
        dense = count_macs(arch, height=size, width=size).dense
        step = count_macs(arch, height=size, width=size, edit_size=0.05)
        sparse = [name for name in dense.by_resolution if "x" in name and not is_whole(_size(name), below)]
        there = sum(dense.by_resolution[name] for name in sparse)
        left = sum(step.sparse.by_resolution.get(name, 0) for name in sparse) if step.sparse else 0
        rows.append(
            [
                *(arch, f"{size}x{size}", f"{dense.total / 1e9:,.0f} G", ", ".join(sparse)),
                *(f"{there / dense.total:.1%}", f"{left / there:.1%}"),
            ]
        )
    heads = ["U-Net", "picture", "MACs of a call", "sparse resolutions", "their share", "of it made at 5 % edited"]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def _size(name: str) -> tuple[int, int]:
    height, width = name.split("x")
    return int(height), int(width)


_OTHERS = """\
Pipelines whose call takes no `callback_on_step_end`, other than the three above that have none and are known
(T2I-Adapter of both models, SDXL's InstructPix2Pix), are refused when the editor is made: Upscale, LatentUpscale,
ImageVariation and the deprecated ones (GLIGEN, SAG, DiffEdit, Attend-and-Excite and others). So are pipelines without
a U-Net (SD3, Flux)."""

_MODELS = """\
Resolutions whose smaller side is below `dense_below` (16 cells) are computed whole; they, the time embedding and the
text are what is dense by design. Batch 2, full attention."""

_VERSIONS = """\
## Versions

`make test-oldest` runs the tests of the editor, the command line and these cells with the oldest torch, diffusers and
transformers of `pyproject.toml`, and `make test-newest` with the newest that pip finds; each in an environment of its
own."""


if __name__ == "__main__":
    main()
