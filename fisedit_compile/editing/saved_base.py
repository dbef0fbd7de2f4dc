"""A base as what lies on disk, and back: which of its values go where, and what a saved one is held to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.host_tier import HostMemory
from fisedit_compile.cache.memory import require_room
from fisedit_compile.cache.packed_base import PackedBase, place, shard_tensors
from fisedit_compile.cache.plain_form import Fetch, Keep, from_plain, to_plain
from fisedit_compile.cache.read_base import WORKERS, BaseFolder
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.config import SparsityConfig
from fisedit_compile.editing.arguments import owned
from fisedit_compile.editing.base import Base, RecordedCall
from fisedit_compile.editing.photo_frame import PhotoFrame
from fisedit_compile.editing.pipeline_state import PipelineState
from fisedit_compile.editing.schedule import Schedule
from fisedit_compile.editing.stride import SolverStep
from fisedit_compile.errors import BaseMemoryError, BaseMismatchError, DamagedBaseError, FiseditError
from fisedit_compile.ir.call import Signature
from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.runtime.model_state import ModelState
from fisedit_compile.utils.frozen_mapping import FrozenMapping
from fisedit_compile.vae.decoded import Decoded

#: The shard that is read first: latents, pictures, arguments, all but what single U-Net calls keep.
_FIRST = "base.safetensors"

#: What is kept of the VAE's decoder.
_DECODER = "decoder.safetensors"

_HOST = torch.device("cpu")

#: Fields of a base that are written as they are.
_PLAIN = ("nsfw", "prompts", "step_latents", "generators", "visits", "callback", "seconds", "unet_ms", "pictures")


def pack(base: Base) -> PackedBase:
    """A base as it is written to disk.

    Raises:
        SavedBaseError: an argument of the pipeline that cannot be kept, by name.
    """
    packed = PackedBase()
    first = packed.keep_in(_FIRST)
    values = {
        "arguments": dict(base.arguments),
        **{name: getattr(base, name) for name in _PLAIN},
        "solver_steps": tuple(tuple(step) for step in base.solver_steps),
        "config": asdict(base.config),
        "frame": base.frame and (list(base.frame.photos), base.frame.box, base.frame.size),
        "schedule": (base.schedule.name, dict(base.schedule.config), dict(base.schedule.tables)),
        "pipeline": (base.pipeline.kind, dict(base.pipeline.tokens)),
        "models": {name: _state_values(state) for name, state in base.pipeline.models.items()},
    }
    content = {name: to_plain(value, name, first) for name, value in values.items()}
    content["calls"] = []
    for i, call in enumerate(base.calls):
        about = (call.step, *_about(call.cache))
        entries = _entries(call.cache, packed.keep_in(_call_shard(i)))
        content["calls"].append([to_plain(about, f"calls[{i}]", first), entries])
    content["decoded"] = _decoder_values(base.decoded, packed)
    packed.content, packed.summary = content, _summary(base)
    return packed


class SavedBase:
    """A base whose folder is open and whose first shard is read.

    Args:
        opened: the folder.
        device: where tensors go that were made on a device that is not here.

    Attributes:
        base: the base, without what its U-Net calls keep.

    Raises:
        BaseMismatchError: other versions wrote it, or its noise comes from a device that is not here.
        DamagedBaseError: a file is not what was written.
    """

    def __init__(self, opened: BaseFolder, device: torch.device) -> None:
        opened.manifest.check_versions(opened.folder)
        opened.check_sizes()
        self._opened, self._device = opened, device
        self._content = opened.content()
        self._first = self._shard(_FIRST)
        self.base = self._formed(self._without_calls)
        self._host, self._host_turn = HostMemory(self.base.latents.device), threading.Lock()
        for _, generator in self.base.generators:
            if not _is_here(generator):
                raise BaseMismatchError(
                    f"{opened.folder}: the noise of the base comes from a generator on {generator}, which is not here: "
                    "generate it with one on the CPU"
                )

    def read_calls(self, pipeline: PipelineState) -> Base:
        """The whole base; its shards are read side by side.

        Args:
            pipeline: the state of the pipeline that it is read for, equal to its own.

        Raises:
            BaseMemoryError: it would take more memory than is free.
            DamagedBaseError: a file is not what was written.
        """
        forms = self._content["calls"]
        for device, count in self._formed(self._needed).items():
            require_room(count, device, str(self._opened.folder), ["fewer bases at a time", "a base of fewer steps"])
        with ThreadPoolExecutor(WORKERS) as workers:
            calls = tuple(workers.map(self._call, range(len(forms)), forms))
        for call in calls:
            call.cache.model = pipeline.models["unet"]
        decoded = self._decoded(self._content["decoded"])
        if decoded is not None:
            decoded.cache.model = pipeline.models["vae"]
        return replace(self.base, calls=calls, pipeline=pipeline, decoded=decoded)

    def _without_calls(self) -> Base:
        fetch = self._fetch({_FIRST: self._first})
        apart = ("calls", "decoded")
        values = {name: from_plain(form, fetch) for name, form in self._content.items() if name not in apart}
        name, options, tables = values["schedule"]
        kind, tokens = values["pipeline"]
        models = {part: _state(state) for part, state in values["models"].items()}
        frame = values["frame"] and _frame(*values["frame"])
        return Base(
            images=owned(list(frame.photos) if frame else values["pictures"]),
            frame=frame,
            arguments=FrozenMapping(values["arguments"]),
            calls=(),
            decoded=None,
            pipeline=PipelineState(kind, FrozenMapping(models), FrozenMapping(tokens)),
            schedule=Schedule(name, FrozenMapping(options), FrozenMapping(tables)),
            solver_steps=tuple(SolverStep(*step) for step in values["solver_steps"]),
            config=SparsityConfig(**values["config"]),
            **{each: values[each] for each in _PLAIN},
        )

    def _needed(self) -> dict[torch.device, int]:
        """The bytes that all calls take on each device; a shard on its way there lies on the host twice."""
        sizes = {file.name: file.bytes for file in self._opened.manifest.files}
        needed: dict[torch.device, int] = {}
        shards: list[int] = []
        for i, (_, entries) in enumerate(self._content["calls"]):
            if entries:
                device = self._landing(entries[0][2]["device"])
                shards.append(sizes[_call_shard(i)])
                needed[device] = needed.get(device, 0) + shards[-1]
        on_their_way = 2 * sum(sorted(shards)[-WORKERS:])
        return {**needed, _HOST: needed.get(_HOST, 0) + on_their_way}

    def _call(self, index: int, form: Any) -> RecordedCall:
        about, entries = form
        name = _call_shard(index)
        shard = self._shard(name) if entries else {}

        def formed() -> RecordedCall:
            step, *rest = from_plain(about, self._fetch({_FIRST: self._first}))
            cache = _recorded(rest, entries, self._fetch({name: shard}))
            away = any(tensor.device != self.base.latents.device for tensor in cache.values())
            return RecordedCall(step, self._in_host_memory(cache) if away else cache)

        return self._formed(formed)

    def _in_host_memory(self, cache: Recorded) -> Recorded:
        with self._host_turn:
            return self._host.take(cache)

    def _decoded(self, form: Any) -> Decoded | None:
        if form is None:
            return None
        shard = self._shard(_DECODER)

        def formed() -> Decoded:
            fetch = self._fetch({_DECODER: shard})
            latents, about, entries = form
            return Decoded(from_plain(latents, fetch), _recorded(from_plain(about, fetch), entries, fetch))

        return self._formed(formed)

    def _shard(self, name: str) -> dict[str, Tensor]:
        try:
            return shard_tensors(self._opened.read(name))
        except ValueError as error:
            raise self._opened.damaged(name, str(error)) from None

    def _fetch(self, shards: Mapping[str, Mapping[str, Tensor]]) -> Fetch:
        def fetch(reference: Any) -> Tensor:
            tensor = shards[reference["shard"]][reference["name"]]
            return place(tensor, reference, self._landing(reference["device"]))

        return fetch

    def _landing(self, made_on: str) -> torch.device:
        device = torch.device(made_on)
        return device if _is_here(device) else self._device

    def _formed(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns; whatever it cannot read is an error of the folder."""
        try:
            return make()
        except FiseditError:
            raise
        except torch.OutOfMemoryError as error:
            raise BaseMemoryError(
                f"{self._opened.folder} does not fit beside what the GPU holds: free some of its memory ({error})"
            ) from error
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DamagedBaseError(
                f"{self._opened.folder}: base.json does not describe a base ({error}): remove the folder and generate "
                "the base again"
            ) from error


