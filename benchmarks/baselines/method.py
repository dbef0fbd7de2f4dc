"""What every method of the table has: how it is prepared, run, counted and closed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from baselines.calls import CallLog, CountedUNet
from baselines.models import Kit
from baselines.task import Task
from baselines.trained import TrainedKit


class NotInstalledError(Exception):
    """A package that a method needs is not installed; the message says how to install it."""


@dataclass(frozen=True)
class CallCount:
    """The U-Net calls of one kind in a run, for all of its pictures together.

    Attributes:
        kind: what is called, for people.
        calls: the number of calls.
        macs: the multiply-accumulates of all of them together.
        milliseconds: the median time of one of them; None if it was not measured.
    """

    kind: str
    calls: int
    macs: int
    milliseconds: float | None = None


class Method:
    """One way to make a picture, ready to run. Each measurement makes a new one.

    A kit of random weights is for timing and counting by :meth:`run`, one of trained weights for :meth:`edit`.

    Class attributes:
        title: the method's name in the table.
        source: the paper, and whose implementation this is.
        needs_training: whether the method needs a U-Net that was trained for it.
        edits_part: whether the rest of the picture is kept by construction.

    Attributes:
        pipe: the pipeline whose U-Net the method calls.
    """

    title: str
    source: ClassVar[str]
    needs_training: ClassVar[bool] = False
    edits_part: ClassVar[bool] = False

    pipe: Any
    #: Pictures that one run makes.
    images: int = 1
    #: Denoising steps of the current run.
    steps: int = 0

    def __init__(self, kit: Kit | TrainedKit) -> None:
        self.kit = kit

    @property
    def unet(self) -> torch.nn.Module:
        """The module whose calls are counted and timed."""
        unet: torch.nn.Module = self.pipe.unet
        return unet

    def prepare(self, steps: int) -> None:
        """Do what comes before an edit and is no part of its time; by default nothing."""

    def warm_up(self, steps: int) -> None:
        """Run a few steps that are not timed, so that libraries choose their kernels and compilers compile."""
        self.run(min(steps, 4))

    def run(self, steps: int) -> Any:
        """Make :attr:`images` pictures in ``steps`` denoising steps."""
        self.steps = steps
        return self.make()

    def make(self) -> Any:
        """Make the pictures of one run: the edit that the kit asks for."""
        assert isinstance(self.kit, Kit)
        return self.edit(self.kit.task)

    def edit(self, task: Task) -> Any:
        """Make one edit in :attr:`steps` denoising steps, a PIL image; subclasses say how."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what would outlive the method; by default there is nothing."""

    def kind(self, index: int) -> str:
        """The kind of the call at position ``index`` of a run, see :class:`baselines.calls.CallKey`."""
        return ""

    def count(self, steps: int) -> list[CallCount]:
        """Run with a U-Net that only counts (``kit.counting``), and return its calls by kind."""
        assert isinstance(self.unet, CountedUNet)
        self.prepare(steps)
        with CallLog(self.unet, self.kind) as log:
            self.run(steps)
        times = Counter(log.keys)
        return [CallCount(str(key), number, number * self.unet.macs[key]) for key, number in times.items()]
