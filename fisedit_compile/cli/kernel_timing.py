"""Timing one kernel on the GPU: as a CUDA graph, alone or many times in a row."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
import triton

from fisedit_compile.kernels.semaphores import new_semaphores, use_semaphores


def microseconds(run: Callable[[], object], warmup: int = 10, rep: int = 50) -> float:
    """Median time of a CUDA graph's replay: without the gaps of Python between launches, with a cold L2 cache."""
    run()  # compiles, and lets cuDNN choose
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    semaphores = new_semaphores(torch.device("cuda", torch.cuda.current_device()))
    with use_semaphores(semaphores), torch.cuda.graph(graph):
        run()
    return 1e3 * float(triton.testing.do_bench(graph.replay, warmup=warmup, rep=rep, return_mode="median"))


def replay_microseconds(launch: Callable[[int], object], launches: int, rounds: int = 5) -> float:
    """Microseconds of one of ``launches`` in a row, in a CUDA graph: with the gaps that a recorded step has."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    semaphores = new_semaphores(torch.device("cuda", torch.cuda.current_device()))
    with use_semaphores(semaphores), torch.cuda.graph(graph):
        for i in range(launches):
            launch(i)
    graph.replay()
    times = []
    for _ in range(rounds):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e3 / launches)
    return median(times)
