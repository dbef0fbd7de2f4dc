"""What users of diffusers expect of a call: return_dict, output_type, progress bars, and a way to give memory back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.pipelines import CONFIG, EDIT, PROMPT, STEPS, arguments, generate, left_half, tiny_pipeline

from fisedit_compile import Base, Editor

pytestmark = pytest.mark.usefixtures("one_thread")


def test_return_dict_may_say_what_is_done_anyway(tiny_editor: Editor, tiny_base: Base) -> None:
    base = generate(tiny_editor, return_dict=True)
    assert torch.equal(base.latents, tiny_base.latents)
    assert "return_dict" not in base.arguments
    edit = tiny_editor.edit(base, EDIT, left_half(), return_dict=True)
    assert edit.report.background_identical
    with pytest.raises(ValueError, match=r"return_dict=False: .* and no tuple"):
        tiny_editor.edit(base, EDIT, left_half(), return_dict=False)


class TestOutput:
    def test_latents_are_not_decoded(
        self, tiny_editor: Editor, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        want = tiny_editor.edit(tiny_base, EDIT, left_half())
        monkeypatch.setattr(type(tiny_editor.pipe.vae), "decode", lambda *_, **__: pytest.fail("decoded"))
        edit = tiny_editor.edit(tiny_base, EDIT, left_half(), output_type="latent")
        assert torch.equal(edit.images, want.latents)
        assert torch.equal(edit.latents, want.latents)
        assert edit.report.background == "latents"

    def test_the_base_s_own_kind_is_no_change(self, tiny_editor: Editor, tiny_base: Base) -> None:
        want = tiny_editor.edit(tiny_base, EDIT, left_half())
        edit = tiny_editor.edit(tiny_base, EDIT, left_half(), output_type="pil")
        assert np.array_equal(np.asarray(edit.image), np.asarray(want.image))

    def test_another_kind_is_as_the_pipeline_decodes_it(self, tiny_editor: Editor, tiny_base: Base) -> None:
        edit = tiny_editor.edit(tiny_base, EDIT, left_half(), output_type="np", background="latents")
        want = tiny_editor.edit(tiny_base, EDIT, left_half(), background="latents")
        assert np.array_equal((edit.images[0] * 255).round().astype(np.uint8), np.asarray(want.image))

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("np", "output_type='np': the base's pictures, .*, are 'pil'; pass background='latents'"),
            ("jpeg", "output_type='jpeg': choose 'pil', 'np', 'pt' or 'latent'"),
        ],
    )
    def test_what_cannot_be_given_is_refused(
        self, tiny_editor: Editor, tiny_base: Base, kind: Any, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            tiny_editor.edit(tiny_base, EDIT, left_half(), output_type=kind)


def test_progress_bars_are_the_pipeline_s(own_pipeline: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    editor = Editor(own_pipeline())
    base = generate(editor)
    assert capsys.readouterr().err == ""  # as tiny_pipeline sets it
    editor.pipe.set_progress_bar_config(desc="steps of ours")
    editor.edit(base, EDIT, left_half())
    shown = capsys.readouterr().err
    assert "steps of ours" in shown
    assert f"{STEPS}/{STEPS}" in shown


def test_an_editor_that_was_freed_holds_no_graph_and_works_on() -> None:
    editor = Editor(tiny_pipeline(), CONFIG)
    base = generate(editor)
    before = editor.edit(base, EDIT, left_half())
    graphs = [weakref.ref(program) for program in editor.unet._programs]
    editor.free()
    gc.collect()
    assert [graph() for graph in graphs] == [None] * len(graphs)
    assert before.report.macs["ratio"] > 1
    assert torch.equal(editor.edit(base, EDIT, left_half()).latents, before.latents)
    plain = editor.pipe(PROMPT, **arguments()).images[0]
    assert np.array_equal(np.asarray(plain), np.asarray(base.image))
    editor.free()
    editor.free()
