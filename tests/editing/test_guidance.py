"""Pipelines whose guidance is not in two parts, and pipelines without the first text encoder."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from support.pipelines import CONFIG, EDIT, PROMPT, STEPS, tiny_pipeline
from support.unets import MICRO

from fisedit_compile import CaptureError, Editor
from fisedit_compile.runtime.control import Control
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pix2pix() -> Editor:
    """InstructPix2Pix: its U-Net takes the picture's latents beside its own, and guidance has three parts."""
    torch.manual_seed(0)
    parts = tiny_pipeline().components
    parts.pop("image_encoder", None)
    parts["unet"] = diffusers.UNet2DConditionModel(**{**MICRO, "in_channels": 8}).eval()
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return Editor(pipe, {**CONFIG, "cross_replace": 1.0})


def arguments(pictures: int, **changes: Any) -> dict[str, Any]:
    image = torch.rand(pictures, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    generator = [torch.Generator().manual_seed(seed) for seed in range(pictures)]
    return {"image": image, "num_inference_steps": STEPS, "guidance_scale": 5.0, "generator": generator, **changes}


@pytest.mark.parametrize("pictures", [1, 2])
def test_three_parts_with_the_text_first(pix2pix: Editor, pictures: int) -> None:
    prompts = [PROMPT] * pictures
    base = pix2pix.generate(prompts, **arguments(pictures))
    plain = pix2pix.pipe(prompts, output_type="latent", **arguments(pictures)).images
    assert torch.equal(base.latents, plain)
    maps = next(value for entry, value in base.calls[0].cache.items() if entry.kind == "attention")
    assert len(maps) == pictures * base.latents[0, 0].numel()
    edit = pix2pix.edit(base, [EDIT] * pictures)
    assert edit.report.background_identical
    assert not torch.equal(edit.latents, base.latents)


def test_the_maps_are_those_of_the_words(pix2pix: Editor) -> None:
    """A controlled call that keeps all of its own maps is the dense call; other maps change the text's part alone."""
    unet = pix2pix.unet
    torch.manual_seed(0)
    own = unet.call(torch.randn(3, 8, 16, 16), torch.tensor(500), torch.randn(3, 8, MICRO["cross_attention_dim"]))
    _, kept = unet.record(own, samples=1, part=0, activations=False, attention=True)
    keep_all = (torch.eye(8)[None], torch.ones(1, 8))
    out = unet.controlled(own, kept, Control(*keep_all, part=0))
    assert_close(out, unet.dense(own).detach())
    _, others = unet.record(own, samples=1, part=-1, activations=False, attention=True)
    changed = unet.controlled(own, others, Control(*keep_all, part=0)) - out
    assert changed[0].abs().max() > 1e-4
    assert changed[1:].abs().max() < 1e-6


def test_guidance_of_other_parts_is_refused_before_anything_is_recorded(
    pix2pix: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline that claims guidance and calls its U-Net without."""
    monkeypatch.setattr(type(pix2pix.pipe), "do_classifier_free_guidance", True)
    call = pix2pix.unet.call(
        torch.randn(1, 8, 16, 16), torch.tensor(1), torch.randn(1, 8, MICRO["cross_attention_dim"])
    )
    from fisedit_compile.editing.own_tokenizers import OwnTokenizers
    from fisedit_compile.editing.record_run import RecordRun

    run = RecordRun(pix2pix.unet, pix2pix.pipe, OwnTokenizers(), None, pix2pix.config, {})
    with pytest.raises(CaptureError, match="with a batch of 1, which is not the 3 parts of its guidance"):
        run.parts(call)
