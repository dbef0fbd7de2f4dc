"""Edits that change more than the prompt: the negative prompt, the guidance scale, SDXL's second prompt."""

from __future__ import annotations

import pytest
import torch
from support.pipelines import EDIT, PROMPT, arguments, generate, left_half

from fisedit_compile import Base, Editor, MaskError
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

CHANGES = [{"negative_prompt": "apple"}, {"guidance_scale": 3.0}, {"guidance_scale": 2.0, "negative_prompt": "a cat"}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_dense_edit_is_what_the_pipeline_draws_with_them(
    tiny_editor: Editor, tiny_base: Base, changes: dict[str, object]
) -> None:
    edit = tiny_editor.edit(tiny_base, EDIT, dense=True, cross_replace=0, background="latents", **changes)
    plain = tiny_editor.pipe(EDIT, output_type="latent", **arguments(**changes)).images
    assert_close(edit.latents, plain)
    without = tiny_editor.edit(tiny_base, EDIT, dense=True, cross_replace=0, background="latents")
    assert not torch.allclose(edit.latents, without.latents)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_prompt_may_stay(tiny_editor: Editor, tiny_base: Base, changes: dict[str, object]) -> None:
    edit = tiny_editor.edit(tiny_base, PROMPT, left_half(), **changes)
    assert edit.report.background_identical
    inside = left_half().expand_as(tiny_base.latents)
    assert not torch.allclose(edit.latents[inside], tiny_base.latents[inside])


def test_values_of_the_base_are_no_change(tiny_editor: Editor, tiny_base: Base) -> None:
    with pytest.raises(ValueError, match="the base's own"):
        tiny_editor.edit(tiny_base, PROMPT, left_half(), guidance_scale=5.0, negative_prompt=None)
    with pytest.raises(MaskError, match="letter case or spaces"):
        tiny_editor.edit(tiny_base, PROMPT + " ", left_half(), guidance_scale=5.0)
    same = tiny_editor.edit(tiny_base, EDIT, left_half(), guidance_scale=5.0)
    assert torch.equal(same.latents, tiny_editor.edit(tiny_base, EDIT, left_half()).latents)


def test_they_are_the_edit_s_alone(tiny_editor: Editor, tiny_base: Base) -> None:
    before = tiny_editor.edit(tiny_base, EDIT, left_half())
    tiny_editor.edit(tiny_base, EDIT, left_half(), guidance_scale=2.0, negative_prompt="apple")
    assert "negative_prompt" not in tiny_base.arguments
    assert torch.equal(tiny_editor.edit(tiny_base, EDIT, left_half()).latents, before.latents)


def test_a_base_without_guidance_stays_without(tiny_editor: Editor) -> None:
    base = generate(tiny_editor, guidance_scale=1.0)
    with pytest.raises(ValueError, match=r"guidance_scale=7.5: the base was generated with 1.0"):
        tiny_editor.edit(base, EDIT, left_half(), guidance_scale=7.5)
