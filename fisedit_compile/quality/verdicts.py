"""What the judge sees, held to what a case asks for."""

from __future__ import annotations

from dataclasses import dataclass

from fisedit_compile.quality.cases import Case, Item, Scene
from fisedit_compile.quality.judge import Sight


@dataclass(frozen=True)
class Verdict:
    """Of one edited picture.

    Attributes:
        success: what changes is seen as the new words say: name, colour and accessory of the object, or background.
        wrong: an object that should stay is seen as another, in another colour, or wearing something else than in the
            base.
    """

    success: bool
    wrong: bool

    @property
    def right(self) -> bool:
        """Whether the edit is as it should be."""
        return self.success and not self.wrong


def shows(sight: Sight, scene: Scene, place: str) -> bool:
    """Whether what is seen at a place, or as ``"background"``, is what a scene has there."""
    if place == "background":
        return sight.background == scene.background
    return _alike(sight.items[place], scene.items[place])


def judge_edit(before: Sight, after: Sight, case: Case) -> Verdict:
    """The verdict on an edit of ``case`` that turned a base seen as ``before`` into what is seen as ``after``."""
    stays = [place for place in case.after.items if place != case.changed]
    return Verdict(
        success=shows(after, case.after, case.changed),
        wrong=not all(_alike(after.items[place], before.items[place]) for place in stays),
    )


def _alike(seen: Item, wanted: Item) -> bool:
    return (seen.name, seen.colour, seen.accessory) == (wanted.name, wanted.colour, wanted.accessory)
