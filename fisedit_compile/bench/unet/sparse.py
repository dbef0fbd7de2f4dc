"""Sparse steps of many masks in one attention mode, timed in turns with the dense calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, median
from typing import Any

import torch

from fisedit_compile.bench.gpu_counters import (
    allocated_mb,
    count_kernels,
    dynamo_graphs,
    graph_pool_mb,
    peak_mb,
)
from fisedit_compile.bench.masks import MaskSet, scattered_squares
from fisedit_compile.bench.progress import say
from fisedit_compile.bench.timing import Spread, Times, interleaved
from fisedit_compile.bench.unet.batched import measure_batched
from fisedit_compile.bench.unet.dense import DenseRuns
from fisedit_compile.bench.unet.preparation import measure_prep
from fisedit_compile.bench.unet.settings import Settings
from fisedit_compile.config import SparsityConfig
from fisedit_compile.macs.counter import MacCounter
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.sparse_unet import sparsify

#: With how many edits the preparation of each row is measured.
_PREPARED_EDITS = 5

#: Identifies a mask: the position of its set, and its position in that set.
MaskKey = tuple[int, int]


@dataclass
class SparseRuns:
    """Sparse steps in one attention mode, prepared for timing.

    Args:
        attention: the mode, ``"full"`` or ``"masked"``.
        unet: the dense U-Net.
        inputs: positional and keyword arguments of a call of it.
        settings: what is measured and how.
        mask_sets: each makes one row.
        device: the device of the U-Net.
    """

    attention: Any
    unet: torch.nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    settings: Settings
    mask_sets: Sequence[MaskSet]
    device: torch.device
    prepared: dict[MaskKey, Prepared] = field(default_factory=dict)
    runs: dict[MaskKey, Callable[[], object]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = SparsityConfig(attention=self.attention, compile=self.settings.compile_sparse, dense_above=1.0)
        self.sparse = sparsify(self.unet, config)
        self.call = self.sparse.call(*self.inputs[0], **self.inputs[1])
        self._plan_ms: dict[MaskKey, float] = {}
        self._first_step_mb: dict[str | None, float | None] = {}

    def start(self) -> dict[str, float | None]:
        """Export the U-Net, record a base, plan all masks and take a first step with each.

        Returns:
            ``capture_seconds``, how long exporting and rewriting took; ``first_steps_seconds``; ``captures`` and
            ``compiles``, how many CUDA graphs were captured and how many graphs torch.compile compiled in those steps;
            and ``first_edit_mb``, how many MiB the first edit left allocated.
        """
        say(f"{self.attention} attention: exporting the U-Net ...")
        self.program = self.sparse.program(self.call)
        self._pool_mb = graph_pool_mb(self.device)  # the recording's graph shares its memory with those of sparse steps
        _, self.cache = self.sparse.record(self.call)
        compiles, begin = dynamo_graphs(), time.perf_counter()
        keys = [(i, j) for i, mask_set in enumerate(self.mask_sets) for j in range(len(mask_set.masks))]
        say(f"{self.attention} attention: first steps of {len(keys)} mask(s) ...")
        before, kept = allocated_mb(self.device), None
        for key in keys:
            mask = self.mask_sets[key[0]].masks[key[1]]
            self.prepared[key] = self.sparse.prepare(self.call, mask)
            start = time.perf_counter()
            self.program.plan(mask)
            self._plan_ms[key] = (time.perf_counter() - start) * 1e3
            self.runs[key] = partial(self.sparse.step, self.call, self.cache, self.prepared[key])
            peak = peak_mb(self.runs[key], self.device)
            self._first_step_mb.setdefault(_bucket(self.prepared[key]), peak)
            if kept is None and before is not None:
                kept = (allocated_mb(self.device) or 0.0) - before
        return {
            "capture_seconds": self.sparse.build_seconds,
            "first_steps_seconds": time.perf_counter() - begin,
            "captures": self.program.captures,
            "compiles": dynamo_graphs() - compiles,
            "first_edit_mb": kept,
        }

    def measure(self, dense: DenseRuns) -> list[dict[str, Any]]:
        """Time all masks and the dense calls, and return the rows; :meth:`count_launches` completes them.

        Call :meth:`start` first.
        """
        say(f"{self.attention} attention: timing ...")
        settings, counter = self.settings, MacCounter(self.program.lowered, check=False)
        repeats: dict[Any, int] = dict.fromkeys(dense.runs, settings.repeats)
        for i, j in self.runs:
            repeats[i, j] = settings.repeats if self._is_square(i) else settings.mask_repeats
        captures, compiles = self.program.captures, dynamo_graphs()
        runs: dict[Any, Callable[[], object]] = {**dense.runs, **self.runs}
        label = f"{self.attention} attention"
        with self.sparse.looked_at():  # as an editor does, once an edit
            times = interleaved(runs, repeats=repeats, warmup=settings.warmup, device=self.device, label=label)
        seen = {"captures": self.program.captures - captures, "recompiles": dynamo_graphs() - compiles}
        if any(seen.values()):
            say(f"warning: {seen} while timing, of which there should be none")
        pool = {**dense.graph_pool_mb, "sparse": graph_pool_mb(self.device) - self._pool_mb}
        for i in range(len(self.mask_sets)):
            row = {**self._row(i, dense, times, counter), "graph_pool_mb": pool, **seen, **self._prep(i)}
            self.rows.append(row)
        squares = [row for i, row in enumerate(self.rows) if self._is_square(i)]
        if settings.edits > 1 and squares:
            sizes = [row["edit_size"] for row in squares]
            batched = measure_batched(self.sparse, self.call, self.cache, sizes, settings, self.device)
            for row in squares:
                row["batched"] = batched[row["edit_size"]]
        return self.rows

    def count_launches(self, dense: dict[str, int | None]) -> None:
        """Add ``launches`` to the rows: how many kernels each dense call and the graph of a sparse step launch."""
        for i, row in enumerate(self.rows):
            step = self.program.static_step(self.prepared[i, 0])
            sparse = count_kernels(step.launch, self.device) if step else None
            row["launches"] = {**dense, "sparse": sparse}

    def _row(self, i: int, dense: DenseRuns, times: dict[Any, Times], counter: MacCounter) -> dict[str, Any]:
        mask_set = self.mask_sets[i]
        keys = [key for key in self.runs if key[0] == i]
        medians = [median(times[key].steady) for key in keys]
        spread = {name: Spread.of(times[name].steady) for name in dense.runs}
        dense_ms = {name: each.median for name, each in spread.items()}
        spread["sparse"] = Spread.of(times[keys[0]].steady if len(keys) == 1 else medians)
        sparse_ms = fmean(medians)
        fastest = min(dense.compiled, key=lambda name: dense_ms[name], default=None)
        sparse_macs = fmean(counter.step(self.prepared[key].plan).total for key in keys)
        macs = {**dict.fromkeys(dense.runs, counter.dense.total), "sparse": sparse_macs}
        ms = {**dense_ms, "sparse": sparse_ms}
        latency = {name: median(times[name].latency) for name in dense.runs}
        host = {name: times[name].host_ms for name in dense.runs}
        hosts = [h for key in keys if (h := times[key].host_ms) is not None]
        return {
            "edit_size": mask_set.edit_size,
            "active": mask_set.active,
            "masks": {"source": mask_set.source, "used": len(keys), "empty": mask_set.empty},
            "attention": self.attention,
            "dense_ms": dense_ms,
            "sparse_ms": sparse_ms,
            "speedup": {name: each / sparse_ms for name, each in dense_ms.items()},
            "fastest_compiled": fastest,
            "speedup_compiled": fastest and dense_ms[fastest] / sparse_ms,
            "macs": {"dense": counter.dense.total, "sparse": sparse_macs, "ratio": counter.dense.total / sparse_macs},
            "p10_ms": {name: each.p10 for name, each in spread.items()},
            "p90_ms": {name: each.p90 for name, each in spread.items()},
            "latency_ms": {**latency, "sparse": fmean(median(times[key].latency) for key in keys)},
            "host_ms": {**host, "sparse": fmean(hosts) if hosts else None},
            "tflops": {name: 2 * macs[name] / each / 1e9 for name, each in ms.items()},
            "bucket": sorted({name for key in keys if (name := _bucket(self.prepared[key]))}),
            "peak_mb": {**dense.peak_mb, "sparse": peak_mb(self.runs[keys[0]], self.device)},
            "recording_peak_mb": self._first_step_mb[_bucket(self.prepared[keys[0]])],
            "base_mb": sum(tensor.nbytes for tensor in self.cache.values()) / 2**20,
        }

    def _prep(self, i: int) -> dict[str, float | None]:
        mask_set = self.mask_sets[i]
        if self.device.type != "cuda":  # on the CPU a step takes far longer than what would be its difference
            plan = median(ms for key, ms in self._plan_ms.items() if key[0] == i)
            return {"prep_ms": None, "plan_ms": plan, "upload_ms": None, "prompt_ms": None}
        masks = mask_set.masks[:: -(-len(mask_set.masks) // _PREPARED_EDITS)]
        if self._is_square(i):
            height, width = self.call.signature.sample_shape[2:]
            masks = scattered_squares(mask_set.edit_size, (height, width), _PREPARED_EDITS)
        return {**measure_prep(self.sparse, self.call, self.cache, masks, self.device)}

    def _is_square(self, i: int) -> bool:
        return self.mask_sets[i].source == "square"


def _bucket(prepared: Prepared) -> str | None:
    return prepared.bucket.name if prepared.bucket else None
