"""Draws cases side by side, in processes that have a pipeline each."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fisedit_compile.editing.plain_pipeline import load_pipeline
from fisedit_compile.editing.schedulers import exchange_scheduler
from fisedit_compile.errors import FiseditError
from fisedit_compile.quality.cases import Case
from fisedit_compile.quality.runs import CaseRun, CaseRunner, RunSettings

_runner: CaseRunner | None = None  # of this process, if it is a worker


@dataclass(frozen=True)
class Drawing:
    """What cases are drawn with.

    Attributes:
        model: folder of the pipeline.
        device, dtype: of the pipeline.
        settings: of the runs.
        scheduler: name of its class in diffusers; None is the model's own.
    """

    model: Path
    device: torch.device
    dtype: torch.dtype
    settings: RunSettings
    scheduler: str | None = None

    def pipeline(self) -> Any:
        """The pipeline, read from its folder.

        Raises:
            ValueError: see :func:`~fisedit_compile.editing.schedulers.exchange_scheduler`.
        """
        pipe = load_pipeline(self.model, self.device, self.dtype)
        if self.scheduler is not None:
            exchange_scheduler(pipe, self.scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Any, cases: Sequence[Case], workers: int) -> Iterator[tuple[Case, CaseRun | FiseditError]]:
        """Each case with its pictures, or with the error that says why it has none, in the order of the cases.

        Args:
            pipe: from :meth:`pipeline`; what this process draws with where it is the only one.
            cases: what to draw.
            workers: processes; 1 is this one alone. More share its threads and the devices, and read the model again.
        """
        if workers == 1:
            runner = CaseRunner(pipe, self.settings)
            yield from ((case, _drawn(runner, case)) for case in cases)
            return
        threads = max(1, torch.get_num_threads() // workers)
        spawn = multiprocessing.get_context("spawn")  # a process that used CUDA cannot be forked
        begun = spawn.Value("i", 0)
        with ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=(self, threads, begun)) as pool:
            yield from zip(cases, map(pickle.loads, pool.map(_draw, cases)), strict=True)


def device_of_worker(device: torch.device, begun: Any) -> torch.device:
    """The device of the worker that calls it: all CUDA devices in turns, where ``device`` names none of them.

    Args:
        device: of all workers.
        begun: a ``multiprocessing.Value`` of an integer that the workers share, 0 before the first one begins.
    """
    with begun.get_lock():
        place = begun.value
        begun.value += 1
    if device.type != "cuda" or device.index is not None:
        return device
    device = torch.device("cuda", place % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _begin(drawing: Drawing, threads: int, begun: Any) -> None:
    global _runner
    torch.set_num_threads(threads)
    drawing = replace(drawing, device=device_of_worker(drawing.device, begun))
    _runner = CaseRunner(drawing.pipeline(), drawing.settings)


def _draw(case: Case) -> bytes:
    """The pickled result: a tensor by itself would come through a file that stays open as long as it is there."""
    assert _runner is not None
    return pickle.dumps(_drawn(_runner, case))


def _drawn(runner: CaseRunner, case: Case) -> CaseRun | FiseditError:
    try:
        return runner.run(case)
    except FiseditError as error:  # no mask was found, for example: the other cases are none the worse for it
        return FiseditError(str(error))
