"""Timesteps on the host: schedulers read the value of one several times a step, and each time wait for its device."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

#: Schedulers to which a timestep says which entries of their tables to take, and nothing else, and whose tables lie on
#: the host whatever the device of the timesteps: the same bits come out.
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


def keep_on_host(scheduler: Any) -> None:
    """Let the timesteps of a scheduler of :data:`SCHEDULERS` lie on the host, on whatever device they are asked for.

    Args:
        scheduler: of one call of a pipeline; it is changed.
    """
    if type(scheduler).__name__ not in SCHEDULERS:
        return
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)  # pipelines read the signature
    def set_on_host(num_inference_steps: int | None = None, device: Any = None, **kwargs: Any) -> None:
        set_timesteps(num_inference_steps, device="cpu", **kwargs)

    scheduler.set_timesteps = set_on_host


def on_device(timestep: Any, device: torch.device) -> Any:
    """A timestep where models want it; nothing waits for the copy."""
    return timestep.to(device, non_blocking=True) if isinstance(timestep, Tensor) else timestep
