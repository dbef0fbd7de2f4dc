"""Edits photos of the cases of ``fisedit-compile quality``, in one process or several that share the devices."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fisedit_compile.editing.plain_pipeline import load_pipeline
from fisedit_compile.masks.grown import grown
from fisedit_compile.quality.cases import Case
from fisedit_compile.quality.judge import Judge
from fisedit_compile.quality.verdicts import judge_edit, shows
from fisedit_compile.quality.workers import device_of_worker
from photo_edits.measure import Figures, PhotoCase, measure
from photo_edits.methods import METHODS, FisEdit, Settings
from photo_edits.rendered import as_picture, render
from photo_edits.structure import dino_keys, judge_features

#: Pixels around what differs in the rendered pictures that are no background: the rim of a latent cell.
_RIM = 8


@dataclass(frozen=True)
class Conditions:
    """What is equal for all cases.

    Attributes:
        model, judge: folders.
        dino: folder of DINO ViT-B/8, for structure distance; None takes the judge's features.
        methods: keys of :data:`~photo_edits.methods.METHODS`.
        settings: of all methods.
        device: of the models.
        threads: of torch on the CPU, in each process.
        pictures: folder for all pictures; None keeps none.
    """

    model: Path
    judge: Path
    dino: Path | None
    methods: Sequence[str]
    settings: Settings
    device: torch.device
    threads: int
    pictures: Path | None


@dataclass(frozen=True)
class CaseResult:
    """Of one case.

    Attributes:
        case: its id.
        figures: of each method; none where the judge does not see in the photo what is to change.
        generated: the verdict on this project's edit of a picture that the model drew from the same words; None where
            the judge does not see in that picture what is to change, or this project's method is left out.
        seconds: of this project, for a base: ``inverted`` of the photo, ``drawn`` by the model.
    """

    case: str
    figures: list[Figures]
    generated: dict[str, float] | None
    seconds: dict[str, float]


class CaseEditor:
    """Edits one case after the other, by every method."""

    def __init__(self, conditions: Conditions) -> None:
        torch.set_num_threads(conditions.threads)
        pipe = load_pipeline(conditions.model, conditions.device, torch.float32)
        pipe.set_progress_bar_config(disable=True)
        self._pictures, self._judge = conditions.pictures, Judge.load(conditions.judge)
        dino = conditions.dino
        self._features = dino_keys(dino, conditions.device) if dino else judge_features(self._judge)
        self._methods = [METHODS[name](pipe, conditions.settings) for name in conditions.methods]

    def run(self, case: Case) -> CaseResult:
        """All edits of a case."""
        result = CaseResult(case.id, [], None, {})
        photo = rendered(case, self._judge)
        own = next((each for each in self._methods if isinstance(each, FisEdit)), None)
        if photo is not None:
            for method in self._methods:
                result.figures.append(measure(photo, method, self._features, self._pictures))
                if method is own:
                    result.seconds["inverted"] = method.base_seconds
        if own is not None:
            before, after = own.edit_generated(case.prompt, case.edit, case.seed)
            result.seconds["drawn"] = own.base_seconds
            if shows(self._judge.look(before, case.before), case.before, case.changed):
                result = replace(result, generated=_verdict(case, self._judge, before, after))
        return result


def run_cases(conditions: Conditions, cases: Sequence[Case], workers: int) -> Iterator[CaseResult]:
    """The results of all cases, as they are there.

    Raises:
        BrokenProcessPool: a process has died.
    """
    if workers == 1:
        yield from map(CaseEditor(conditions).run, cases)
        return
    spawn = multiprocessing.get_context("spawn")  # a process that used CUDA cannot be forked
    with ProcessPoolExecutor(workers, spawn, _begin, (conditions, spawn.Value("i", 0))) as pool:
        try:
            for done in as_completed([pool.submit(_run, case) for case in cases]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def rendered(case: Case, judge: Judge) -> PhotoCase | None:
    """A case as a photo; None where the judge does not see in it what is to change."""
    before, after = (render(each, case.seed) for each in (case.before, case.after))
    photo = as_picture(before)
    if not shows(judge.look(photo, case.before), case.before, case.changed):
        return None
    differs = (before - after).abs().amax(0) > 1 / 255
    differs = grown(differs[None], _RIM)[0]
    return PhotoCase(
        case.id, photo, case.prompt, case.edit, ~differs, lambda picture: _verdict(case, judge, photo, picture)
    )


def _verdict(case: Case, judge: Judge, before: Image.Image, after: Image.Image) -> dict[str, float]:
    verdict = judge_edit(judge.look(before, case.before), judge.look(after, case.after), case)
    return {"success": float(verdict.success), "right": float(verdict.right)}


_EDITOR: CaseEditor | None = None  # of this process, if it is a worker


def _begin(conditions: Conditions, begun: Any) -> None:
    global _EDITOR
    _EDITOR = CaseEditor(replace(conditions, device=device_of_worker(conditions.device, begun)))


def _run(case: Case) -> CaseResult:
    assert _EDITOR is not None
    return _EDITOR.run(case)
