"""The benchmark of one U-Net call: dense, eager and compiled, against a sparse step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import torch

from fisedit_compile.architectures import build_unet, unet_inputs
from fisedit_compile.cli.bench_masks import MaskSet
from fisedit_compile.cli.timing import Spread, interleaved
from fisedit_compile.config import SparsityConfig
from fisedit_compile.macs import MacCounter
from fisedit_compile.sparse_unet import sparsify


@dataclass(frozen=True)
class Settings:
    """What is measured and how; ``size`` in pixels of the image."""

    arch: str
    size: int
    batch: int
    baselines: Sequence[str]
    attentions: Sequence[str]
    compile_sparse: bool
    repeats: int
    warmup: int


@torch.no_grad()
def bench_unet(
    settings: Settings, mask_sets: Sequence[MaskSet], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Time one U-Net call with random weights of the true shapes.

    Dense calls and the sparse steps of all masks take turns in one loop, once for each attention mode. On CUDA the
    dense U-Net runs in ``channels_last``.

    Returns:
        ``compile_seconds`` (None without that baseline) and ``rows``, one an attention mode and set of masks. Times are
        medians in milliseconds; of several masks the mean of each one's median, ``p10_ms`` and ``p90_ms`` of the
        sparse step being those over the masks' medians. ``tflops`` are 2 x MACs by time.
    """
    unet = build_unet(settings.arch, device=device, dtype=dtype)
    if device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    args, kwargs = unet_inputs(unet, batch=settings.batch, height=settings.size, width=settings.size)
    compiled = torch.compile(unet)
    dense: dict[str, Callable[[], object]] = {
        "eager": lambda: unet(*args, **kwargs, return_dict=False),
        "compile": lambda: compiled(*args, **kwargs, return_dict=False),
    }
    dense = {name: dense[name] for name in settings.baselines}
    compile_seconds = None
    if "compile" in dense:
        print("compiling the dense U-Net ...", file=sys.stderr)
        start = time.perf_counter()
        dense["compile"]()
        compile_seconds = time.perf_counter() - start
    rows: list[dict[str, Any]] = []
    for attention in settings.attentions:
        rows += _rows_of(attention, unet, (args, kwargs), dense, settings, mask_sets)
    return {"compile_seconds": compile_seconds, "rows": rows}


def _rows_of(
    attention: Any,
    unet: torch.nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    dense: dict[str, Callable[[], object]],
    settings: Settings,
    mask_sets: Sequence[MaskSet],
) -> list[dict[str, Any]]:
    """The rows of one attention mode."""
    sparse = sparsify(unet, SparsityConfig(attention=attention, compile=settings.compile_sparse))
    call = sparse.call(*inputs[0], **inputs[1])
    device = call.tensors[0].device
    print(f"capturing the U-Net, {attention} attention ...", file=sys.stderr)
    program = sparse.program(call)
    _, cache = sparse.record(call)
    prepared, plan_ms = {}, {}
    for i, mask_set in enumerate(mask_sets):
        for j, mask in enumerate(mask_set.masks):
            start = time.perf_counter()
            prepared[i, j] = sparse.plan(call, mask)
            plan_ms[i, j] = (time.perf_counter() - start) * 1e3
    runs: dict[Any, Callable[[], object]] = {**dense}
    runs.update({key: partial(sparse.step, call, cache, each) for key, each in prepared.items()})
    times = interleaved(
        runs, repeats=settings.repeats, warmup=settings.warmup, device=device, label=f"{attention} attention"
    )
    dense_times = {name: Spread.of(times[name]) for name in dense}
    counter = MacCounter(program, check=False)
    dense_macs = counter.dense.total
    rows = []
    for i, mask_set in enumerate(mask_sets):
        keys = [(i, j) for j in range(len(mask_set.masks))]
        medians = [median(times[key]) for key in keys]
        spread = Spread.of(times[keys[0]] if len(keys) == 1 else medians)
        sparse_ms = fmean(medians)
        sparse_macs = fmean(counter.step(prepared[key].plan).total for key in keys)
        every = {**dense_times, "sparse": spread}
        macs = {**dict.fromkeys(dense, dense_macs), "sparse": sparse_macs}
        milliseconds = {**{name: each.median for name, each in dense_times.items()}, "sparse": sparse_ms}
        rows.append(
            {
                "edit_size": mask_set.edit_size,
                "active": mask_set.active,
                "masks": {"source": mask_set.source, "used": len(keys), "empty": mask_set.empty},
                "attention": attention,
                "dense_ms": {name: each.median for name, each in dense_times.items()},
                "sparse_ms": sparse_ms,
                "speedup": {name: each.median / sparse_ms for name, each in dense_times.items()},
                "macs": {"dense": dense_macs, "sparse": sparse_macs, "ratio": dense_macs / sparse_macs},
                "p10_ms": {name: each.p10 for name, each in every.items()},
                "p90_ms": {name: each.p90 for name, each in every.items()},
                "tflops": {name: 2 * macs[name] / milliseconds[name] / 1e9 for name in every},
                "plan_ms": median(plan_ms[key] for key in keys),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people to read."""
    baselines = list(rows[0]["dense_ms"])
    heads = ["edit size", "attention", *(f"{name} ms" for name in baselines), "sparse ms"]
    heads += [*(f"x {name}" for name in baselines), "dense GMAC", "sparse GMAC", "ratio"]
    lines = [heads]
    for row in rows:
        several = f" (mean of {row['masks']['used']})" if row["masks"]["source"] != "square" else ""
        cells = [f"{row['edit_size']:.1%}{several}", row["attention"]]
        cells += [*(f"{row['dense_ms'][name]:.1f}" for name in baselines), f"{row['sparse_ms']:.1f}"]
        cells += [f"{row['speedup'][name]:.2f}" for name in baselines]
        macs = row["macs"]
        lines.append([*cells, f"{macs['dense'] / 1e9:.1f}", f"{macs['sparse'] / 1e9:.1f}", f"{macs['ratio']:.2f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
