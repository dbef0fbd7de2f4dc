"""The opponents of a sparse step: one dense U-Net call, eager and under torch.compile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fisedit_compile.bench.gpu_counters import graph_pool_mb, peak_mb
from fisedit_compile.bench.progress import say

#: The mode of torch.compile that launches CUDA graphs, whose kernels cannot be counted.
GRAPHS = "reduce-overhead"

#: Calls until a CUDA graph of torch.compile is recorded and replayed: warm-up, recording, replay.
_UNTIL_REPLAY = 3


@dataclass
class DenseRuns:
    """Dense calls that are ready to be timed.

    Attributes:
        runs: by the name of the baseline.
        compile_seconds: of the first call of each compiled one.
        peak_mb: what tensors of a call held at most beyond what was resident; empty on the CPU.
        graph_pool_mb: what CUDA graphs reserved; empty on the CPU.
        failed: baselines that torch.compile could not build, and why.
    """

    runs: dict[str, Callable[[], object]] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float | None] = field(default_factory=dict)
    graph_pool_mb: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def compiled(self) -> list[str]:
        """The names of those under torch.compile."""
        return [name for name in self.runs if name != "eager"]


def dense_runs(
    unet: torch.nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    baselines: Sequence[str],
    device: torch.device,
) -> DenseRuns:
    """Build and warm up the dense calls of the named baselines.

    Each mode is a ``torch.compile`` object of its own; Dynamo keeps the code of each and compiles none twice.

    Raises:
        ValueError: none of the baselines could be built.
    """
    dense = DenseRuns()
    for name in dict.fromkeys(baselines):
        before = graph_pool_mb(device)
        try:
            run = _run(unet, args, kwargs, name)
            seconds = _first_call(run, name, device)
            for _ in range(_UNTIL_REPLAY if name != "eager" and device.type == "cuda" else 0):
                run()
        except Exception as error:  # of Dynamo, Inductor, Triton or the C++ compiler: the other rows still come
            if name == "eager":
                raise
            dense.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"left out: the dense U-Net with {name}, because torch.compile failed: {dense.failed[name]}")
            continue
        dense.runs[name] = run
        if name != "eager":
            dense.compile_seconds[name] = seconds
        if device.type == "cuda":
            dense.peak_mb[name] = peak_mb(run, device)
            dense.graph_pool_mb[name] = graph_pool_mb(device) - before
    if not dense.runs:
        raise ValueError(f"--baseline {' '.join(baselines)}: torch.compile built none of them; add eager")
    return dense


def _run(unet: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Callable[[], object]:
    if name == "eager":
        return lambda: unet(*args, **kwargs, return_dict=False)
    compiled = torch.compile(unet, mode=None if name == "compile" else name)
    if name != GRAPHS:
        return lambda: compiled(*args, **kwargs, return_dict=False)

    def run() -> object:
        torch.compiler.cudagraph_mark_step_begin()  # the output of the call before may be written over
        return compiled(*args, **kwargs, return_dict=False)

    return run


def _first_call(run: Callable[[], object], name: str, device: torch.device) -> float:
    """Seconds of the first call, which compiles."""
    say(f"the dense U-Net, {name} ..." if name == "eager" else f"compiling the dense U-Net, {name} ...")
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
