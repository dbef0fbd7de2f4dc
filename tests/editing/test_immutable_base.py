"""A base shares nothing with whoever made it, cannot be written to, keeps nothing alive, and survives copies."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from support.pipelines import CONFIG, EDIT, generate, left_half, tiny_pipeline

import fisedit_compile.macs.counter as counter
from fisedit_compile import Base, Editor, FiseditError
from fisedit_compile.editing.arguments import owned

pytestmark = pytest.mark.usefixtures("one_thread")


def test_noise_that_the_caller_changes_afterwards(tiny_editor: Editor) -> None:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    base = generate(tiny_editor, latents=noise)
    before = tiny_editor.edit(base, EDIT, left_half()).latents
    noise.zero_()
    assert torch.equal(tiny_editor.edit(base, EDIT, left_half()).latents, before)


def test_what_a_callback_of_an_edit_does_to_its_tensors_stays_in_that_edit(tiny_editor: Editor) -> None:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    base = generate(tiny_editor, latents=noise)
    before = tiny_editor.edit(base, EDIT, left_half()).latents

    def zero(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        for each in values.values():
            each.zero_()
        return values

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    tiny_editor.edit(base, EDIT, left_half(), callback_on_step_end=zero, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(tiny_editor.edit(base, EDIT, left_half()).latents, before)


def test_a_copy_owns_tensors_arrays_pictures_and_containers() -> None:
    picture, array, tensor = Image.new("RGB", (2, 2)), np.zeros(2), torch.zeros(2)
    kept = owned({"image": [picture], "more": (array, {"tensor": tensor}), "words": "a cat"})
    ImageDraw.Draw(picture).point((0, 0), "white")
    array[0], tensor[0] = 1, 1
    assert kept["image"][0].getpixel((0, 0)) == (0, 0, 0)
    assert kept["more"][0][0] == kept["more"][1]["tensor"][0] == 0
    assert kept["words"] == "a cat"


def test_nothing_of_it_can_be_assigned(tiny_base: Base) -> None:
    with pytest.raises(TypeError):
        tiny_base.arguments["guidance_scale"] = 1.0  # type: ignore[index]
    with pytest.raises(AttributeError):
        tiny_base.prompts = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        tiny_base.calls[-1].cache[next(iter(tiny_base.calls[-1].cache))] = torch.zeros(1)  # type: ignore[index]


def test_what_is_drawn_into_its_picture_is_not_drawn_into_the_base(tiny_editor: Editor) -> None:
    base = generate(tiny_editor)
    before = np.asarray(base.pictures[0])
    ImageDraw.Draw(base.image).rectangle((0, 0, 31, 31), fill="red")
    assert np.array_equal(np.asarray(base.pictures[0]), before)
    assert not np.array_equal(np.asarray(base.image), before)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda base: pickle.loads(pickle.dumps(base))], ids=["copy", "pickle"])
def test_a_twin_gives_the_same_edits(tiny_editor: Editor, tiny_base: Base, twin: Callable[[Base], Base]) -> None:
    want = tiny_editor.edit(tiny_base, EDIT, left_half())
    got = tiny_editor.edit(twin(tiny_base), EDIT, left_half())
    assert torch.equal(got.latents, want.latents)
    assert np.array_equal(np.asarray(got.image), np.asarray(want.image))


def test_a_base_of_a_callback_keeps_neither_it_nor_the_pipeline() -> None:
    editor = Editor(tiny_pipeline(), CONFIG)

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return values

    base = generate(editor, callback_on_step_end=callback)
    edit = editor.edit(base, EDIT, left_half())
    gone = [weakref.ref(each) for each in (callback, editor.pipe, editor.pipe.unet, editor.pipe.text_encoder)]
    del callback, editor
    gc.collect()
    assert [each() for each in gone] == [None] * len(gone)
    assert base.nbytes > 0
    assert edit.report.macs["ratio"] > 1
    assert str(edit.report).startswith("mask 50.0%")


@pytest.mark.parametrize("stride", [1, 2])
def test_its_memory_is_free_as_soon_as_it_is_let_go_of(tiny_editor_with: Callable[..., Editor], stride: int) -> None:
    """Without waiting for the collector of circles, which may come when the memory of a GPU is long full."""
    editor = tiny_editor_with(stride=stride)
    gc.collect()
    gc.disable()
    try:
        base = generate(editor, num_inference_steps=8)
        edit = editor.edit(base, EDIT, left_half())
        dense = editor.edit(base, EDIT, left_half(), dense=True)
        again = editor.edit(edit, "a cat on the left", left_half())
        gone = [weakref.ref(each) for each in (base, base.calls[-1].cache, edit, dense, again)]
        gone.append(weakref.ref(editor.base_of(edit).calls[-1].cache))
        del base, edit, dense, again
        assert [each() for each in gone] == [None] * len(gone)
    finally:
        gc.enable()


def test_a_report_is_small_keeps_no_cache_and_computes_nothing(
    tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = generate(tiny_editor)
    edit, other = (tiny_editor.edit(base, EDIT, left_half()) for _ in range(2))
    report = edit.report
    with monkeypatch.context() as patch:
        patch.setattr(counter, "MacCounter", None)
        assert "MACs" not in str(report)
    cache = weakref.ref(base.calls[-1].cache)
    del base, edit
    gc.collect()
    assert cache() is None
    assert report.macs["ratio"] > 1
    assert f"1/{report.macs['ratio']:.1f} of the MACs" in str(report)
    assert len(pickle.dumps(report)) < 2000
    assert pickle.loads(pickle.dumps(report)).macs == report.macs
    with pytest.raises(FiseditError, match="not counted before its report was pickled"):
        pickle.loads(pickle.dumps(other.report)).macs  # noqa: B018


def test_an_editor_is_copied_with_its_pipeline(tiny_editor: Editor, tiny_base: Base) -> None:
    twin = copy.deepcopy(tiny_editor)
    assert twin.pipe is not tiny_editor.pipe
    assert twin.config == tiny_editor.config
    assert copy.copy(tiny_editor).pipe is tiny_editor.pipe
    want = tiny_editor.edit(tiny_base, EDIT, left_half())
    assert torch.equal(twin.edit(tiny_base, EDIT, left_half()).latents, want.latents)


def test_the_flags_of_a_safety_checker_are_kept(tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_editor.pipe
    assert generate(tiny_editor).nsfw is None
    flags = [True, False]

    def check(image: Any, device: Any, dtype: Any) -> Any:
        return image, flags

    monkeypatch.setattr(pipe, "run_safety_checker", check, raising=False)
    base = generate(tiny_editor, num_images_per_prompt=2)
    assert base.nsfw == (True, False)
    flags.reverse()
    assert tiny_editor.edit(base, EDIT, left_half()).nsfw == (False, True)
