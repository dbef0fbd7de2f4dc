"""Edits that say themselves for how long they keep the base's attention maps: as an editor of that config would."""

from __future__ import annotations

import pytest
import torch
from support.pipelines import CONFIG, EDIT, PROMPT, generate, left_half

from fisedit_compile import Base, Edit, Editor, EditRequest
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

APPLE = "an apple on the left"


@pytest.fixture(scope="module")
def editor(tiny_editor: Editor) -> Editor:
    """Its bases keep the maps of all steps."""
    return Editor(tiny_editor.pipe, {**CONFIG, "cross_replace": 1.0})


@pytest.fixture(scope="module")
def base(editor: Editor) -> Base:
    return generate(editor)


@pytest.mark.parametrize(
    ("share", "mask"),
    # A mask is found by the maps of both dense steps, of which bases that keep fewer have not as many.
    [(0.0, left_half()), (0.25, left_half()), (0.5, None)],
)
def test_it_is_the_edit_of_an_editor_of_that_config(
    editor: Editor, base: Base, share: float, mask: torch.Tensor | None
) -> None:
    other = Editor(editor.pipe, {**CONFIG, "cross_replace": share})
    want = other.edit(generate(other), EDIT, mask)
    edit = editor.edit(base, EDIT, mask, cross_replace=share)
    assert torch.equal(edit.mask, want.mask)
    assert torch.equal(edit.latents, want.latents)
    assert not torch.equal(editor.edit(base, EDIT, mask).latents, want.latents)


def test_edits_of_one_batch_have_each_their_own(editor: Editor, base: Base) -> None:
    shares = (None, 0.0, 0.5)
    words = (EDIT, EDIT, APPLE)

    def same(one: Edit, other: Edit) -> None:
        assert torch.equal(one.mask, other.mask)
        assert_close(one.latents, other.latents)

    requests = [
        EditRequest(base, prompt, left_half(), cross_replace=share) for prompt, share in zip(words, shares, strict=True)
    ]
    for edit, prompt, share in zip(editor.edit_many(requests), words, shares, strict=True):
        same(edit, editor.edit(base, prompt, left_half(), cross_replace=share))


def test_words_cannot_count_more_without_control(editor: Editor, base: Base) -> None:
    with pytest.raises(ValueError, match="this edit has none"):
        editor.edit(base, PROMPT, left_half(), weights={"cat": 1.5}, cross_replace=0)