def _summary(base: Base) -> dict[str, Any]:
    return {
        "pipeline": base.pipeline.kind,
        "prompts": list(base.prompts),
        "steps": base.num_inference_steps,
        "visited_steps": len(base.visits),
        "scheduler": base.schedule.name,
        "latents": list(base.latents.shape),
        "pil": base.arguments.get("output_type", "pil") == "pil",
        "dtype": str(base.latents.dtype).removeprefix("torch."),
        "device": str(base.latents.device),
        "config": asdict(base.config),
        "unet": base.pipeline.models["unet"].digest(),
        "bytes": base.nbytes,
    }


def _decoder_values(decoded: Decoded | None, packed: PackedBase) -> Any:
    if decoded is None:
        return None
    keep = packed.keep_in(_DECODER)
    latents, about = to_plain(decoded.latents, "latents", keep), to_plain(_about(decoded.cache), "decoded", keep)
    return [latents, about, _entries(decoded.cache, keep)]


def _about(cache: Recorded) -> tuple[Any, ...]:
    return cache.signature.tree, cache.signature.leaves, cache.timesteps


def _entries(cache: Recorded, keep: Keep) -> list[Any]:
    return [[entry.kind, entry.node, keep(tensor, entry.name)] for entry, tensor in cache.items()]


def _recorded(about: Sequence[Any], entries: Any, fetch: Fetch) -> Recorded:
    tree, leaves, timesteps = about
    kept = {CacheEntry(node, kind): fetch(reference) for kind, node, reference in entries}
    return Recorded(Signature(tree, leaves), timesteps, kept)


def _frame(photos: Any, box: Any, size: Any) -> PhotoFrame:
    return PhotoFrame(tuple(photos), tuple(box), tuple(size))


def _state_values(state: ModelState) -> tuple[Any, ...]:
    return dict(state.values), state.behaviour, state.names, state.checksums()


def _state(values: tuple[Any, ...]) -> ModelState:
    described, behaviour, names, checksums = values
    return ModelState.of_another_process(described, behaviour, names, checksums)


def _call_shard(index: int) -> str:
    return f"call-{index:04}.safetensors"


def _is_here(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    return device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
