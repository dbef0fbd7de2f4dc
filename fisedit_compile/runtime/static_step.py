"""The sparse step at fixed shapes and addresses: on a GPU one CUDA graph for each bucket of sizes.

A step has buffers of its own, padded to its bucket, and everything that changes is copied into them: the plan once an
edit, the prompt's values once an edit, and before each step, by a launch or two, the base's halo rows, norms and time
embeddings, unpacked where the base keeps them in few bits. Another mask is another plan to copy, never another graph.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fisedit_compile.cache.step_cache import Recorded, StepCache
from fisedit_compile.cache.tensors_in_memory import Layout, Piece
from fisedit_compile.compiler.lowered import Lowered
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.kernels.indexing.copy_rows import RowCopies
from fisedit_compile.planning.buckets import Bucket, pad_plan
from fisedit_compile.planning.edit_plan import EditPlan
from fisedit_compile.runtime.control import Control, ControlBuffers
from fisedit_compile.runtime.cuda_graph import GraphCapturer
from fisedit_compile.runtime.stage import Stage
from fisedit_compile.utils.single_thread import single_thread

logger = logging.getLogger(__name__)

_ALIGNMENT = 256  # bytes, as torch's own allocator aligns

Shapes = Mapping[Any, tuple[Sequence[int], torch.dtype]]


class Packed:
    """Tensors of several shapes and dtypes in one buffer, so that one copy brings all of them."""

    def __init__(
        self, shapes: Shapes, device: torch.device, *, pin: bool = False, buffer: Tensor | None = None
    ) -> None:
        starts, end = [], 0
        for shape, dtype in shapes.values():
            starts.append(end)
            end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if buffer is None:
            buffer = torch.empty(end, dtype=torch.uint8, device=device, pin_memory=pin)
        self.shapes, self.buffer = shapes, buffer[:end]
        self.ready: torch.cuda.Event | None = None  # for those who read it on another stream
        self.tensors: dict[Any, Tensor] = {
            key: buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)
            for start, (key, (shape, dtype)) in zip(starts, shapes.items(), strict=True)
        }


class Shared(GraphCapturer):
    """What the buckets of a program share: memory, because one of them runs at a time, the prompt's values, control."""

    def __init__(self, lowered: Lowered, device: torch.device) -> None:
        super().__init__(device)
        self.control = ControlBuffers(lowered.kept.controlled_entries, lowered.control_specs, lowered.batch, device)
        self.prompt: dict[Any, Tensor] = {}
        self.addresses: WeakKeyDictionary[Recorded, Any] = WeakKeyDictionary()  # where the tensors of a call lie
        self.starts: WeakKeyDictionary[Layout, Tensor] = WeakKeyDictionary()  # where they lie in a piece of memory
        self._prompt_of: object = None
        self._fetched: Tensor | None = None

    def bring_prompt(self, values: Mapping[Any, Tensor], owner: object) -> None:
        """Copy the prompt's values to where the graphs read them; ``owner`` tells one edit's from another's."""
        if not self.prompt:
            self.prompt = {
                key: torch.empty_like(each, memory_format=torch.contiguous_format) for key, each in values.items()
            }
        if self._prompt_of is not owner and values:
            torch._foreach_copy_(list(self.prompt.values()), [values[key] for key in self.prompt])
            self._prompt_of = owner

    def memory(self, shapes: Shapes) -> Packed:
        """Buffers for what is fetched before each step; every bucket uses the same memory while it is large enough."""
        packed = Packed(shapes, torch.device("meta"))
        if self._fetched is None or packed.buffer.numel() > self._fetched.numel():
            self._fetched = torch.empty(packed.buffer.numel(), dtype=torch.uint8, device=self.device)
        return Packed(shapes, self.device, buffer=self._fetched)


