"""The calls that a sparse step is compared with: one call of the dense U-Net, eager and under torch.compile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fisedit_compile.bench.gpu_counters import graph_pool_mb, peak_mb
from fisedit_compile.bench.progress import say

#: The mode of torch.compile that launches CUDA graphs; the kernels in them cannot be counted.
GRAPHS = "reduce-overhead"

#: torch.compile runs a call once to warm up, once to capture its CUDA graph, and replays that from the third call on.
_CALLS_UNTIL_REPLAY = 3


@dataclass
class DenseRuns:
    """Dense calls that are ready to be timed.

    Attributes:
        runs: the calls, by the name of the baseline, as all of the following.
        compile_seconds: how long the first call of each compiled baseline took.
        peak_mb: the most MiB that tensors held during a call beyond what they held before; empty on the CPU.
        graph_pool_mb: how many MiB its CUDA graphs reserved; empty on the CPU.
        failed: why torch.compile could not build a baseline, for those that it could not.
    """

    runs: dict[str, Callable[[], object]] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float | None] = field(default_factory=dict)
    graph_pool_mb: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def compiled(self) -> list[str]:
        """The names of the baselines that run under torch.compile."""
        return [name for name in self.runs if name != "eager"]


def dense_runs(
    unet: torch.nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    baselines: Sequence[str],
    device: torch.device,
) -> DenseRuns:
    """Build and warm up the dense calls of the named baselines.

    Each mode has its own ``torch.compile`` object; Dynamo keeps the code of all of them and compiles none twice.

    Raises:
        ValueError: none of the baselines could be built.
    """
    dense = DenseRuns()
    for name in dict.fromkeys(baselines):
        before = graph_pool_mb(device)
        try:
            run = _run(unet, args, kwargs, name)
            seconds = _first_call(run, name, device)
            for _ in range(_CALLS_UNTIL_REPLAY if name != "eager" and device.type == "cuda" else 0):
                run()
        except Exception as error:  # Dynamo, Inductor, Triton or a C++ compiler may fail; the other baselines go on
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
        torch.compiler.cudagraph_mark_step_begin()  # allows torch to overwrite the previous output
        return compiled(*args, **kwargs, return_dict=False)

    return run


def _first_call(run: Callable[[], object], name: str, device: torch.device) -> float:
    """The seconds of the first call, which compiles."""
    say(f"the dense U-Net, {name} ..." if name == "eager" else f"compiling the dense U-Net, {name} ...")
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
