"""Edits cases by all methods, in one process or several that share the devices."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from baselines.calls import CallLog
from baselines.method import Method
from baselines.task import Task

from fisedit_compile.editing.plain_pipeline import load_pipeline
from fisedit_compile.quality.cases import Case
from fisedit_compile.quality.clip_scores import Clip
from fisedit_compile.quality.judge import Judge
from fisedit_compile.quality.workers import device_of_worker
from tradeoffs.curves import CURVES, Models, Setting, settings_of
from tradeoffs.figures import Figures, Measure
from tradeoffs.own import OwnEdits
from tradeoffs.pictures import CasePictures, References


@dataclass(frozen=True)
class Conditions:
    """What is equal for all cases.

    Attributes:
        model, judge, clip, instruct: folders; ``instruct`` of a pipeline for InstructPix2Pix, None without that method.
        methods: keys of :data:`~tradeoffs.curves.CURVES`.
        steps, guidance: of bases and edits.
        device, dtype: of the models.
        threads: of torch on the CPU, in each process.
        page: folder for all pictures; None keeps none.
    """

    model: Path
    judge: Path
    clip: Path
    instruct: Path | None
    methods: Sequence[str]
    steps: int
    guidance: float
    device: torch.device
    dtype: torch.dtype
    threads: int
    page: Path | None


@dataclass(frozen=True)
class CaseResult:
    """Of one case.

    Attributes:
        case: its id.
        figures: of each edit that was made.
        features: name of the setting -> CLIP's features of its picture, ``[d]``, beside :data:`BASE`, :data:`DENSE`
            and :data:`RENDERED`; arrays, as each tensor would keep a file descriptor on its way to another process.
        failed: name of the setting -> why there is no such edit.
    """

    case: str
    figures: list[Figures]
    features: dict[str, np.ndarray[Any, Any]]
    failed: dict[str, str]


#: Beside the settings: the picture before, and what sets of edits are held to by FID.
BASE, DENSE, RENDERED = "base", "dense", "rendered"


class CaseEditor:
    """Edits one case after the other, by every method."""

    def __init__(self, conditions: Conditions) -> None:
        torch.set_num_threads(conditions.threads)
        diffusers.logging.set_verbosity_error()  # some pipelines warn that they will get no new features
        pipe = load_pipeline(conditions.model, conditions.device, conditions.dtype)
        pipe.set_progress_bar_config(disable=True)
        self._conditions, self._settings = conditions, settings_of(conditions.methods)
        self._references = References(pipe, conditions.steps, conditions.guidance)
        self._own = OwnEdits(pipe, conditions.steps, conditions.guidance)
        self._models = Models(pipe, self._own, conditions.instruct)
        self._judge, self._clip = Judge.load(conditions.judge), Clip.load(conditions.clip)
        self._methods: dict[str, Method] = {}

    def run(self, case: Case) -> CaseResult:
        """All edits of a case; what fails leaves the rest alone."""
        result = CaseResult(case.id, [], {}, {})
        if self._conditions.page is not None:  # what an earlier run left must not be taken for this one's
            for name in (BASE, DENSE, RENDERED, *(each.name for each in self._settings)):
                picture_file(self._conditions.page, case.id, name).unlink(missing_ok=True)
        try:
            pictures = self._draw(case, result)
        except Exception as error:  # no room for a base, for example
            result.failed.update({setting.name: _told(error) for setting in self._settings})
            return result
        measure = Measure(pictures, self._judge, self._clip)
        for setting in self._settings:
            try:
                self._edit(setting, pictures, measure, result)
            except Exception as error:  # of any library that a method is made from
                result.failed[setting.name] = _told(error)
        return result

    def _draw(self, case: Case, result: CaseResult) -> CasePictures:
        """The pictures of a case; the base is the one that our own edits are of."""
        masked = [each for each in self._settings if each.value is not None and not CURVES[each.method].attribute]
        pictures = self._references.draw(case, sorted({each.value for each in masked if each.value}))
        pictures = replace(pictures, base=self._own.draw(case.prompt, case.seed))
        for name in (BASE, DENSE, RENDERED):
            picture = getattr(pictures, name)
            result.features[name] = self._clip.features([picture])[0].numpy()
            self._keep(case, name, picture)
        return pictures

    def _edit(self, setting: Setting, pictures: CasePictures, measure: Measure, result: CaseResult) -> None:
        curve, case = CURVES[setting.method], pictures.case
        if setting.method not in self._methods:
            self._methods[setting.method] = curve.make(self._models)
        method = self._methods[setting.method]
        method.steps = self._conditions.steps
        mask = None
        if curve.attribute:
            setattr(method, curve.attribute, setting.value)
        elif setting.value is not None:
            mask = pictures.masks[setting.value]
        task = Task(case.prompt, case.edit, pictures.base, mask, case.seed, self._conditions.guidance)
        with CallLog(method.unet, method.kind) as log:
            start = time.perf_counter()
            picture = method.edit(task)  # a PIL image: the device has finished
            seconds = time.perf_counter() - start
        result.figures.append(measure(setting.name, picture, seconds, len(log.keys)))
        result.features[setting.name] = self._clip.features([picture])[0].numpy()
        self._keep(case, setting.name, picture)

    def _keep(self, case: Case, name: str, picture: object) -> None:
        if self._conditions.page is not None:
            file = picture_file(self._conditions.page, case.id, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)  # type: ignore[attr-defined]


def picture_file(page: Path, case: str, name: str) -> Path:
    """Where a picture of a case lies: that of a setting by its name, or one of BASE, DENSE and RENDERED."""
    return page / "pictures" / f"{case}.{name}.png"


def run_cases(conditions: Conditions, cases: Sequence[Case], workers: int) -> Iterator[CaseResult]:
    """The results of all cases, as they are there.

    Raises:
        BrokenProcessPool: a process has died.
    """
    if workers == 1:
        editor = CaseEditor(conditions)
        yield from map(editor.run, cases)
        return
    context = multiprocessing.get_context("spawn")
    begun = context.Value("i", 0)
    with ProcessPoolExecutor(min(workers, len(cases)), context, _open, (conditions, begun)) as pool:
        try:
            for done in as_completed([pool.submit(_run, case) for case in cases]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _told(error: Exception) -> str:
    """The error in a line, behind its traceback on stderr."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


_EDITOR: CaseEditor | None = None


def _open(conditions: Conditions, begun: Any) -> None:
    global _EDITOR
    _EDITOR = CaseEditor(replace(conditions, device=device_of_worker(conditions.device, begun)))


def _run(case: Case) -> CaseResult:
    assert _EDITOR is not None
    return _EDITOR.run(case)
