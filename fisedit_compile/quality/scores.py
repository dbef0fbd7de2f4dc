"""The figures of each case: what the judge says, how well the mask fits, and how near the picture is to the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from fisedit_compile.quality.cases import KINDS, Case
from fisedit_compile.quality.clip_scores import Clip, ClipFigures
from fisedit_compile.quality.control_choice import ControlScore, JudgedDense, choose_control, score_control
from fisedit_compile.quality.frechet import frechet_distance
from fisedit_compile.quality.judge import Judge, Sight
from fisedit_compile.quality.regions import MaskScores, changed_cells, enlarge, score_mask
from fisedit_compile.quality.runs import CaseRun, VariantEdit
from fisedit_compile.quality.similarity import as_pixels, psnr_inside, seam_excess, ssim_inside
from fisedit_compile.quality.ssim import ssim
from fisedit_compile.quality.verdicts import Verdict, judge_edit, shows
from fisedit_compile.utils.single_thread import single_thread

_Scored = TypeVar("_Scored")


@dataclass(frozen=True)
class VariantScores:
    """One variant's edit of one case.

    Attributes:
        mask: against the true region; None where the best dense edit changes nothing.
        mask_area: share of the picture.
        ssim_inside, psnr_inside: within the mask, against the dense U-Net under the same mask; PSNR in dB.
        ssim_to_best: of the whole picture, against the best dense edit.
        seam, seam_under_mask: gradient excess along the mask's border over the best dense edit, of ours and of the
            dense U-Net under the mask, in levels of 8 bits.
        latents_equal, far_pixels_equal: see :class:`~fisedit_compile.quality.runs.VariantEdit`.
        verdict, verdict_under_mask: the judge's, on ours and on the dense U-Net under the mask.
        clip: by CLIP; None without a model of it.
    """

    mask: MaskScores | None
    mask_area: float
    ssim_inside: float
    psnr_inside: float
    ssim_to_best: float
    seam: float
    seam_under_mask: float
    latents_equal: bool
    far_pixels_equal: float
    verdict: Verdict
    verdict_under_mask: Verdict
    clip: ClipFigures | None


@dataclass(frozen=True)
class CaseScores:
    """One case.

    Attributes:
        case: the case.
        base_shown: whether the judge sees in the base, where the change is to be, what the words say. Without that an
            edit has nothing to change, so the judge's figures leave such a case out.
        best_control: length of control of the best dense edit of this kind.
        true_area: share of the cells that it changes.
        dense: length of control -> the dense edit, judged.
        clip_best_dense: the best dense edit by CLIP; None without a model of it.
        variants: name -> scores.
    """

    case: Case
    base_shown: bool
    best_control: float
    true_area: float
    dense: Mapping[float, JudgedDense]
    clip_best_dense: ClipFigures | None
    variants: Mapping[str, VariantScores]


@dataclass(frozen=True)
class Scores:
    """All cases, and for each kind the dense edits by length of control.

    Attributes:
        fid: name of a variant -> FID over CLIP features of all its edits and the best dense ones; empty without a model
            of it, and None for a single case.
    """

    cases: Sequence[CaseScores]
    controls: Mapping[str, Sequence[ControlScore]]
    best_control: Mapping[str, float]
    fid: Mapping[str, float | None] = field(default_factory=dict)


def score_runs(runs: Sequence[CaseRun], judge: Judge, clip: Clip | None = None, *, threads: int = 1) -> Scores:
    """Score all cases; which dense edit is the best of a kind is decided by all of the kind that are here.

    Args:
        runs: the pictures.
        judge: says what they show.
        clip: for the paper's figures; None leaves them out.
        threads: cases that are scored at a time; several of them take a processor each.
    """

    def alone(score: Callable[[CaseRun], _Scored]) -> Callable[[CaseRun], _Scored]:
        return single_thread()(score) if threads > 1 else score

    sights = {run.case.id: judge.look(run.base, run.case.before) for run in runs}

    def judged(run: CaseRun) -> dict[float, JudgedDense]:
        return _judged_dense(run, judge, sights[run.case.id])

    with ThreadPoolExecutor(threads) as pool:
        dense = {run.case.id: each for run, each in zip(runs, pool.map(alone(judged), runs), strict=True)}
    shown = {run.case.id: shows(sights[run.case.id], run.case.before, run.case.changed) for run in runs}
    controls: dict[str, list[ControlScore]] = {}
    for kind in KINDS:
        ids = [run.case.id for run in runs if run.case.kind == kind]
        counted = [each for each in ids if shown[each]] or ids
        if ids:
            lengths = dense[ids[0]]
            controls[kind] = [score_control(length, [dense[each][length] for each in counted]) for length in lengths]
    best = {kind: choose_control(scores) for kind, scores in controls.items()}

    def scored(run: CaseRun) -> CaseScores:
        case, control = run.case, best[run.case.kind]
        region = changed_cells(run.base_latents, run.dense[control].latents)
        return CaseScores(
            case=case,
            base_shown=shown[case.id],
            best_control=control,
            true_area=float(region.float().mean()),
            dense=dense[case.id],
            clip_best_dense=_by_clip(clip, run, run.dense[control].picture),
            variants={
                name: _score_variant(run, edit, control, region, judge, sights[case.id], clip)
                for name, edit in run.variants.items()
            },
        )

    with ThreadPoolExecutor(threads) as pool:
        cases = list(pool.map(alone(scored), runs))
    return Scores(cases, controls, best, _fid(runs, best, clip) if clip else {})


def _judged_dense(run: CaseRun, judge: Judge, before: Sight) -> dict[float, JudgedDense]:
    judged = {}
    for control, edit in run.dense.items():
        verdict = judge_edit(before, judge.look(edit.picture, run.case.after), run.case)
        judged[control] = JudgedDense(verdict.success, verdict.wrong, ssim(run.base, edit.picture))
    return judged


def _score_variant(
    run: CaseRun,
    edit: VariantEdit,
    control: float,
    region: torch.Tensor,
    judge: Judge,
    before: Sight,
    clip: Clip | None,
) -> VariantScores:
    best = run.dense[control].picture
    ours, under, reference = (as_pixels(each) for each in (edit.picture, edit.under_mask, best))
    inside = enlarge(edit.mask, (ours.shape[1], ours.shape[2]))
    return VariantScores(
        mask=score_mask(edit.mask, region),
        mask_area=float(edit.mask.float().mean()),
        ssim_inside=ssim_inside(ours, under, inside),
        psnr_inside=psnr_inside(ours, under, inside),
        ssim_to_best=ssim(edit.picture, best),
        seam=seam_excess(ours, reference, inside, edit.reach),
        seam_under_mask=seam_excess(under, reference, inside, edit.reach),
        latents_equal=edit.latents_equal,
        far_pixels_equal=edit.far_pixels_equal,
        verdict=judge_edit(before, judge.look(edit.picture, run.case.after), run.case),
        verdict_under_mask=judge_edit(before, judge.look(edit.under_mask, run.case.after), run.case),
        clip=_by_clip(clip, run, edit.picture),
    )


def _fid(runs: Sequence[CaseRun], best: Mapping[str, float], clip: Clip) -> dict[str, float | None]:
    reference = clip.features([run.dense[best[run.case.kind]].picture for run in runs])
    names = runs[0].variants
    edits = {name: clip.features([run.variants[name].picture for run in runs]) for name in names}
    return {name: frechet_distance(features, reference) for name, features in edits.items()}


def _by_clip(clip: Clip | None, run: CaseRun, picture: Any) -> ClipFigures | None:
    return clip.score(run.base, picture, run.case.prompt, run.case.edit) if clip else None
