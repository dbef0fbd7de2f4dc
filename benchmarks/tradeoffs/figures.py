"""The figures of one edited picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fisedit_compile.quality.clip_scores import Clip
from fisedit_compile.quality.judge import Judge
from fisedit_compile.quality.similarity import as_pixels, psnr_inside
from fisedit_compile.quality.verdicts import judge_edit, shows
from tradeoffs.pictures import CasePictures


@dataclass(frozen=True)
class Figures:
    """Of one edit by one method with one value of its parameter.

    Attributes:
        setting: name of the :class:`~tradeoffs.curves.Setting`.
        case: id of the case.
        judged: whether the judge sees in the base what the words say is to change; only then its verdicts count.
        success, wrong: see :class:`~fisedit_compile.quality.verdicts.Verdict`.
        image_similarity, directional_similarity, follows: see
            :class:`~fisedit_compile.quality.clip_scores.ClipFigures`.
        equal: share of the pixels outside the region that the dense edit changes which are the base's, bit for bit.
        psnr: of these pixels, in dB; at most 54. Both are None where the dense edit changes everything.
        seconds: of the edit, from words (and picture) to pixels.
        calls: of the U-Net.
    """

    setting: str
    case: str
    judged: bool
    success: bool
    wrong: bool
    image_similarity: float
    directional_similarity: float
    follows: bool
    equal: float | None
    psnr: float | None
    seconds: float
    calls: int


class Measure:
    """Holds edits of a case to its pictures.

    Args:
        pictures: of the case.
        judge, clip: that look at edits.
    """

    def __init__(self, pictures: CasePictures, judge: Judge, clip: Clip) -> None:
        self._pictures, self._judge, self._clip = pictures, judge, clip
        case = pictures.case
        self._before = judge.look(pictures.base, case.before)
        self.judged = shows(self._before, case.before, case.changed)

    def __call__(self, setting: str, picture: Any, seconds: float, calls: int) -> Figures:
        """The figures of an edit, a PIL image.

        Raises:
            ValueError: a picture of another size than the base's.
        """
        pictures, case = self._pictures, self._pictures.case
        if picture.size != pictures.base.size:
            raise ValueError(f"a picture of {picture.size} of a base of {pictures.base.size}")
        verdict = judge_edit(self._before, self._judge.look(picture, case.after), case)
        by_clip = self._clip.score(pictures.base, picture, case.prompt, case.edit)
        before, after, outside = as_pixels(pictures.base), as_pixels(picture), pictures.outside
        some = bool(outside.any())
        return Figures(
            setting=setting,
            case=case.id,
            judged=self.judged,
            success=verdict.success,
            wrong=verdict.wrong,
            **vars(by_clip),
            equal=float((after == before).all(0)[outside].float().mean()) if some else None,
            psnr=psnr_inside(after, before, outside) if some else None,
            seconds=seconds,
            calls=calls,
        )
