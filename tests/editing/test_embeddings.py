"""Embeddings that the user made, in the place of those of the prompt's words, which stand beside them for control."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pipelines import CONFIG, EDIT, PROMPT, arguments, generate, left_half
from support.pipelines_sdxl import tiny_sdxl

from fisedit_compile import Base, Editor

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def encoded(pipe: Any, *prompts: str) -> Any:
    """What the pipeline makes of prompts: of each kind that it makes."""
    options = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    return [each.detach() for each in pipe.encode_prompt(list(prompts), **options)]


@pytest.fixture(scope="module")
def embeds(tiny_editor: Editor) -> dict[str, torch.Tensor]:
    return {prompt: encoded(tiny_editor.pipe, prompt)[0] for prompt in (PROMPT, EDIT)}


@pytest.fixture(scope="module")
def embedded_base(tiny_editor: Editor, embeds: dict[str, torch.Tensor]) -> Base:
    return generate(tiny_editor, prompt_embeds=embeds[PROMPT])


def test_the_pipeline_s_own_give_what_its_words_give(
    tiny_editor: Editor, tiny_base: Base, embedded_base: Base, embeds: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert torch.equal(embedded_base.latents, tiny_base.latents)
    want = tiny_editor.edit(tiny_base, EDIT)
    embedded_base.save(tmp_path / "base")
    for base in (embedded_base, tiny_editor.load(tmp_path / "base")):
        edit = tiny_editor.edit(base, EDIT, prompt_embeds=embeds[EDIT])
        assert torch.equal(edit.latents, want.latents)
        assert torch.equal(edit.mask, want.mask)


def test_they_are_drawn_and_not_the_words(tiny_editor: Editor, embeds: dict[str, torch.Tensor]) -> None:
    louder = 2 * embeds[PROMPT]
    plain = tiny_editor.pipe(prompt_embeds=louder, **arguments()).images
    base = generate(tiny_editor, prompt_embeds=louder)
    assert np.array_equal(np.asarray(base.image), np.asarray(plain[0]))
    before = base.latents.clone()
    louder.zero_()  # the base has its own
    edit = tiny_editor.edit(base, PROMPT, left_half(), prompt_embeds=embeds[PROMPT])
    assert not torch.equal(edit.latents, before)
    assert edit.report.background_identical


def test_a_base_of_words_may_be_edited_by_embeddings_and_back(
    tiny_editor: Editor, tiny_base: Base, embedded_base: Base, embeds: dict[str, torch.Tensor]
) -> None:
    want = tiny_editor.edit(tiny_base, EDIT, left_half())
    by_embeddings = tiny_editor.edit(tiny_base, EDIT, left_half(), prompt_embeds=embeds[EDIT])
    by_words = tiny_editor.edit(embedded_base, EDIT, left_half(), prompt_embeds=None)
    assert torch.equal(by_embeddings.latents, want.latents)
    assert torch.equal(by_words.latents, want.latents)


def test_negative_ones_take_the_place_of_negative_words_and_back(tiny_editor: Editor) -> None:
    negative = encoded(tiny_editor.pipe, "a dog")[0]
    by_words = generate(tiny_editor, negative_prompt="a dog")
    by_embeddings = generate(tiny_editor, negative_prompt_embeds=negative)
    assert torch.equal(by_words.latents, by_embeddings.latents)
    other = encoded(tiny_editor.pipe, "an apple")[0]
    edits = [
        tiny_editor.edit(by_words, PROMPT, left_half(), negative_prompt_embeds=other),
        tiny_editor.edit(by_embeddings, PROMPT, left_half(), negative_prompt="an apple"),
        tiny_editor.edit(by_embeddings, PROMPT, left_half(), negative_prompt_embeds=other),
    ]
    want = tiny_editor.edit(by_words, PROMPT, left_half(), negative_prompt="an apple")
    assert all(torch.equal(each.latents, want.latents) for each in edits)


def test_samples_whose_embeddings_stay_are_the_bases(tiny_editor: Editor, embeds: dict[str, torch.Tensor]) -> None:
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    base = generate(tiny_editor, [PROMPT] * 2, generator=seeds, prompt_embeds=embeds[PROMPT].repeat(2, 1, 1))
    new = torch.cat([embeds[PROMPT], embeds[EDIT]])
    edit = tiny_editor.edit(base, [PROMPT, EDIT], left_half(), prompt_embeds=new)
    assert torch.equal(edit.latents[0], base.latents[0])
    assert not torch.equal(edit.latents[1], base.latents[1])


def test_sdxl_takes_pooled_ones_and_second_words_for_control() -> None:
    pipe = tiny_sdxl()
    editor = Editor(pipe, CONFIG)
    (old, _, old_pooled, _), (new, _, new_pooled, _) = encoded(pipe, PROMPT), encoded(pipe, EDIT)
    mask = torch.zeros(16, 16)
    mask[:8] = 1
    by_words = generate(editor)
    base = generate(editor, prompt_2=PROMPT, prompt_embeds=old, pooled_prompt_embeds=old_pooled)
    assert torch.equal(base.latents, by_words.latents)
    given = {"prompt_2": EDIT, "prompt_embeds": new, "pooled_prompt_embeds": new_pooled}
    edit = editor.edit(base, EDIT, mask, **given)
    assert torch.equal(edit.latents, editor.edit(by_words, EDIT, mask).latents)
    with pytest.raises(ValueError, match="align the words"):
        editor.edit(base, EDIT, mask, **{**given, "prompt_2": "a left"})
    with pytest.raises(ValueError, match="pooled_prompt_embeds: StableDiffusionXLPipeline takes both or none"):
        generate(editor, prompt_embeds=old)
    with pytest.raises(ValueError, match=r"^prompt_embeds: StableDiffusionXLPipeline takes both or none"):
        generate(editor, pooled_prompt_embeds=old_pooled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda each: each[:, :5],
            "prompt_embeds has 5 tokens where a prompt has 8: give as many, or set cross_replace",
        ),
        (lambda each: each[..., :4], "prompt_embeds has 4 channels, and the U-Net takes 8"),
        (lambda each: each.repeat(2, 1, 1), r"prompt_embeds has 2 row\(s\) for 1 prompt\(s\)"),
        (
            lambda each: each[0],
            r"prompt_embeds is torch.float32 \[8, 8\]: give a floating-point tensor of 3 dimensions",
        ),
        (lambda each: each.long(), "prompt_embeds is torch.int64"),
        (lambda each: each / 0, "prompt_embeds is not finite"),
        (lambda each: each.tolist(), "prompt_embeds is a list"),
    ],
)
def test_others_are_refused_before_anything_is_computed(
    tiny_editor: Editor,
    tiny_base: Base,
    embeds: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    message: str,
) -> None:
    monkeypatch.setattr(type(tiny_editor.pipe), "encode_prompt", lambda *_, **__: pytest.fail("the pipeline ran"))
    with pytest.raises(ValueError, match=message):
        generate(tiny_editor, prompt_embeds=change(embeds[PROMPT]))
    with pytest.raises(ValueError, match=message):
        tiny_editor.edit(tiny_base, EDIT, prompt_embeds=change(embeds[EDIT]))


def test_other_words_need_other_embeddings(
    tiny_editor: Editor, embedded_base: Base, embeds: dict[str, torch.Tensor]
) -> None:
    for given in ({}, {"prompt_embeds": embeds[PROMPT]}):
        with pytest.raises(
            ValueError, match=r"sample 0 has other words than the base, .*dog.*, and the base's embeddings"
        ):
            tiny_editor.edit(embedded_base, EDIT, **given)


def test_without_control_they_may_have_any_length(tiny_editor_with: Callable[..., Editor]) -> None:
    editor = tiny_editor_with(cross_replace=0.0)
    torch.manual_seed(0)
    long, other, negative = torch.randn(3, 1, 11, 8)
    base = generate(editor, prompt_embeds=long, negative_prompt_embeds=negative)
    edit = editor.edit(base, EDIT, left_half(), prompt_embeds=other)
    assert edit.report.background_identical
    with pytest.raises(ValueError, match="negative_prompt_embeds has 8 tokens where a prompt has 11: give as many"):
        generate(editor, prompt_embeds=long, negative_prompt_embeds=negative[:, :8])
    with pytest.raises(ValueError, match="the edit's prompt has 8 tokens where the base's has 11"):
        editor.edit(base, EDIT, left_half(), prompt_embeds=other[:, :8], negative_prompt_embeds=negative[:, :8])
    with pytest.raises(ValueError, match="the edit's prompt has 8 tokens where the base's has 11"):
        editor.edit(base, EDIT, left_half(), prompt_embeds=None, negative_prompt_embeds=None)
