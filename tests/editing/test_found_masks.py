"""The mask that an edit finds takes in where words stood that go as a whole, and leaves out in the end what stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.pipelines import PROMPT, generate
from torch import Tensor

import fisedit_compile.editing.running_edit as running_edit
import fisedit_compile.masks.old_words as old_words
from fisedit_compile import Base, Editor
from fisedit_compile.editing.prompt_alignment import removed_tokens
from fisedit_compile.masks import changed_part as changed
from fisedit_compile.masks.changed_part import changed_part
from fisedit_compile.masks.grown import grown

pytestmark = pytest.mark.usefixtures("one_thread")

FEWER = " ".join(PROMPT.split()[:-1])


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Everything is taken to go as a whole; what was found, and the attention to the words that go."""
    seen: list[tuple[Tensor, Tensor]] = []

    def join(found: Tensor, attention: Tensor) -> Tensor:
        seen.append((found, attention))
        return old_words.with_old_words(found, attention)

    monkeypatch.setattr(old_words, "_GOES_AS_A_WHOLE", 0.0)
    monkeypatch.setattr(running_edit, "with_old_words", join)
    return seen


def test_the_mask_covers_where_removed_words_stood(
    tiny_editor: Editor, tiny_base: Base, joined: list[tuple[Tensor, Tensor]]
) -> None:
    edit = tiny_editor.edit(tiny_base, FEWER)
    ((found, attention),) = joined
    assert attention.shape == (1, 1, *edit.mask.shape[1:])
    assert attention.amin() >= 0
    assert attention.amax() <= 1
    stood = attention[:, 0] > old_words.otsu_threshold(attention[:, 0])[:, None, None]
    assert stood.any()
    whole = old_words.with_old_words(found, attention)
    assert (whole & (found | stood)).equal(found | stood)
    assert torch.equal(edit.mask, changed_part(grown(whole), tiny_base.latents, edit.latents))


def test_of_several_changes_none_is_left_out(
    tiny_editor: Editor, tiny_base: Base, joined: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the words of each stood is part of the mask, however little of it was found."""
    monkeypatch.setattr(old_words, "_GOES_AS_A_WHOLE", 2.0)  # of no change enough was found
    monkeypatch.setattr(changed, "UNCHANGED", -1.0)  # nothing is taken back in the end
    words = PROMPT.split()
    several = " ".join([*words[:1], "sunset", *words[2:-1], "dog"])
    assert len(removed_tokens(tiny_editor.pipe, [PROMPT], [several], {})[0]) == 2
    edit = tiny_editor.edit(tiny_base, several)
    ((found, attention),) = joined
    assert attention.shape[1] == 2
    stood = attention > old_words.otsu_threshold(attention[0])[None, :, None, None]
    assert stood.any(dim=(2, 3)).all()
    assert not found[stood.any(1)].all()
    assert edit.mask[stood.any(1)].all()


def test_words_that_are_only_added_leave_nothing_to_take_in(
    tiny_editor: Editor, tiny_base: Base, joined: list[Any]
) -> None:
    tiny_editor.edit(tiny_base, f"{PROMPT} and a dog")
    assert not joined


def test_a_base_without_maps_finds_masks_by_the_difference_alone(
    tiny_editor_with: Callable[..., Editor], joined: list[tuple[Tensor, Tensor]]
) -> None:
    editor = tiny_editor_with(cross_replace=0.0)
    base = generate(editor)
    edit = editor.edit(base, FEWER)
    ((found, attention),) = joined
    assert not attention.any()
    assert torch.equal(edit.mask, changed_part(grown(found), base.latents, edit.latents))


def test_samples_of_a_batch_are_looked_at_by_themselves(
    tiny_editor: Editor, joined: list[tuple[Tensor, Tensor]]
) -> None:
    """The first sample stays, the second loses words, the third gets others."""
    editor = tiny_editor
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    base = generate(editor, [PROMPT] * 3, generator=generators)
    editor.edit(base, [PROMPT, FEWER, f"{PROMPT} and a dog"])
    ((found, attention),) = joined
    assert len(found) == len(attention) == 2
    assert attention[0].any()
    assert not attention[1].any()
    alone = generate(editor, PROMPT, generator=torch.Generator().manual_seed(2))
    editor.edit(alone, FEWER)
    torch.testing.assert_close(joined[1][1][0], attention[0], rtol=1e-3, atol=1e-4)


def test_what_hardly_changes_is_the_bases_in_the_end(
    tiny_editor: Editor, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changed, "UNCHANGED", 0.0)
    found = tiny_editor.edit(tiny_base, FEWER)
    difference = (found.latents - tiny_base.latents).square().mean(1).sqrt()
    half = difference[found.mask].median() / tiny_base.latents.std()
    monkeypatch.setattr(changed, "UNCHANGED", float(half))
    cut = tiny_editor.edit(tiny_base, FEWER)
    assert 0 < cut.mask.sum() < found.mask.sum()
    assert not (cut.mask & ~found.mask).any()
    assert torch.equal(cut.latents, torch.where(cut.mask[:, None], found.latents, tiny_base.latents))
    assert cut.report.mask_area == pytest.approx(float(cut.mask.float().mean()))
    assert cut.report.background_identical
    assert cut.report.macs == found.report.macs  # steps computed the same


@pytest.mark.parametrize("combine", ["replace", "or"])
def test_a_mask_that_is_given_is_left_as_it_is(
    tiny_editor: Editor, tiny_base: Base, monkeypatch: pytest.MonkeyPatch, combine: Any
) -> None:
    given = torch.zeros(tiny_base.latents[0, 0].shape)
    given[2:9, 3:12] = 1
    edit = tiny_editor.edit(tiny_base, FEWER, mask=given, combine=combine)
    assert edit.mask[0, 2:9, 3:12].all()
    assert combine == "or" or edit.mask.sum() == given.sum()
    # Also where half of its cells change by less than a mask that is found would keep.
    difference = (edit.latents - tiny_base.latents).square().mean(1).sqrt()
    half = float(difference[edit.mask].median() / tiny_base.latents.std())
    monkeypatch.setattr(changed, "UNCHANGED", half)
    assert changed_part(edit.mask, tiny_base.latents, edit.latents).sum() < edit.mask.sum()
    again = tiny_editor.edit(tiny_base, FEWER, mask=given, combine=combine)
    assert torch.equal(again.mask, edit.mask)
    assert torch.equal(again.latents, edit.latents)
