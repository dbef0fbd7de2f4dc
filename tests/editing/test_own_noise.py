"""A scheduler whose noise an edit could not repeat is refused at its first step."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from support.pipelines import EDIT, STEPS, generate, left_half

from fisedit_compile import Editor

pytestmark = pytest.mark.usefixtures("one_thread")


class NoisyScheduler(diffusers.DDIMScheduler):
    """Adds noise from torch's default generator, which no caller can rewind."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        latents, *rest = super().step(*args, **kwargs)
        return (latents + 0.1 * torch.randn(latents.shape), *rest)


@pytest.fixture
def pipe(tiny_editor: Editor) -> Any:
    before = tiny_editor.pipe.scheduler
    yield tiny_editor.pipe
    tiny_editor.pipe.scheduler = before


def test_noise_of_the_default_generator(tiny_editor: Editor, pipe: Any) -> None:
    pipe.scheduler = NoisyScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"NoisyScheduler draws noise that .* no edit could repeat it: take another"):
        generate(tiny_editor)


@pytest.mark.parametrize(
    "name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler", "DPMSolverMultistepScheduler"]
)
def test_noise_of_the_pipelines_generator_is_repeated(tiny_editor: Editor, pipe: Any, name: str) -> None:
    options = {"algorithm_type": "sde-dpmsolver++"} if name == "DPMSolverMultistepScheduler" else {}
    pipe.scheduler = getattr(diffusers, name)(**options)
    base = generate(tiny_editor, generator=[torch.Generator().manual_seed(5)])
    first, again = (tiny_editor.edit(base, EDIT, left_half()) for _ in range(2))
    assert torch.equal(first.latents, again.latents)
    plain = generate(tiny_editor, generator=torch.Generator().manual_seed(5))
    assert torch.equal(base.latents, plain.latents)  # the first step, made twice, drew its noise once


def test_noise_of_a_brownian_tree(tiny_editor: Editor, pipe: Any) -> None:
    pytest.importorskip("torchsde")
    pipe.scheduler = diffusers.DPMSolverSDEScheduler()
    with pytest.raises(ValueError, match=r"DPMSolverSDEScheduler draws noise .*: set its noise_sampler_seed"):
        generate(tiny_editor)
    pipe.scheduler = diffusers.DPMSolverSDEScheduler(noise_sampler_seed=0)
    base = generate(tiny_editor)
    assert base.num_inference_steps == 2 * STEPS - 1
    first, again = (tiny_editor.edit(base, EDIT, left_half()) for _ in range(2))
    assert torch.equal(first.latents, again.latents)
