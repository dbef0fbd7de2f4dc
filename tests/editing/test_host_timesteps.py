"""Between two U-Net calls the host reads nothing from the device, which tensors that only claim to be on one tell."""

from __future__ import annotations

import sys
from typing import Any

import diffusers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fisedit_compile.editing.host_timesteps import SCHEDULERS, keep_on_host
from fisedit_compile.editing.stride import SCHEDULERS as STRIDING_SCHEDULERS
from fisedit_compile.editing.stride import StrideError, visit, visited_steps, watch_steps

STEPS = 12

#: UniPC brings its noise levels to the device at each step, which waits whatever the timesteps are.
QUIET = [name for name in SCHEDULERS if name != "UniPCMultistepScheduler"]
STRIDING = [name for name in QUIET if name in STRIDING_SCHEDULERS]


def made(name: str) -> Any:
    options = {"DDPMScheduler": {}, "PNDMScheduler": {"skip_prk_steps": True, "steps_offset": 1}}
    return getattr(diffusers, name)(**options.get(name, {"steps_offset": 1}))


@pytest.fixture
def latents() -> Any:
    """Latents on a GPU that is not there: an operation that would read a value of theirs fails."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(1, 4, 8, 8, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_nothing_but_the_timesteps_lies_elsewhere_without_us(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the steps' arithmetic is the same, wherever the timesteps lie."""
    move = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        back = tensor.is_meta and "cpu" in args  # the meta device has no values to move back
        return torch.empty(tensor.shape, dtype=tensor.dtype) if back else move(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    scheduler = made(name)
    scheduler.set_timesteps(STEPS, device="meta")
    tables = {key: each for key, each in vars(scheduler).items() if isinstance(each, torch.Tensor)}
    assert [key for key, each in tables.items() if each.is_meta] == ["timesteps"]


@pytest.mark.parametrize("name", QUIET)
def test_a_step_waits_for_no_device(name: str, latents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = made(name)
    # Noise that the host draws has to be brought to the device.
    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, **__: latents, raising=False
    )
    keep_on_host(scheduler)
    scheduler.set_timesteps(STEPS, device="cuda")
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep)
        assert scheduler.step(seen, timestep, latents, return_dict=False)[0].device.type == "cuda"


@pytest.mark.parametrize("name", STRIDING)
def test_longer_steps_and_their_correction_wait_for_no_device(name: str, latents: Any) -> None:
    base, edit = made(name), made(name)
    for scheduler in (base, edit):
        keep_on_host(scheduler)
    visits = visited_steps(STEPS, 3)
    visit(edit, STEPS, visits, then=lambda: None)
    steps = watch_steps(base)
    base.set_timesteps(STEPS, device="cuda")
    edit.set_timesteps(len(visits), device="cuda")
    for timestep in base.timesteps:
        base.step(latents, timestep, latents)
    error = StrideError(edit)
    for position, timestep in zip(visits, edit.timesteps, strict=True):
        after = edit.step(latents, timestep, latents, return_dict=False)[0]
        given = steps[position]
        assert (after + error.of(given, after)).device.type == "cuda"


def test_other_schedulers_are_left_as_they_are() -> None:
    scheduler = diffusers.LCMScheduler()  # it multiplies latents with numbers made of the timestep, where that lies
    keep_on_host(scheduler)
    scheduler.set_timesteps(4, device="meta")
    assert scheduler.timesteps.is_meta
