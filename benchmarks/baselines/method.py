"""What every method of the table has in common."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from baselines.calls import CallLog, CountedUNet
from baselines.models import Kit


class NotInstalledError(Exception):
    """A method needs a package that is not there; the message says which and how to get it."""


@dataclass(frozen=True)
class CallCount:
    """Calls of one kind, all pictures of a run together.

    Attributes:
        kind: what is called, for people.
        calls: how many.
        macs: multiply-accumulates of all of them.
        milliseconds: median time of one, where it was measured.
    """

    kind: str
    calls: int
    macs: int
    milliseconds: float | None = None


class Method:
    """One way to make a picture, ready to run. Made anew for each measurement.

    Class attributes:
        title: as the table shows it.
        source: the paper, and whose implementation this is.
        needs_training: whether Stable Diffusion's own U-Net will not do.
        edits_part: whether the rest of the picture is kept by construction.
    """

    title: str
    source: ClassVar[str]
    needs_training: ClassVar[bool] = False
    edits_part: ClassVar[bool] = False

    #: Pictures that one run makes.
    images: int = 1
    #: Denoising steps of the current run.
    steps: int = 0

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    @property
    def unet(self) -> torch.nn.Module:
        """The module whose calls are counted."""
        raise NotImplementedError

    def prepare(self, steps: int) -> None:
        """What happens before an edit and is not part of its time."""

    def warm_up(self, steps: int) -> None:
        """Let libraries choose their kernels and compilers compile; not timed."""
        self.run(min(steps, 4))

    def run(self, steps: int) -> Any:
        """Make :attr:`images` pictures in ``steps`` denoising steps."""
        self.steps = steps
        return self.make()

    def make(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what would outlive the method."""

    def kind(self, index: int) -> str:
        """See :class:`baselines.calls.CallKey`; of call ``index`` of a run."""
        return ""

    def count(self, steps: int) -> list[CallCount]:
        """Run with a U-Net that only counts (``kit.counting``), and return what it was called with."""
        assert isinstance(self.unet, CountedUNet)
        self.prepare(steps)
        with CallLog(self.unet, self.kind) as log:
            self.run(steps)
        times = Counter(log.keys)
        return [CallCount(str(key), number, number * self.unet.macs[key]) for key, number in times.items()]
