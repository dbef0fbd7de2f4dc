"""What a base has of one U-Net call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fisedit_compile.cache.step_cache import Recorded


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One U-Net call of the base: the denoising step it belongs to, and what it keeps for edits."""

    step: int
    cache: Recorded

    @property
    def is_in(self) -> bool:
        """Whether what it keeps can be had without waiting."""
        return True

    @property
    def stays_on_disk(self) -> bool:
        """Whether what it keeps is read for each edit anew."""
        return False

    @property
    def nbytes(self) -> int:
        """Memory of what it keeps; none where that stays on the disk."""
        return sum(tensor.nbytes for tensor in self.cache.values())

    @property
    def device(self) -> torch.device | None:
        """Where what it keeps lies; None where that is nothing."""
        return next((tensor.device for tensor in self.cache.values()), None)

    def wait(self) -> None:
        """Wait until all calls of the base are in."""


@dataclass(frozen=True, eq=False)
class WrittenCall(RecordedCall):
    """A call whose values are in a file by now: ``cache`` is empty.

    Attributes:
        entries: what it keeps, as a saved base says it.
        kept_nbytes: how much.
        kept_on: the device that edits read it on.
    """

    entries: list[Any] = field(repr=False)
    kept_nbytes: int
    kept_on: torch.device | None

    @property
    def nbytes(self) -> int:
        return self.kept_nbytes

    @property
    def device(self) -> torch.device | None:
        return self.kept_on
