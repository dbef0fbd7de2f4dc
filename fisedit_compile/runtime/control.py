"""Prompt-to-Prompt control of a step: which of the base's attention maps it takes, and how its graph is given them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fisedit_compile.cache.step_cache import Recorded, StepCache
from fisedit_compile.compiler.lowered import TensorSpec
from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.ir.requests import CacheEntry, ControlTensor

MAPPER, KEEP, WEIGHT, SPAN = (ControlTensor(kind) for kind in ("mapper", "keep", "weight", "span"))


class Control(NamedTuple):
    """What an edit's words keep of the base's, for all its steps.

    Attributes:
        mapper: fp32 ``[n, T, T]`` and
        keep: fp32 ``[n, T]``, of :func:`~fisedit_compile.editing.prompt_alignment.align_batch`.
        part: place of the conditional part in the U-Net's batch; -1 is the last.
        weight: fp32 ``[n, T]``, what the map of each token is multiplied by
            (:func:`~fisedit_compile.editing.word_weights.token_weights`); None is 1 for all.
    """

    mapper: Tensor
    keep: Tensor
    part: int = -1
    weight: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """``weight``, with ones for None."""
        return torch.ones_like(self.keep) if self.weight is None else self.weight


def span_of(control: Control, cache: StepCache, entries: list[CacheEntry], batch: int) -> tuple[int, int, int]:
    """Of how many tokens a cache has maps, the first sample of the conditional part, and the one behind its last.

    Raises:
        BaseMismatchError: the call was recorded without attention maps.
        ValueError: the batch does not consist of whole parts of as many samples as control is for.
    """
    if missing := [entry for entry in entries if entry not in cache]:
        raise BaseMismatchError(
            f"the cache has no attention maps of {missing[0].node} and {len(missing) - 1} more: record the call with "
            "attention=True, or take the step without control"
        )
    samples = control.mapper.shape[0]
    parts = batch // samples
    if batch % samples or not -parts <= control.part < parts:
        raise ValueError(
            f"control of {samples} sample(s), part {control.part}, does not fit a batch of {batch}: give the prompts "
            "of all pictures, and the place of the conditional part"
        )
    first = control.part % parts * samples
    tokens = cache[entries[0]].shape[2] if entries else 0
    return tokens, first, first + samples


def control_values(
    control: Control | None, cache: StepCache, entries: list[CacheEntry], specs: Mapping[ControlTensor, TensorSpec],
    batch: int,
) -> dict[Any, Tensor]:  # fmt: skip
    """The tensors that a step at the sizes of its mask reads, by request; without control those that change nothing."""
    if not specs:
        return {}
    device = next(iter(cache.values())).device
    if control is None:
        shape, dtype = specs[MAPPER]
        none = torch.empty(0, *shape[1:], dtype=dtype, device=device)
        maps = torch.empty(0, 0, 0, dtype=torch.float32, device=device)
        values: dict[Any, Tensor] = dict.fromkeys(entries, maps)
        span = torch.zeros(3, dtype=torch.int32, device=device)
        return values | {MAPPER: none, KEEP: none[:, 0], WEIGHT: none[:, 0], SPAN: span}
    span = torch.tensor(span_of(control, cache, entries, batch), dtype=torch.int32, device=device)
    given = {MAPPER: control.mapper, KEEP: control.keep, WEIGHT: control.weights, SPAN: span}
    return {**{entry: cache[entry] for entry in entries}, **given}


class ControlBuffers:
    """Where CUDA graphs read the tensors of control: mapper, keep, span, and the addresses of the base's maps.

    On a CPU, where nothing is replayed, the maps themselves stand in for their addresses.

    Args:
        entries: the maps that a step reads.
        specs: of the tensors of control.
        batch: samples of the U-Net's batch.
        device: of the graphs.
    """

    def __init__(
        self,
        entries: list[CacheEntry],
        specs: Mapping[ControlTensor, TensorSpec],
        batch: int,
        device: torch.device,
    ) -> None:
        self._entries, self._batch, self._device = entries, batch, device
        with torch.inference_mode(False):  # they are written to in later calls
            self.values: dict[Any, Tensor] = {
                key: torch.zeros(shape, dtype=dtype, device=device) for key, (shape, dtype) in specs.items()
            }
            self._table = torch.zeros(len(entries), dtype=torch.int64, device=device)
        self.values |= {entry: self._table[i : i + 1] for i, entry in enumerate(entries)}
        self._control: Control | None = None
        self._written: tuple[int, ...] = ()
        self._span = (0, 0, 0)
        self._tables: WeakKeyDictionary[Recorded, Tensor] = WeakKeyDictionary()

    def bring(self, control: Control | None, cache: StepCache) -> None:
        """Fill the buffers for one step, on the current stream, without waiting for the device."""
        if not self._entries:
            return
        span = (0, 0, 0) if control is None else span_of(control, cache, self._entries, self._batch)
        if span != self._span:
            self.values[SPAN].copy_(self._uploaded(span, torch.int32))
            self._span = span
        if control is None:
            return
        given = [each for each in control if isinstance(each, Tensor)]
        written = tuple(0 if tensor.is_inference() else tensor._version for tensor in given)
        if self._control is not control or written != self._written:
            samples = control.mapper.shape[0]
            self.values[MAPPER][:samples].copy_(control.mapper)
            self.values[KEEP][:samples].copy_(control.keep)
            self.values[WEIGHT][:samples].copy_(control.weights)
            self._control, self._written = control, written
        if self._device.type == "cuda":
            self._table.copy_(self._addresses(cache))
        else:
            self.values |= {entry: cache[entry] for entry in self._entries}

    def _addresses(self, cache: StepCache) -> Tensor:
        """Where the maps of a recorded call lie, on the device; found once a call."""
        known = self._tables.get(cache) if isinstance(cache, Recorded) else None
        if known is None:
            known = self._uploaded([cache[entry].data_ptr() for entry in self._entries], torch.int64)
            if isinstance(cache, Recorded):
                self._tables[cache] = known
        return known

    def _uploaded(self, numbers: Any, dtype: torch.dtype) -> Tensor:
        host = torch.tensor(numbers, dtype=dtype)
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host
