"""The time of one layer of a sparse step at a number of rows, with random values."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

import fisedit_compile.kernels.ops  # noqa: F401  (registers torch.ops.fisedit)
from fisedit_compile.cost_model.row_layers import LayerShape
from fisedit_compile.planning.edit_plan import row_of_pixels

#: Weights of a step do not fit a GPU's L2 cache: a timed run goes through so many bytes of them, in so many calls.
_WEIGHT_BYTES = 100 * 2**20
_CALLS = (4, 48)
_REPEATS = {"cuda": 7, "cpu": 3}

Call = Callable[[], object]


class Timer(Protocol):
    """What measures layers: :class:`LayerTimer`, or in tests a formula."""

    def layer(self, shape: LayerShape, rows: int) -> float:
        """Microseconds of a layer at ``rows`` output rows."""

    def fetch(self, channels: int, rows: int) -> float:
        """Microseconds to gather ``rows`` halo rows of a base's map."""


class LayerTimer:
    """Times layers on a device.

    On CUDA a time is that of one launch among several in a CUDA graph, as in a step; the median of seven replays. Each
    launch has other weights, so that they come from memory, and the same rows, as the layer before leaves them in the
    cache. On the CPU it is the median of three calls.

    Args:
        device: where the layers run.
        dtype: of their values and weights.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._pool = torch.empty(0, device=device, dtype=dtype)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def layer(self, shape: LayerShape, rows: int) -> float:
        """Microseconds of a layer at ``rows`` output rows; 0 for no rows, which a step may skip."""
        if rows == 0:
            return 0.0
        return self._microseconds(self._product(shape, rows) if shape.is_product else self._attention(shape, rows))

    def fetch(self, channels: int, rows: int) -> float:
        """Microseconds to gather ``rows`` halo rows of a base's map."""
        if rows == 0:
            return 0.0
        source = self._values(2 * rows, channels)
        index = torch.arange(0, 2 * rows, 2, device=self.device)
        return self._microseconds([lambda: source.index_select(0, index)] * _CALLS[0])

    def _product(self, shape: LayerShape, rows: int) -> list[Call]:
        size, of_shortcut = shape.depth * shape.filters, shape.shortcut_channels * shape.filters
        stride = -(-size // 64) * 64  # elements; keeps weights aligned
        calls = self._count(stride * self.dtype.itemsize)
        pool = self._values(calls * stride).view(calls, stride)
        weights = [each[: size - of_shortcut].view(shape.filters, -1) for each in pool]
        count = torch.tensor([rows], dtype=torch.int32, device=self.device)
        bias = self._values(shape.filters).clone()
        x = self._values(rows, shape.channels).clone()
        rest = {"count": count, "activation": "geglu" if shape.geglu else "none"}
        if shape.kind == "linear":
            return [partial(torch.ops.fisedit.linear_rows, x, w, bias, **rest) for w in weights]
        table, halo_rows = square_table(rows, shape.taps)
        table, halo = table.to(self.device), self._values(halo_rows, shape.channels).clone()
        convolutions = [partial(torch.ops.fisedit.conv2d_rows, x, halo, w, bias, table, **rest) for w in weights]
        if not of_shortcut:
            return list(convolutions)
        shortcut = self._values(rows, shape.shortcut_channels).clone()
        shortcut_weights = [each[size - of_shortcut : size].view(shape.filters, -1) for each in pool]
        return [
            partial(conv, shortcut=shortcut, shortcut_weight=weight)
            for conv, weight in zip(convolutions, shortcut_weights, strict=True)
        ]

    def _attention(self, shape: LayerShape, rows: int) -> list[Call]:
        samples = min(shape.samples, rows)
        queries = [rows * i // samples for i in range(samples + 1)]
        pixels = samples * shape.keys
        q, k, v = (self._values(rows, shape.channels).view(rows, shape.heads, -1).clone() for _ in range(3))
        offsets, keys = (
            torch.tensor(each, dtype=torch.int32, device=self.device)
            for each in (queries, [shape.keys * i for i in range(samples + 1)])
        )
        if shape.kind == "self_attention":
            call: Call = lambda: torch.ops.fisedit.attention_rows(q, k, v, offsets, offsets, None)  # noqa: E731
            return [call] * _CALLS[0]
        other_k, other_v = (self._values(pixels, shape.channels).view(pixels, shape.heads, -1).clone() for _ in "kv")
        if shape.kind == "text_attention":
            call = lambda: torch.ops.fisedit.attention_rows(q, other_k, other_v, offsets, keys, None)  # noqa: E731
            return [call] * _CALLS[0]
        ids = torch.cat([
            sample * shape.keys + torch.arange(last - first).clamp(max=shape.keys - 1)
            for sample, (first, last) in enumerate(pairwise(queries))
        ]).to(self.device)  # fmt: skip
        row_of = row_of_pixels(ids, pixels)
        call = lambda: torch.ops.fisedit.attention_cached(q, k, v, other_k, other_v, row_of, offsets, None)  # noqa: E731
        return [call] * _CALLS[0]

    def _values(self, *shape: int) -> Tensor:
        """Random values, as zeros would run faster; results share memory."""
        count = math.prod(shape)
        if len(self._pool) < count:
            fewest = _WEIGHT_BYTES // self.dtype.itemsize if self.device.type == "cuda" else 0
            self._pool = torch.randn(max(count, fewest), device=self.device, dtype=self.dtype)
        return self._pool[:count].view(shape)

    def _count(self, weight_bytes: int) -> int:
        if self.device.type != "cuda":
            return 1
        return min(max(-(-_WEIGHT_BYTES // weight_bytes), _CALLS[0]), _CALLS[1])

    def _microseconds(self, calls: list[Call]) -> float:
        repeats = _REPEATS[self.device.type]
        with torch.no_grad():
            if self.device.type == "cuda":
                return self._replays(calls, repeats)
            calls[0]()
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                calls[0]()
                times.append(time.perf_counter() - start)
            return 1e6 * statistics.median(times)

    def _replays(self, calls: list[Call], repeats: int) -> float:
        from fisedit_compile.kernels.launch.semaphores import new_semaphores, use_semaphores

        with torch.cuda.device(self.device), use_semaphores(new_semaphores(self.device)):
            graph = torch.cuda.CUDAGraph()
            # In the memory of the graph before, which lives until this one is recorded: a pool may not fall empty.
            pool = self._graph.pool() if self._graph is not None else torch.cuda.graph_pool_handle()
            torch.cuda.synchronize()
            with torch.cuda.stream(self._stream):
                calls[0]()  # compiles
                torch.cuda.synchronize()
                # Not torch.cuda.graph, which empties the allocator's cache each time: that takes longer than a timing.
                graph.capture_begin(pool=pool)
                try:
                    for call in calls:
                        call()
                finally:
                    graph.capture_end()
                self._graph = graph
                graph.replay()
                events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
                events[0].record()
                for event in events[1:]:  # without waiting in between: a replay is launched while the last one runs
                    graph.replay()
                    event.record()
                torch.cuda.synchronize()
        times = [first.elapsed_time(last) for first, last in pairwise(events)]
        return 1e3 * statistics.median(times) / len(calls)


def square_table(rows: int, taps: int) -> tuple[Tensor, int]:
    """The neighbour table int32 ``[rows, taps]`` of a square of pixels, and how many halo rows it reads.

    What lies above the square is outside the picture; what lies below it is halo.
    """
    side = math.isqrt(taps)
    width = math.isqrt(rows - 1) + 1
    reach = torch.arange(side) - side // 2
    steps = (reach[:, None] * width + reach).flatten()
    if len(steps) < taps:  # of a kernel that is not square
        steps = torch.arange(taps) - taps // 2
    table = torch.arange(rows)[:, None] + steps
    return table.clamp(min=-1).int(), max(int(table.max()) - rows + 1, 1)


def device_name(device: torch.device) -> str:
    """What times depend on: the GPU's name, or the processor's kind and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
