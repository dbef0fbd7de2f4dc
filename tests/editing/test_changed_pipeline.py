"""What users exchange between a base and an edit is followed, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from support.pipelines import CONFIG, EDIT, PROMPT, arguments, generate, left_half, tiny_pipeline
from support.unets import UNets
from tokenizers.normalizers import Replace

from fisedit_compile import Base, BaseMismatchError, Editor

pytestmark = pytest.mark.usefixtures("one_thread")


def other_tokenizer(pipe: Any) -> None:
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.backend_tokenizer.normalizer = Replace("cat", "apple")


def other_weights(name: str) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        module = copy.deepcopy(getattr(pipe, name))
        next(module.parameters()).data.mul_(1.5)
        setattr(pipe, name, module)

    return change


def other_tables(pipe: Any) -> None:
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    pipe.scheduler.alphas_cumprod *= 0.9


def other_scheduler(pipe: Any) -> None:
    pipe.scheduler = EulerDiscreteScheduler()


def other_option(pipe: Any) -> None:
    pipe.scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, beta_end=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_scheduler,
            r"the scheduler is another one \(EulerDiscreteScheduler, not DDIMScheduler\) than for the base",
        ),
        (other_option, "the scheduler DDIMScheduler has another beta_end than for the base: restore pipe.scheduler"),
        (other_tables, "the scheduler DDIMScheduler has other alphas_cumprod than for the base"),
        (other_weights("text_encoder"), r"with another text_encoder \(.*weights of .*\): restore it"),
        (other_weights("vae"), r"with another vae \(.*weights of .*\): restore it"),
        (other_tokenizer, r"with another tokenizer \(it makes other tokens of the base's prompts\): restore it"),
    ],
    ids=["scheduler", "option", "tables", "text encoder", "vae", "tokenizer"],
)
def test_what_an_edit_is_refused_after(
    tiny_editor: Editor, tiny_base: Base, change: Callable[[Any], None], message: str
) -> None:
    pipe = tiny_editor.pipe
    names = ("scheduler", "text_encoder", "vae", "tokenizer")
    before = {name: getattr(pipe, name) for name in names}
    try:
        change(pipe)
        with pytest.raises(BaseMismatchError, match=message):
            tiny_editor.edit(tiny_base, EDIT, left_half())
        plain = pipe(PROMPT, output_type="latent", **arguments()).images
        assert torch.equal(generate(tiny_editor).latents, plain)  # a new base is made with it
    finally:
        for name, part in before.items():
            setattr(pipe, name, part)
    assert tiny_editor.edit(tiny_base, EDIT, left_half()).report.background_identical


def test_another_unet() -> None:
    editor = Editor(tiny_pipeline(), CONFIG)
    old = generate(editor)
    first = editor.pipe.unet
    torch.manual_seed(1)
    other = UNets.fresh("micro", torch.float32)
    other.conv_in.weight.data.mul_(1.5)
    editor.pipe.unet = other
    plain = editor.pipe(PROMPT, output_type="latent", **arguments()).images
    new = generate(editor)
    assert torch.equal(new.latents, plain)
    assert not torch.equal(new.latents, old.latents)
    with pytest.raises(BaseMismatchError, match=r"with another U-Net \(weights of conv_in"):
        editor.edit(old, EDIT, left_half())
    editor.pipe.unet = first
    assert editor.edit(old, EDIT, left_half()).report.background_identical


def test_what_makes_no_difference_to_the_latents(tiny_editor: Editor, tiny_base: Base) -> None:
    """A twin of the scheduler, and one that a plain call has left in the middle of its steps."""
    pipe, scheduler = tiny_editor.pipe, tiny_editor.pipe.scheduler
    want = tiny_editor.edit(tiny_base, EDIT, left_half()).latents
    try:
        pipe.scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
        pipe(PROMPT, **arguments(num_inference_steps=7))
        assert torch.equal(tiny_editor.edit(tiny_base, EDIT, left_half()).latents, want)
    finally:
        pipe.scheduler = scheduler


def test_a_tokenizer_that_is_changed_where_it_is(tiny_editor: Editor, tiny_base: Base) -> None:
    tokenizer = tiny_editor.pipe.tokenizer
    tokenizer.backend_tokenizer.normalizer = Replace("cat", "apple")
    try:
        with pytest.raises(BaseMismatchError, match="another tokenizer"):
            tiny_editor.edit(tiny_base, EDIT, left_half())
        plain = tiny_editor.pipe(PROMPT, output_type="latent", **arguments()).images
        assert torch.equal(generate(tiny_editor).latents, plain)
    finally:
        tokenizer.backend_tokenizer.normalizer = Replace("", "")
    assert torch.equal(generate(tiny_editor).latents, tiny_base.latents)
