"""Schedulers of diffusers that models of Stable Diffusion can be drawn with, by name."""

from __future__ import annotations

import difflib
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

#: What diffusers lists as exchangeable, and two for few steps. EDM's is among them, and left out: it scales latents and
#: timesteps for models that were trained so, and draws noise with all others.
SCHEDULERS = (
    *(each.name for each in KarrasDiffusionSchedulers if each.name != "EDMEulerScheduler"),
    "LCMScheduler",
    "TCDScheduler",
)


def scheduler_class(name: str) -> Any:
    """The scheduler of diffusers of this name, of :data:`SCHEDULERS`.

    Raises:
        ValueError: another name; the message has the nearest.
    """
    if name not in SCHEDULERS:
        by_lower = {known.lower(): known for known in SCHEDULERS}
        nearest = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.3)
        hint = f"did you mean {by_lower[nearest[0]]}? " if nearest else ""
        raise ValueError(f"scheduler {name}: {hint}Known are {', '.join(SCHEDULERS)}")
    return getattr(diffusers, name)


def exchange_scheduler(pipe: Any, name: str) -> None:
    """Give a pipeline the scheduler of this name, made of the config of its own; nothing where it has that.

    Raises:
        ValueError: no such scheduler, one that needs a package which is not there, or a model that is drawn with one
            that no other can stand for.
    """
    kind, own = scheduler_class(name), type(pipe.scheduler)
    if own is kind:
        return
    if own.__name__ not in SCHEDULERS:  # one whose config says something else, such as EDM's or flow matching's
        raise ValueError(f"scheduler {name}: the model is drawn with {own.__name__}, which no other can stand for")
    try:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    except ImportError as error:  # one of diffusers' that needs torchsde or scipy
        raise ValueError(f"scheduler {name}: {' '.join(str(error).split())}") from None
