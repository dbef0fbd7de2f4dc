"""What a load test found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fisedit_compile.bench.serving.clients import Outcome
from fisedit_compile.quality.judge import Judge
from fisedit_compile.quality.verdicts import shows
from fisedit_compile.serving.picture_files import of_png


def summarise(outcomes: Sequence[Outcome], wall_seconds: float, judge: Judge | None) -> dict[str, Any]:
    """Counts, times and what was reused.

    Args:
        outcomes: of all requests.
        wall_seconds: of all of them together.
        judge: says what pictures show; None where there is none.

    Returns:
        A dict for JSON. Latencies in seconds are of all answers and of each kind of reuse; ``beyond_drawing`` is what
        the service adds to the time in which a picture is computed, with the wait for others where several are asked
        for at once. Shares of pictures that show all that was asked for are of all, of those that were to change
        another, and of edits; of the latter two also the shares that show what was to change. Edits are also counted by
        how many were made together.
    """
    answers = [each for each in outcomes if not each.error]
    kinds = Counter(each.picture["reuse"]["kind"] for each in answers)
    by_kind = {kind: [each for each in answers if each.picture["reuse"]["kind"] == kind] for kind in sorted(kinds)}
    edits = by_kind.get("edit", [])
    changes = [each for each in answers if each.asked.changed]
    areas = [each.picture["reuse"]["mask_area"] for each in edits]
    return {
        "requests": len(outcomes),
        "answered": len(answers),
        "errors": [each.error for each in outcomes if each.error],
        "refused": sum(each.refused for each in outcomes),
        "wall_seconds": wall_seconds,
        "requests_per_second": len(answers) / wall_seconds,
        "latency": {
            kind: latencies(each.seconds for each in some) for kind, some in {"all": answers, **by_kind}.items()
        },
        "beyond_drawing": latencies(each.seconds - each.picture["seconds"] for each in answers),
        "reused": dict(kinds),
        "made_together": Counter(each.picture["report"].get("made_together", 1) for each in edits),
        "ran_dense": sum(each.picture["report"]["ran_dense"] for each in edits),
        "mask_area": float(np.mean(areas)) if areas else None,
        "why_new": Counter(_short(each.picture["reuse"]["why"]) for each in by_kind.get("none", [])),
        "shows_what_was_asked": success(answers, judge) if judge else None,
        "of_changes": success(changes, judge) if judge else None,
        "of_edits": success(edits, judge) if judge and edits else None,
        "what_changes": success_of_changes(changes, judge) if judge else None,
        "what_edits_change": success_of_changes(edits, judge) if judge and edits else None,
    }


def compare_success(ours: Sequence[Outcome], theirs: Sequence[Outcome], judge: Judge) -> dict[str, Any]:
    """Shares of pictures that show what was asked for: of all, of changes, and of those that the service made as edits.

    Of changes there is beside the share that shows all of it the one that shows what was to change, which is what
    ``fisedit-compile quality`` calls success: an edit keeps what its base has wrong, and a new picture may have that
    right.

    Args:
        ours, theirs: of a service and of its opponent, of the same requests in any order.
        judge: says what pictures show.
    """
    ours, theirs = ([each for each in side if not each.error] for side in (ours, theirs))
    edited = {_request(each) for each in ours if each.picture["reuse"]["kind"] == "edit"}
    groups: dict[str, Callable[[Outcome], bool]] = {
        "all": lambda _: True,
        "changes": lambda each: bool(each.asked.changed),
        "edited": lambda each: _request(each) in edited,
    }
    shares: dict[str, Any] = {}
    for name, chosen in groups.items():
        some = {"service": [*filter(chosen, ours)], "opponent": [*filter(chosen, theirs)]}
        shares[name] = {
            "requests": len(some["service"]),
            **{who: success(of, judge) for who, of in some.items()},
            **{f"{who}_what_changes": success_of_changes(of, judge) for who, of in some.items()},
        }
    return shares


def _request(outcome: Outcome) -> tuple[str, int | None]:
    return outcome.asked.prompt, outcome.asked.seed


def latencies(times: Iterable[float]) -> dict[str, float]:
    """Mean and percentiles of seconds; nothing of none."""
    seconds = list(times)
    if not seconds:
        return {}
    return {"mean": float(np.mean(seconds)), **{f"p{at}": float(np.percentile(seconds, at)) for at in (50, 95, 99)}}


def success(outcomes: Sequence[Outcome], judge: Judge) -> float:
    """Share of the pictures in which all stands where it should."""
    seen = [(judge.look(of_png(each.png), each.asked.scene), each.asked.scene) for each in outcomes]
    right = [sight.items == dict(scene.items) and sight.background == scene.background for sight, scene in seen]
    return sum(right) / max(len(right), 1)


def success_of_changes(outcomes: Sequence[Outcome], judge: Judge) -> float | None:
    """Share of the pictures that show what they change of another one; None where none does."""
    right = [
        shows(judge.look(of_png(each.png), each.asked.scene), each.asked.scene, each.asked.changed)
        for each in outcomes
        if each.asked.changed
    ]
    return sum(right) / len(right) if right else None


def _short(why: str) -> str:
    """The reason without its numbers."""
    return "".join(letter for letter in why if not letter.isdigit())
