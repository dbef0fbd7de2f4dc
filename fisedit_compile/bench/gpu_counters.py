"""Counts what a call does beside taking time: kernels launched, memory taken, graphs compiled."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

MIB = 2**20

_KERNEL = 0  # CU_GRAPH_NODE_TYPE_KERNEL


def count_kernels(run: Callable[[], object], device: torch.device) -> int | None:
    """How many kernels a call launches, without copies by the driver; None on the CPU.

    The call is captured as a CUDA graph, whose nodes are counted. It must have run once before, and must neither wait
    for the device nor launch a CUDA graph itself: an aborted capture leaves torch's random generator unusable.
    """
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.device(device), torch.cuda.graph(graph):
        run()
    return _kernel_nodes(ctypes.c_void_p(graph.raw_cuda_graph()))


def _kernel_nodes(graph: ctypes.c_void_p) -> int:
    driver, count, kind = ctypes.CDLL("libcuda.so.1"), ctypes.c_size_t(), ctypes.c_int()

    def call(name: str, *args: Any) -> None:
        if status := getattr(driver, name)(*args):
            raise RuntimeError(f"{name} failed with CUDA error {status}")

    call("cuGraphGetNodes", graph, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    call("cuGraphGetNodes", graph, nodes, ctypes.byref(count))
    kernels = 0
    for node in nodes:
        call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        kernels += kind.value == _KERNEL
    return kernels


def peak_mb(run: Callable[[], object], device: torch.device) -> float | None:
    """The most MiB that tensors held during a call, beyond what they held before it; None on the CPU.

    The memory of a CUDA graph (:func:`graph_pool_mb`) is included only in the call that captures the graph.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def allocated_mb(device: torch.device) -> float | None:
    """MiB that tensors hold now; None on the CPU."""
    return torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else None


def graph_pool_mb(device: torch.device) -> float:
    """MiB that the allocator reserves for CUDA graphs, in all of their private pools; 0 on the CPU."""
    if device.type != "cuda":
        return 0.0
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = torch.cuda.memory_snapshot()
    private = (s for s in segments if s["device"] == index and tuple(s.get("segment_pool_id", (0, 0))) != (0, 0))
    return sum(segment["total_size"] for segment in private) / MIB


def dynamo_graphs() -> int:
    """How many graphs Dynamo has compiled so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
