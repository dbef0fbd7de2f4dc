"""The table as text: the conditions, the methods, and the calls of each method by kind."""

from __future__ import annotations

from typing import Any

from baselines.measure import COUNTED, OK, Row
from baselines.results import paper_of

_METHOD_HEADS = ["method", "needs training", "edits a part", "U-Net calls", "TMACs an image", "GMACs a step"]
_METHOD_HEADS += ["paper's GMACs", "s an image", "calls/s", "paper's calls/s (A100)", "GiB before", "peak GiB"]
_CALL_HEADS = ["method", "call", "calls an image", "GMACs each", "ms each"]


def describe_conditions(conditions: dict[str, Any]) -> str:
    """A text that names everything the figures depend on."""
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    if conditions["device"] == "meta":
        where = "counted on the meta device, nothing ran"
    else:
        where = f"{conditions['device_name']}, {conditions['dtype']}, {conditions['threads']} CPU thread(s)"
    compiled = "compiled" if conditions["compile"] else "not compiled"
    commands = "\n".join(f"`{command}`" for command in conditions["commands"])
    return (
        f"{conditions['arch']} at {conditions['size']}x{conditions['size']}, {conditions['steps']} DDIM steps, "
        f"guidance {conditions['guidance_scale']}, one picture at a time, random weights; {where}.\n"
        f"FISEdit: {conditions['attention']} attention, masks given, {compiled}; its base was generated, and edited "
        "once, on CUDA with each mask, before. "
        "Other methods are eager unless they say so.\n"
        "MACs are those of the U-Net: convolutions, linear layers and attention's products, gradients included; a step "
        "is one of the steps asked for. Seconds are from words to pixels, calls/s of the denoising loops alone. Memory "
        "is what tensors held, before the timed run and at most in it; FISEdit's has the base in it.\n"
        f"{versions}.\n{commands}"
    )


def markdown(rows: list[Row], conditions: dict[str, Any]) -> str:
    """The table of methods in markdown, and below it a table of the calls of each method by kind."""
    methods: list[list[str]] = []
    calls: list[list[str]] = []
    for row in rows:
        paper = paper_of(row, conditions)
        seconds = _number(row.seconds) if row.status in (OK, COUNTED) else row.status
        methods.append([row.title, *("yes" if each else "no" for each in (row.needs_training, row.edits_part))])
        methods[-1] += [_number(row.calls), _number(row.macs, 1e12), _number(row.macs_a_step, 1e9)]
        methods[-1] += [_number(paper.gmacs), seconds + (" (not finite)" if row.finite is False else "")]
        methods[-1] += [_number(row.calls_per_second), _number(paper.calls_per_second)]
        methods[-1] += [_number(row.held_gib), _number(row.peak_gib)]
        for kind in row.kinds:
            number = _number(kind.calls / row.images)
            macs = kind.macs / (kind.calls or row.images)
            calls.append([row.title, kind.kind, number, _number(macs, 1e9), _number(kind.milliseconds)])
    return _table(_METHOD_HEADS, methods) + "\n\n" + _table(_CALL_HEADS, calls)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _number(value: float | None, unit: float = 1.0) -> str:
    """``value`` in ``unit`` with three digits, or with all digits before the point; "n/a" for None."""
    if value is None:
        return "n/a"
    value /= unit
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"
