"""Times one kernel on the GPU as a CUDA graph, alone or many times in a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import triton

from fisedit_compile.kernels.launch.semaphores import new_semaphores, use_semaphores


@dataclass(frozen=True)
class Roof:
    """The most that a device does in a microsecond: bytes read and written, and multiply-accumulates."""

    bytes_per_us: float
    macs_per_us: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Roof:
        """Measured by a copy of 1 GiB and a product of two matrices of 8192 x 8192."""
        source = torch.randint(256, (2**30,), dtype=torch.uint8, device=device)
        target, side = torch.empty_like(source), 8192
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        copy, product = microseconds(lambda: target.copy_(source)), microseconds(lambda: a @ b)
        return cls(2 * source.numel() / copy, side**3 / product)


def microseconds(run: Callable[[], object], warmup: int = 10, rep: int = 50) -> float:
    """The median time of replaying a call as a CUDA graph, so without gaps between launches, with a cold L2 cache."""
    run()  # compiles, and lets cuDNN choose
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    semaphores = new_semaphores(torch.device("cuda", torch.cuda.current_device()))
    with use_semaphores(semaphores), torch.cuda.graph(graph):
        run()
    return 1e3 * float(triton.testing.do_bench(graph.replay, warmup=warmup, rep=rep, return_mode="median"))


def replay_microseconds(launch: Callable[[int], object], launches: int, rounds: int = 5) -> float:
    """The microseconds of each of ``launches`` in a row in one CUDA graph, with the gaps that a captured step has."""
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