class StaticStep:
    """The step of one bucket.

    Args:
        step: the stage that runs.
        lowered: the graphs that it belongs to, which know what each of its inputs is.
        bucket: its sizes.
        constants: values of the stage ``constant``.
        shared: what all buckets share.
    """

    def __init__(
        self,
        step: Stage,
        lowered: Lowered,
        bucket: Bucket,
        constants: Mapping[Any, Tensor],
        shared: Shared,
    ) -> None:
        self.bucket, self._step, self._constants, self._shared = bucket, step, constants, shared
        self._requests = lowered.plan_requests
        specs, fetches = lowered.kept.cache_specs, lowered.fetches
        # Source of each fetched buffer: an entry of the base's cache, whole or at rows of the plan.
        self._sources: dict[Any, CacheEntry] = {}
        shapes: dict[Any, tuple[Sequence[int], torch.dtype]] = {}
        self._rows: dict[Any, PlanTensor] = {}
        for name in step.names:
            if isinstance(name, CacheEntry) and name in specs:
                self._sources[name], shapes[name] = name, specs[name]
            elif name in fetches:
                entry, rows = fetches[name]
                shape, dtype = specs[entry]
                self._sources[name], self._rows[name] = entry, rows
                shapes[name] = ((bucket.halo[rows.where], *shape[1:]), dtype)  # type: ignore[index]
        self._fetched = shared.memory(shapes).tensors
        self._formats = [lowered.kept.formats.get(self._sources[name]) for name in self._fetched]
        self._tiles = {
            name: row_of.to(shared.device)
            for (name, target), form in zip(self._fetched.items(), self._formats, strict=True)
            if name not in self._rows and form and (row_of := form.row_of_each_pixel(len(target))) is not None
        }
        self._plan: Packed | None = None
        self._plan_of: Packed | None = None
        self._copies: RowCopies | None = None
        self._inputs: dict[str, Tensor] = {}
        self._replay: Callable[[], Tensor] | None = None

    def pack(self, plan: EditPlan) -> Packed:
        """A plan's tensors padded to the bucket, in one buffer on the device."""
        device = self._shared.device
        with single_thread():
            packed = self._pack(plan)
        if packed.buffer.device != device:
            packed = Packed(packed.shapes, device, buffer=packed.buffer.to(device, non_blocking=True))
        if device.type == "cuda":
            packed.ready = torch.cuda.Event()
            packed.ready.record(torch.cuda.current_stream(device))
        return packed

    def _pack(self, plan: EditPlan) -> Packed:
        """The padded tensors in one buffer on the device that the plan was made on."""
        padded: dict[Any, Tensor] = dict(pad_plan(plan, self.bucket, self._requests))
        padded["counts"] = torch.tensor(
            [
                len(plan.tensor(self._rows[name])) if name in self._rows else len(buffer)
                for name, buffer in self._fetched.items()
            ],
            dtype=torch.int32,
        )
        shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in padded.items()}
        on = plan.mask.device
        packed = Packed(shapes, on, pin=on.type == "cpu" and self._shared.device.type == "cuda")
        for key, tensor in padded.items():
            packed.tensors[key].copy_(tensor, non_blocking=True)
        return packed

    def run(
        self,
        inputs: Mapping[str, Tensor],
        cache: StepCache,
        plan: Packed,
        prompt: Mapping[Any, Tensor],
        control: Control | None = None,
    ) -> Tensor:
        """One step; ``plan`` is of :meth:`pack`, ``prompt`` the values of the prompt's stage."""
        with self._shared.in_turn():
            if self._plan is None:
                self._plan = Packed(plan.shapes, self._shared.device)
                rows = {name: self._plan.tensors[request] for name, request in self._rows.items()} | self._tiles
                indices = [rows.get(name) for name in self._fetched]
                counts = self._plan.tensors["counts"]
                self._copies = RowCopies(list(self._fetched.values()), indices, counts, self._formats)
            assert self._copies is not None
            if self._plan_of is not plan:
                if plan.ready is not None:
                    plan.ready.wait(torch.cuda.current_stream())
                self._plan.buffer.copy_(plan.buffer)
                self._plan_of = plan
            self._shared.bring_prompt(prompt, prompt)
            self._shared.control.bring(control, cache)
            self._copies.run(self._addresses(cache))
            for name in self._step.names:
                if isinstance(name, str):
                    if name not in self._inputs:
                        self._inputs[name] = torch.empty_like(inputs[name])
                    self._inputs[name].copy_(inputs[name])
            if self._replay is None:
                self._replay = self._capture()
            return self._replay().clone()

    def launch(self) -> Tensor:
        """The step on what lies in its buffers, launched kernel by kernel; after a :meth:`run`, which filled them."""
        assert self._plan is not None
        shared = self._shared.prompt | self._shared.control.values
        values = {**self._constants, **shared, **self._fetched, **self._plan.tensors, **self._inputs}
        out: Tensor = self._step(values)
        return out

    def _addresses(self, cache: StepCache) -> Any:
        """Where the base's tensors lie, on the device; found once for the cache of a recorded call.

        Where these tensors share a piece of memory, they are looked up in the first call that is laid out so.
        """
        if not isinstance(cache, Recorded):
            return self._looked_up(cache)
        known = self._shared.addresses
        if cache not in known:
            known[cache] = self._looked_up(cache) if cache.piece is None else self._within(cache.piece, cache)
        return known[cache]

    def _within(self, piece: Piece, cache: Recorded) -> Sequence[Tensor] | Tensor:
        starts, first = self._shared.starts, piece.memory.data_ptr()
        if piece.layout in starts:
            return starts[piece.layout] + first
        addresses = self._looked_up(cache)
        if isinstance(addresses, Tensor) and all(entry in piece.layout.places for entry in self._sources.values()):
            starts[piece.layout] = addresses - first
        return addresses

    def _looked_up(self, cache: StepCache) -> Sequence[Tensor] | Tensor:
        assert self._copies is not None
        return self._copies.addresses([cache[entry] for entry in self._sources.values()])

    def _capture(self) -> Callable[[], Tensor]:
        """The step as one CUDA graph."""
        start, shared = time.perf_counter(), self._shared
        on_gpu = shared.device.type == "cuda"
        if on_gpu and not shared.captures:
            logger.info("first sparse step: compiling kernels (their cache serves later processes) ...")
        replay = shared.capture(self.launch)
        if on_gpu:
            seconds = time.perf_counter() - start
            logger.info("captured the step for masks of %s in %.1f s", self.bucket.name, seconds)
        return replay
