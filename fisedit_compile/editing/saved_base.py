"""A base that was saved: what is read of it at once, what behind that, and what it is held to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.base_manifest import DECODER, FIRST, call_shard
from fisedit_compile.cache.landing import Landing
from fisedit_compile.cache.memory import require_room
from fisedit_compile.cache.packed_base import place
from fisedit_compile.cache.plain_form import Fetch, from_plain
from fisedit_compile.cache.read_ahead import AHEAD, ReadAhead
from fisedit_compile.cache.read_base import BaseFolder
from fisedit_compile.cache.reading import Reading, Shard
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.config import SparsityConfig
from fisedit_compile.editing.arguments import owned
from fisedit_compile.editing.base import Base
from fisedit_compile.editing.pack_base import PLAIN
from fisedit_compile.editing.photo_frame import PhotoFrame
from fisedit_compile.editing.pipeline_state import PipelineState
from fisedit_compile.editing.recorded_call import RecordedCall
from fisedit_compile.editing.saved_call import SavedCall
from fisedit_compile.editing.schedule import Schedule
from fisedit_compile.editing.stride import SolverStep
from fisedit_compile.errors import BaseMemoryError, BaseMismatchError, DamagedBaseError, FiseditError
from fisedit_compile.ir.call import Signature
from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.runtime.model_state import ModelState
from fisedit_compile.utils.frozen_mapping import FrozenMapping
from fisedit_compile.vae.decoded import Decoded

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Begun:
    """A base whose calls are being read.

    Attributes:
        reading: of the calls; they are read no further once nobody holds it.
        stays: whether calls stay on the disk, and are read anew for each edit.
        calls: of each call its step, the call without what it keeps, and how that is read; None where it keeps nothing.
        decoded: what is kept of the decoder.
    """

    reading: Reading | ReadAhead
    stays: bool
    calls: list[tuple[int, Recorded, Shard | None]]
    decoded: Decoded | None


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
        self._first = self._shard(FIRST)
        self.base = self._formed(self._without_calls)
        for _, generator in self.base.generators:
            if not _is_here(generator):
                raise BaseMismatchError(
                    f"{opened.folder}: the noise of the base comes from a generator on {generator}, which is not here: "
                    "generate it with one on the CPU"
                )

    def begin(self, *, stays: bool = False) -> Begun:
        """Begin to read what the U-Net's calls keep.

        Args:
            stays: it stays on the disk, and edits read it as they need it.

        Raises:
            BaseMemoryError: it would take more memory than is free.
            DamagedBaseError: a file is not what was written, as far as that is known by now.
        """
        decoded = self._decoded()
        name = str(self._opened.folder)
        with ExitStack() as folder:
            landing = Landing(folder.enter_context(self._opened.again()), self.base.latents.device)
            calls = self._formed(lambda: [self._call(*each, landing) for each in enumerate(self._content["calls"])])
            shards = [shard for _, _, shard in calls if shard is not None]
            at_once = shards if not stays else sorted(shards, key=lambda shard: shard.nbytes)[-1 - AHEAD :]
            needed: dict[torch.device, int] = {}
            for shard in at_once:
                needed[shard.device] = needed.get(shard.device, 0) + shard.nbytes
            for device, nbytes in needed.items():
                options = ["fewer bases at a time", "a base of fewer steps"]
                require_room(nbytes, device, name, options if stays else [*options, "load(..., tier='disk')"])
            if not stays:
                return Begun(Reading(name, shards, folder.pop_all()), stays, calls, decoded)
            weakref.finalize(landing, folder.pop_all().close)  # which all shards hold, and those who read one
            return Begun(ReadAhead(name, shards), stays, calls, decoded)

    def whole(self, begun: Begun, pipeline: PipelineState) -> Base:
        """The base, whose calls are in or on their way.

        Args:
            begun: what :meth:`begin` returned.
            pipeline: the state of the pipeline that it is read for, equal to its own.
        """
        positions, calls = count(), list[RecordedCall]()
        for step, empty, shard in begun.calls:
            empty.model = pipeline.models["unet"]
            calls.append(
                RecordedCall(step, empty)
                if shard is None
                else SavedCall(step, begun.reading, next(positions), shard, empty.model, stays=begun.stays)
            )
        if begun.decoded is not None:
            begun.decoded.cache.model = pipeline.models["vae"]
        return replace(self.base, calls=tuple(calls), pipeline=pipeline, decoded=begun.decoded)

    def _without_calls(self) -> Base:
        fetch = self._fetch(FIRST, self._first)
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
            **{each: values[each] for each in PLAIN},
        )

    def _call(self, index: int, form: Any, landing: Landing) -> tuple[int, Recorded, Shard | None]:
        about, entries = form
        step, tree, leaves, timesteps = from_plain(about, self._fetch(FIRST, self._first))
        empty = Recorded(Signature(tree, leaves), timesteps, {})
        if not entries:
            return step, empty, None
        name = call_shard(index)
        devices = {reference["name"]: self._landing(reference["device"]) for _, _, reference in entries}

        def read(go_on: Callable[[], None]) -> Recorded:
            fetch = self._fetch(name, landing.read(name, devices.get, go_on), stay=True)
            return self._formed(lambda: empty.with_values(_kept(entries, fetch)))

        return step, empty, Shard(read, self._opened.shard_nbytes(name), next(iter(devices.values())))

    def _decoded(self) -> Decoded | None:
        form = self._formed(lambda: self._content["decoded"])
        if form is None:
            return None
        fetch = self._fetch(DECODER, self._shard(DECODER))

        def formed() -> Decoded:
            latents, about, entries = form
            tree, leaves, timesteps = from_plain(about, fetch)
            cache = Recorded(Signature(tree, leaves), timesteps, _kept(entries, fetch))
            return Decoded(from_plain(latents, fetch), cache)

        return self._formed(formed)

    def _shard(self, name: str) -> dict[str, Tensor]:
        """The tensors of a small shard, on the host, each in memory of its own: some outlive all others."""
        tensors = Landing(self._opened, _HOST).read(name, lambda _: _HOST)
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def _fetch(self, shard: str, tensors: Mapping[str, Tensor], *, stay: bool = False) -> Fetch:
        """What finds tensors of a shard: where they were made, or where they ``stay``."""

        def fetch(reference: Any) -> Tensor:
            tensor = {shard: tensors}[reference["shard"]][reference["name"]]
            return place(tensor, reference, tensor.device if stay else self._landing(reference["device"]))

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


def _kept(entries: Sequence[Any], fetch: Fetch) -> dict[CacheEntry, Tensor]:
    return {CacheEntry(node, kind): fetch(reference) for kind, node, reference in entries}


def _frame(photos: Any, box: Any, size: Any) -> PhotoFrame:
    return PhotoFrame(tuple(photos), tuple(box), tuple(size))


def _state(values: tuple[Any, ...]) -> ModelState:
    described, behaviour, names, checksums = values
    return ModelState.of_another_process(described, behaviour, names, checksums)


def _is_here(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    return device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
