"""Edits whose words change nothing that the text encoder sees are refused before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fisedit_compile import Editor, MaskError

MODEL = Path(__file__).parents[2] / "examples" / "demo_model"
CAT = "a cat on a green background"
LONG = " and ".join(["a cat"] * 12)  # 35 words; the text encoder reads 32 tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def editor() -> Editor:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return Editor(pipe, {"dense_below": 8, "dense_steps": 1})


@pytest.fixture(scope="module")
def base(editor: Editor) -> Any:
    generator = torch.Generator().manual_seed(3)
    return editor.generate([CAT, LONG], num_inference_steps=2, height=64, width=64, generator=generator)


@pytest.mark.parametrize("mask", [None, torch.ones(16, 16)], ids=["found", "given"])
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([CAT.capitalize(), "a dog"], "sample 0.*letter case or spaces"),
        (["a dog", LONG.replace(" and", "  And") + " "], "sample 1.*letter case or spaces"),
        (["a dog", LONG[:-3] + "dog"], "sample 1.*only beyond the 32 tokens.*cut off.*dog"),
    ],
)
def test_each_sample_has_to_change(
    editor: Editor,
    base: Any,
    monkeypatch: pytest.MonkeyPatch,
    prompts: list[str],
    message: str,
    mask: torch.Tensor | None,
) -> None:
    monkeypatch.setattr(type(editor.pipe), "encode_prompt", lambda *_, **__: pytest.fail("the pipeline was run"))
    with pytest.raises(MaskError, match=message):
        editor.edit(base, prompts, mask)


def test_the_base_stays_usable(editor: Editor, base: Any) -> None:
    edit = editor.edit(base, ["a dog", "a lion"], torch.ones(16, 16))
    assert not torch.equal(edit.latents, base.latents)
