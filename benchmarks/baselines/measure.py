"""Measures one row of the table: counts a method on the meta device, and runs and times it on a real one."""

from __future__ import annotations

import gc
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from baselines.calls import CallLog
from baselines.method import CallCount, Method, NotInstalledError
from baselines.models import Kit

#: Makes a method from a kit; it is called once to count and once to run.
Factory = Callable[[Kit], Method]

#: Prints a line that says what is going on.
Say = Callable[[str], None]

OK, OUT_OF_MEMORY, COUNTED, FAILED = "ok", "out of memory", "counted only", "failed"

#: What the messages of out-of-memory errors contain that are no OutOfMemoryError: those of torch on the CPU, of the
#: driver and of cuBLAS.
_NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")


@dataclass
class Row:
    """A method's figures.

    Attributes:
        status: ``"ok"``, ``"counted only"``, ``"out of memory"``, ``"not installed: ..."`` or ``"failed: ..."``.
        images: how many pictures a run makes.
        kinds: the U-Net calls of one run, by kind.
        calls: how many U-Net calls a picture takes.
        macs: how many multiply-accumulates of the U-Net a picture takes.
        macs_a_step: ``macs`` divided by the number of denoising steps that were asked for.
        seconds: wall time of a picture from words (and picture) to pixels, with autoencoder and text encoder.
        calls_per_second: U-Net calls divided by the time from the start of a picture's first to the end of its last.
        held_gib: GiB that tensors held on the device when the timed run began: the models, and FISEdit's base.
        peak_gib: the most GiB that tensors held during the run, ``held_gib`` included.
        finite: whether the last call of the U-Net returned finite numbers. Weights are random, so a method may overflow
            in half precision where a trained model would not.
    """

    name: str
    title: str
    source: str
    needs_training: bool
    edits_part: bool
    status: str = OK
    images: int = 1
    kinds: list[CallCount] = field(default_factory=list)
    calls: float | None = None
    macs: float | None = None
    macs_a_step: float | None = None
    seconds: float | None = None
    calls_per_second: float | None = None
    held_gib: float | None = None
    peak_gib: float | None = None
    finite: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The row that :meth:`to_dict` made ``values`` of."""
        return cls(**{**values, "kinds": [CallCount(**kind) for kind in values["kinds"]]})


def measure(name: str, factory: Factory, kit: Kit | None, counting_kit: Kit, steps: int, say: Say) -> Row:
    """Count a method, and run it unless ``kit`` is None.

    If a method fails, its row says so, and the other methods are still measured.
    """
    kind: Any = factory.func if isinstance(factory, partial) else factory
    row = Row(name, getattr(kind, "title", name), kind.source, kind.needs_training, kind.edits_part)
    try:
        say(f"{name}: counting")
        _count(row, factory(counting_kit), steps)
        if kit is None:
            row.status = COUNTED
        else:
            say(f"{name}: building")
            _run(row, factory(kit), kit, steps, say)
    except NotInstalledError as error:
        row.status = f"not installed: {error}"
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(each in str(error) for each in _NO_MEMORY):
            row.status = OUT_OF_MEMORY
        else:
            traceback.print_exc()
            row.status = f"{FAILED}: {type(error).__name__}: {error}".splitlines()[0]
    # After the except clauses, because a caught error keeps the frames that it passed alive, and with them the method.
    if kit is not None:
        _release(kit)
    say(f"{name}: {_summary(row)}")
    return row


def _count(row: Row, method: Method, steps: int) -> None:
    row.title, row.images = method.title, method.images
    row.kinds = method.count(steps)
    row.calls = sum(kind.calls for kind in row.kinds) / row.images
    row.macs = sum(kind.macs for kind in row.kinds) / row.images
    row.macs_a_step = row.macs / steps


def _run(row: Row, method: Method, kit: Kit, steps: int, say: Say) -> None:
    on_cuda = kit.device.type == "cuda"
    try:
        say(f"{row.name}: preparing and warming up")
        method.prepare(steps)
        if on_cuda:
            method.warm_up(steps)
            gc.collect()  # what the warm-up left; the allocator keeps its blocks, as from one picture to the next
            torch.cuda.synchronize(kit.device)
            torch.cuda.reset_peak_memory_stats(kit.device)
            row.held_gib = torch.cuda.memory_allocated(kit.device) / 2**30
        say(f"{row.name}: timing")
        with CallLog(method.unet, method.kind) as log:
            start = time.perf_counter()
            method.run(steps)
            if on_cuda:
                torch.cuda.synchronize(kit.device)
            seconds = time.perf_counter() - start
        if on_cuda:
            row.peak_gib = torch.cuda.max_memory_allocated(kit.device) / 2**30
    finally:
        method.close()
    ran, counted = Counter(map(str, log.keys)), {kind.kind: kind.calls for kind in row.kinds if kind.calls}
    if ran != counted:
        raise AssertionError(f"{dict(ran)} ran where {counted} were counted")
    row.seconds = seconds / method.images
    row.calls_per_second = len(log.keys) / log.seconds(method.images)
    milliseconds = log.milliseconds()
    row.kinds = [replace(kind, milliseconds=milliseconds.get(kind.kind)) for kind in row.kinds]
    row.finite = log.finite()


def _summary(row: Row) -> str:
    """One line of progress about a finished row."""
    if row.seconds is None:
        return row.status
    memory = "" if row.peak_gib is None else f", {row.peak_gib:.1f} GiB"
    return f"{row.status}, {row.seconds:.3g} s an image{memory}{'' if row.finite else ', NOT FINITE'}"


def _release(kit: Kit) -> None:
    """Free the method's memory before the next one's is measured."""
    gc.collect()
    if kit.device.type == "cuda":
        torch.cuda.empty_cache()
