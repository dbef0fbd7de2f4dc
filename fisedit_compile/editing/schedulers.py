"""Schedulers of diffusers that models of Stable Diffusion can be drawn with, by name."""

from __future__ import annotations

from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

#: What diffusers lists as exchangeable, and two for few steps. EDM's is among them, and left out: it scales latents and
#: timesteps for models that were trained so, and draws noise with all others.
SCHEDULERS = (
    *(each.name for each in KarrasDiffusionSchedulers if each.name != "EDMEulerScheduler"),
    "LCMScheduler",
    "TCDScheduler",
)
