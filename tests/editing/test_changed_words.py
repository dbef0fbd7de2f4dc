"""Edits that change more than the prompt: the negative prompt, the guidance scale, SDXL's second prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.pipelines import EDIT, PROMPT, arguments, generate, left_half

from fisedit_compile import Base, Editor, MaskError
from fisedit_compile.testing import assert_close, relative_error

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


@pytest.mark.parametrize("mask", [None, left_half()], ids=["found", "given"])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_samples_whose_prompts_stay_are_the_base_s(tiny_editor: Editor, mask: torch.Tensor | None, dense: bool) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    base = generate(tiny_editor, [PROMPT, "an apple", PROMPT], generator=generators)
    edit = tiny_editor.edit(base, [EDIT, "an apple", EDIT], mask, dense=dense)
    assert torch.equal(edit.latents[1], base.latents[1])
    assert not edit.mask[1].any()
    assert np.array_equal(edit.images[1], base.images[1])
    alone = tiny_editor.edit(base, [EDIT, "a cat on the apple", EDIT], mask, dense=dense)
    for sample in (0, 2):
        assert torch.equal(edit.mask[sample], alone.mask[sample])
        # Other numbers of rows are summed in another order, and a random model makes more of that at each step.
        assert relative_error(edit.latents[sample], alone.latents[sample]) < 1e-2


def test_with_another_negative_prompt_no_sample_stays(tiny_editor: Editor) -> None:
    base = generate(tiny_editor, [PROMPT, "an apple"])
    edit = tiny_editor.edit(base, [EDIT, "an apple"], left_half(), negative_prompt="a dog")
    assert edit.mask.flatten(1).any(1).all()
    assert not torch.equal(edit.latents[1], base.latents[1])


def test_they_are_the_edit_s_alone(tiny_editor: Editor, tiny_base: Base) -> None:
    before = tiny_editor.edit(tiny_base, EDIT, left_half())
    tiny_editor.edit(tiny_base, EDIT, left_half(), guidance_scale=2.0, negative_prompt="apple")
    assert "negative_prompt" not in tiny_base.arguments
    assert torch.equal(tiny_editor.edit(tiny_base, EDIT, left_half()).latents, before.latents)


@pytest.mark.parametrize("words", ["a dog", ["a dog", "a dog"]], ids=["one", "one each"])
def test_words_for_all_samples_or_one_for_each(tiny_editor: Editor, words: str | list[str]) -> None:
    base = generate(tiny_editor, [PROMPT, "an apple"], negative_prompt=words)
    with pytest.raises(ValueError, match="the base's own"):
        tiny_editor.edit(base, [PROMPT, "an apple"], negative_prompt=["a dog", "a dog"])
    with pytest.raises(ValueError, match=r"3 string\(s\) in negative_prompt for 2 prompt\(s\)"):
        tiny_editor.edit(base, [EDIT, EDIT], negative_prompt=["a"] * 3)
    with pytest.raises(ValueError, match=r"1 string\(s\) in negative_prompt for 2 prompt\(s\)"):
        generate(tiny_editor, [PROMPT, "an apple"], negative_prompt=["a"])
    single = tiny_editor.pipe([PROMPT, "an apple"], output_type="latent", **arguments(negative_prompt=["a dog"] * 2))
    assert_close(base.latents, single.images)


def test_a_base_without_guidance_stays_without(tiny_editor: Editor) -> None:
    base = generate(tiny_editor, guidance_scale=1.0)
    with pytest.raises(ValueError, match=r"guidance_scale=7.5: the base was generated with 1.0"):
        tiny_editor.edit(base, EDIT, left_half(), guidance_scale=7.5)
