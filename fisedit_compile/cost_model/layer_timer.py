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

#: The weights of a whole step do not fit a GPU's L2 cache, so one timing makes calls with different weights until they
#: amount to this many bytes, within the least and the most number of calls.
_WEIGHT_BYTES_OF_TIMING = 100 * 2**20
_FEWEST_CALLS, _MOST_CALLS = 4, 48

#: How many timings a median is taken of, by the type of the device.
_TIMINGS = {"cuda": 7, "cpu": 3}

Run = Callable[[], object]


class Timer(Protocol):
    """Gives the times of layers: :class:`LayerTimer` by running them, a test's own timer by a formula."""

    def layer(self, shape: LayerShape, rows: int) -> float:
        """Microseconds of a layer at ``rows`` output rows."""

    def fetch(self, channels: int, rows: int) -> float:
        """Microseconds to gather ``rows`` halo rows of a base's map."""


class LayerTimer:
    """Times layers by running them on a device.

    On CUDA a layer is launched several times in one CUDA graph, as a step launches its layers, and its time is the
    median over the graph's replays divided by the number of launches. Each launch has its own weights, which therefore
    come from memory, and all have the same rows, which a step finds in the cache as well. On the CPU the time is the
    median of a few calls.

    Args:
        device: where the layers run.
        dtype: the dtype of their values and weights.
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
        return self._microseconds([lambda: source.index_select(0, index)] * _FEWEST_CALLS)

    def _product(self, shape: LayerShape, rows: int) -> list[Run]:
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

    def _attention(self, shape: LayerShape, rows: int) -> list[Run]:
        samples = min(shape.samples, rows)
        queries = [rows * i // samples for i in range(samples + 1)]
        pixels = samples * shape.keys
        q, k, v = (self._values(rows, shape.channels).view(rows, shape.heads, -1).clone() for _ in range(3))
        offsets, keys = (
            torch.tensor(each, dtype=torch.int32, device=self.device)
            for each in (queries, [shape.keys * i for i in range(samples + 1)])
        )
        if shape.kind == "self_attention":
            call: Run = lambda: torch.ops.fisedit.attention_rows(q, k, v, offsets, offsets, None)  # noqa: E731
            return [call] * _FEWEST_CALLS
        other_k, other_v = (self._values(pixels, shape.channels).view(pixels, shape.heads, -1).clone() for _ in "kv")
        if shape.kind == "text_attention":
            call = lambda: torch.ops.fisedit.attention_rows(q, other_k, other_v, offsets, keys, None)  # noqa: E731
            return [call] * _FEWEST_CALLS
        ids = torch.cat([
            sample * shape.keys + torch.arange(last - first).clamp(max=shape.keys - 1)
            for sample, (first, last) in enumerate(pairwise(queries))
        ]).to(self.device)  # fmt: skip
        row_of = row_of_pixels(ids, pixels)
        call = lambda: torch.ops.fisedit.attention_cached(q, k, v, other_k, other_v, row_of, offsets, None)  # noqa: E731
        return [call] * _FEWEST_CALLS

    def _values(self, *shape: int) -> Tensor:
        """Random values of a shape, because zeros would run faster. All results lie in the same memory."""
        count = math.prod(shape)
        if len(self._pool) < count:
            fewest = _WEIGHT_BYTES_OF_TIMING // self.dtype.itemsize if self.device.type == "cuda" else 0
            self._pool = torch.randn(max(count, fewest), device=self.device, dtype=self.dtype)
        return self._pool[:count].view(shape)

    def _count(self, weight_bytes: int) -> int:
        if self.device.type != "cuda":
            return 1
        return min(max(-(-_WEIGHT_BYTES_OF_TIMING // weight_bytes), _FEWEST_CALLS), _MOST_CALLS)

    def _microseconds(self, calls: list[Run]) -> float:
        repeats = _TIMINGS[self.device.type]
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

    def _replays(self, calls: list[Run], repeats: int) -> float:
        from fisedit_compile.kernels.launch.semaphores import new_semaphores, use_semaphores

        with torch.cuda.device(self.device), use_semaphores(new_semaphores(self.device)):
            graph = torch.cuda.CUDAGraph()
            # Reuse the previous graph's pool, and keep that graph alive until this capture ends: torch frees a pool
            # that no graph uses.
            pool = self._graph.pool() if self._graph is not None else torch.cuda.graph_pool_handle()
            torch.cuda.synchronize()
            with torch.cuda.stream(self._stream):
                calls[0]()  # compiles
                torch.cuda.synchronize()
                # torch.cuda.graph would empty the allocator's cache each time, which takes longer than a timing.
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
                for event in events[1:]:  # nothing waits here: a replay is launched while the one before it runs
                    graph.replay()
                    event.record()
                torch.cuda.synchronize()
        times = [first.elapsed_time(last) for first, last in pairwise(events)]
        return 1e3 * statistics.median(times) / len(calls)


def square_table(rows: int, taps: int) -> tuple[Tensor, int]:
    """The neighbour table int32 ``[rows, taps]`` of a square of active pixels, and how many halo rows it reads.

    Taps above the square lie outside the picture (-1); those below it read halo rows.
    """
    side = math.isqrt(taps)
    width = math.isqrt(rows - 1) + 1
    reach = torch.arange(side) - side // 2
    steps = (reach[:, None] * width + reach).flatten()
    if len(steps) < taps:  # the kernel is not square: any distinct neighbours will do
        steps = torch.arange(taps) - taps // 2
    table = torch.arange(rows)[:, None] + steps
    return table.clamp(min=-1).int(), max(int(table.max()) - rows + 1, 1)


def device_name(device: torch.device) -> str:
    """Names what the times of a device depend on: the GPU, or the kind of processor and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
