"""How long the control of the dense edit lasts that counts as the best one of a kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from fisedit_compile.quality.verdicts import Verdict


@dataclass(frozen=True)
class ControlScore:
    """Dense edits of one kind by one length of control.

    Attributes:
        control: share of the steps.
        success, wrong, right: shares of the cases, as :class:`~fisedit_compile.quality.verdicts.Verdict` has them.
        ssim_to_base: structural similarity of the whole picture to the base, mean.
    """

    control: float
    success: float
    wrong: float
    right: float
    ssim_to_base: float


@dataclass(frozen=True)
class JudgedDense(Verdict):
    """The verdict on one dense edit, and its SSIM to its base."""

    ssim_to_base: float


def score_control(control: float, edits: Sequence[JudgedDense]) -> ControlScore:
    """The scores of some edits by one length of control; at least one."""
    return ControlScore(
        control=control,
        success=mean(each.success for each in edits),
        wrong=mean(each.wrong for each in edits),
        right=mean(each.right for each in edits),
        ssim_to_base=mean(each.ssim_to_base for each in edits),
    )


def choose_control(scores: Sequence[ControlScore]) -> float:
    """The length with the most edits that are right; of several, the one that stays nearest to the base.

    Control is there to keep what the words do not change, so among lengths that change the right thing equally often
    the closest is the best.
    """
    return max(scores, key=lambda score: (score.right, score.ssim_to_base)).control
