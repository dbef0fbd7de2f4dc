"""Jobs with those who wait for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from fisedit_compile.serving.partial_pictures import StepWatch
from fisedit_compile.serving.requests import Answer, Job, Progress


@dataclass
class Stop:
    """Ends the job that it was given with, from any thread, once or for good (``Engine.interrupt``)."""

    asked: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, eq=False)
class Task:
    """A job, and what whoever waits for it wants to know.

    Attributes:
        job: what to compute.
        stop: ends the computation.
        watch: called at the end of each step, from the thread that computes.
        partial_pictures: how many of these calls bring the picture as it is then.
    """

    job: Job
    stop: Stop = field(default_factory=Stop)
    watch: Callable[[Progress], None] | None = None
    partial_pictures: int = 0

    @property
    def steps(self) -> StepWatch | None:
        """What tells of its steps."""
        return StepWatch(self.watch, self.partial_pictures) if self.watch else None


#: What comes of a task: an answer, or the error for whoever waits.
Made = Answer | Exception
