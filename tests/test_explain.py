"""``explain``: its figures are those of the counts, and what the passes could not take stands out."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from support.unets import UNets

from fisedit_compile.explain import explain
from fisedit_compile.macs.counter import MacCounter
from fisedit_compile.sparse_unet import sparsify


def line(text: str, start: str) -> list[str]:
    """The words of the one line that begins with ``start``."""
    (found,) = [each for each in text.splitlines() if re.match(rf" *{re.escape(start)}(?= )", each)]
    return found.split()


def test_figures_are_those_of_the_counts(unets: UNets) -> None:
    sparse = unets.sparse("tiny-sdxl", attention="masked", dense_below=8)
    args, kwargs = unets.inputs("tiny-sdxl", 2, (16, 24))
    text = sparse.explain(*args, **kwargs)
    lowered = sparse.program(sparse.call(*args, **kwargs)).lowered
    assert text.splitlines()[:2] == [
        "U-Net for latents [2, 4, 16, 24], masked attention, dense_below=8, blocks='pixel'",
        "Every operation is known to the passes.",
    ]
    assert max(map(len, text.splitlines())) <= 120

    report = MacCounter(lowered, check=False).report(edit_size=0.15)
    dense, step = report.dense, report.sparse
    assert step is not None
    assert f"with {report.edit_size:.1%} of the latents edited" in text

    def cells(dense: int, step: int) -> list[str]:
        return [f"{dense / 1e6:,.2f}", f"{step / 1e6:,.2f}", f"{dense / step:.1f}x"]

    assert line(text, "total") == ["total", *cells(dense.total, step.total)]
    for block in ("down_blocks.0", "mid_block", "conv_in"):
        assert line(text, block)[1:4] == cells(dense.of_module(block), step.of_module(block))
    assert line(text, "conv_in")[4:] == ["16x24", "on", "rows:", "1", "conv"]
    assert line(text, "time_embedding")[4:] == ["once", "a", "base"]
    assert line(text, "add_embedding")[4:] == ["once", "an", "edit"]
    (middle,) = re.findall(r"\nmid_block .*\n  resnets.0 (.*\n.*)\n", text)
    assert middle.split()[3:5] == ["4x6", "on"]
    assert middle.splitlines()[1].strip() == "all pixels: 4x6 is below dense_below=8"
    (down,) = re.findall(r"\ndown_blocks.0 .*\n  resnets.0 (.*)\n", text)
    assert down.endswith("16x24  on rows: 2 conv, 2 norm, 4 pointwise")

    side = round((0.15 * 16 * 24) ** 0.5)
    rows = [f"{2 * side * side}", "768", f"{report.edit_size:.1%}"]
    assert line(text, "16x24")[1:7] == [*rows, *cells(dense.by_resolution["16x24"], step.by_resolution["16x24"])]
    of_middle = cells(dense.by_resolution["4x6"], step.by_resolution["4x6"])
    assert line(text, "4x6")[1:] == ["48", "48", "100.0%", *of_middle]  # all pixels are rows, nothing is kept
    kept = Counter(entry.kind for entry in lowered.kept.cache_entries)
    assert kept["scale"] == kept["shift"]
    _, cache = sparse.record(sparse.call(*args, **kwargs))
    megabytes = sum(tensor.nbytes for tensor in cache.values()) / 1e6
    numbers = f"{kept['map']} maps, {kept['scale']} group norms and {kept['value']} values of the timestep a call"
    assert f"The base keeps {numbers}, {megabytes:,.1f} MB." in text
    once = f"{report.prompt.total / 1e6:,.2f} MMACs are for the prompt alone" if report.prompt else ""
    assert once in text
    for each in lowered.reports:
        assert line(text, each.name)[1:3] == [str(each.changed), str(len(each.skipped))]


class Roll(torch.nn.Module):
    """An activation that no pass knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, dims=-1)


def test_what_the_passes_could_not_take_stands_out(unets: UNets) -> None:
    unet = unets.fresh("micro", torch.float32)
    unet.mid_block.resnets[0].nonlinearity = unet.conv_act = Roll()
    args, kwargs = unets.inputs("micro", 2, (16, 16), torch.float32)
    sparse = sparsify(unet, {"dense_below": 4})
    lowered = sparse.program(sparse.call(*args, **kwargs)).lowered
    _, alarm, *others = explain(lowered, edit_size=0.1).splitlines()
    assert alarm == "!! 3 operation(s) cannot run on rows and split the region:"
    reason = "aten.roll.default: no rule for aten.roll.default: its result is computed dense"
    assert others[:2] == [f"!!   mid_block.resnets.0.nonlinearity: {reason} (2 times)", f"!!   conv_act: {reason}"]
    assert line("\n".join(others), "conv_act")[-3:] == ["dense:", "!!", "aten.roll.default"]
    assert line("\n".join(others), "conv_out")[-4:] == ["on", "rows:", "1", "conv"]

    norms = next(report for report in lowered.reports if report.name == "sparsify_norm")
    missed = norms.changes.pop()
    assert f"!!   {missed.module_path}: {missed.op}: no pass has a form of it on rows" in explain(lowered).splitlines()


def test_a_size_outside_the_picture_is_refused(unets: UNets) -> None:
    sparse = unets.sparse("micro")
    with pytest.raises(ValueError, match="edit_size is 0"):
        explain(sparse.program(unets.call(sparse, "micro", 2, (16, 16))).lowered, edit_size=0)
