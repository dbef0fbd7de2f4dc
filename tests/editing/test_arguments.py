"""What a user mistypes is refused in one sentence that names it, before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.pipelines import EDIT, PROMPT, STEPS, arguments

from fisedit_compile import Base, Editor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def refusing(tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch) -> Editor:
    """An editor whose models may not run."""

    def forward(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("computed before it was refused")

    monkeypatch.setattr(tiny_editor.pipe.text_encoder, "forward", forward)
    return tiny_editor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"negative_promt": "x"},
            "negative_promt='x': StableDiffusionPipeline does not take it; did you mean negative_prompt?",
        ),
        ({"num_inference_step": 5}, "did you mean num_inference_steps?"),
        ({"seed": 5}, r"seed=5: .*; give generator=torch.Generator\(\).manual_seed\(5\)"),
        ({"frobnicate": 1}, "frobnicate=1: StableDiffusionPipeline does not take it; leave it out"),
        ({"generator": 3}, r"generator=3: give torch.Generator\(\).manual_seed\(3\)"),
        ({"generator": []}, r"generator=\[\]: give a torch.Generator"),
        ({"generator": [torch.Generator(), 3]}, "give a torch.Generator"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: give a finite number"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf: give a finite number"),
        ({"guidance_scale": None}, "guidance_scale=None: give a finite number"),
        ({"guidance_scale": "5"}, "guidance_scale='5': give a finite number"),
        ({"guidance_scale": True}, "guidance_scale=True: give a finite number"),
        ({"eta": [float("nan")]}, r"eta=\[nan\]: give a finite number"),
        ({"num_inference_steps": "5"}, "num_inference_steps='5': give a whole number of at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: give a whole number of at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5: give a whole number of at least 1"),
        ({"num_inference_steps": None}, "num_inference_steps=None: give a whole number of at least 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0: give a whole number of at least 1"),
        ({"height": "32"}, "height='32': give a whole number of at least 1"),
        ({"width": -8}, "width=-8: give a whole number of at least 1"),
        ({"negative_prompt": 5}, "negative_prompt=5: give a string, a list of strings, or None"),
        ({"latents": [1.0]}, "latents is a list: give a tensor, or None"),
        ({"prompt_embeds": torch.zeros(1, 5, 8)}, "prompt_embeds has 5 tokens where a prompt has 8: give as many, or"),
        ({"return_dict": False}, r"return_dict=False: generate\(...\) returns a Base"),
        ({"callback": print}, "callback=.*: pipelines no longer take it: give callback_on_step_end"),
        ({"output_type": "latent"}, "output_type='latent': give 'pil', 'np' or 'pt'"),
        ({"output_type": "jpeg"}, "output_type='jpeg': give 'pil', 'np' or 'pt'"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is a int: give a function or a callback object"),
        (
            {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["latent"]},
            "StableDiffusionPipeline has no latent to give; it has latents, prompt_embeds",
        ),
        (
            {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": "latents"},
            "callback_on_step_end_tensor_inputs='latents': give a list of names",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_of_generate(refusing: Editor, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refusing.generate(PROMPT, **arguments(**changes))


@pytest.mark.parametrize("prompt", [None, 5, [], [None], [PROMPT, 3], b"a cat"])
def test_what_are_no_prompts(refusing: Editor, tiny_base: Base, prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt=.*: give a string, or a list of strings"):
        refusing.generate(prompt, **arguments())
    with pytest.raises(ValueError, match=r"prompt=.*: give a string, or a list of strings"):
        refusing.edit(tiny_base, prompt)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 32}, "height: an edit repeats what its base was generated with"),
        ({"negative_prompt": 3}, "negative_prompt=3: give a string, a list of strings, or None"),
        ({"guidance_scale": "high"}, "guidance_scale='high': give a finite number"),
        ({"guidance_scale": 1.0}, "guidance_scale=1.0: the base was generated with 5.0, and guidance is off up to 1"),
        ({"prompt_2": "x"}, r"prompt_2='x': edit\(...\) does not take it; did you mean prompt?"),
        ({"num_inference_steps": STEPS}, "num_inference_steps: an edit repeats what its base"),
        ({"masks": None}, r"masks=None: edit\(...\) does not take it; did you mean mask?"),
        ({"seed": 3}, r"seed=3: edit\(...\) does not take it; give generator=torch.Generator"),
        ({"combine": "xor"}, "combine='xor': choose"),
        ({"combine": ["and"]}, r"combine=\['and'\]: choose"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is a int"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_of_edit(refusing: Editor, tiny_base: Base, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refusing.edit(tiny_base, EDIT, **changes)


@pytest.mark.parametrize("base", [None, "a cat", 3])
def test_what_is_no_base(refusing: Editor, base: Any) -> None:
    with pytest.raises(ValueError, match=r"base is of type .*: pass what editor.generate"):
        refusing.edit(base, EDIT)


def test_numbers_of_numpy_are_numbers(tiny_editor: Editor, tiny_base: Base) -> None:
    changes = {"num_inference_steps": np.int64(STEPS), "guidance_scale": np.float32(5.0), "height": None}
    base = tiny_editor.generate(PROMPT, **arguments(**changes))
    assert torch.equal(base.latents, tiny_base.latents)
