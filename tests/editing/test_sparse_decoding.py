"""Edits whose pictures are decoded sparsely: what is reported, and when the VAE decodes as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pipelines import EDIT, PROMPT, STEPS, arguments, generate, left_half
from support.vaes import small_vae

import fisedit_compile.vae.sparse_decoder as sparse_decoder
from fisedit_compile import Base, Edit, Editor
from fisedit_compile.vae.sparse_decoder import SparseDecoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures of these tests are so small that hardly any region is less than most of them."""
    monkeypatch.setitem(sparse_decoder.DENSE_ABOVE, "cpu", 1.0)


@pytest.fixture(scope="module")
def editor(own_pipeline: Callable[..., Any]) -> Editor:
    return Editor(own_pipeline(sparse_decoder=True))


@pytest.fixture(scope="module")
def base(editor: Editor) -> Base:
    return generate(editor, height=64, width=64)


def corner() -> torch.Tensor:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:4, :4] = True
    return mask


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.fixture
def fresh(own_pipeline: Callable[..., Any]) -> Callable[..., tuple[Editor, Any]]:
    """Makes an editor that has decoded nothing, and its pipeline, of which parts are replaced."""

    def made(**parts: Any) -> tuple[Editor, Any]:
        pipe = own_pipeline(sparse_decoder=True, **parts)
        return Editor(pipe), pipe

    return made


def test_a_base_is_the_plain_picture_and_keeps_little_of_the_decoder(editor: Editor, base: Base) -> None:
    plain = editor.pipe(PROMPT, **arguments(height=64, width=64)).images
    assert np.array_equal(pixels(base.images), pixels(plain))
    assert base.decoded is not None
    picture = 64 * 64 * 3 * 4
    assert picture < base.decoded.nbytes < 1.5 * picture
    assert base.nbytes == (
        base.decoded.nbytes
        + sum(call.nbytes for call in base.calls)
        + sum(latents.nbytes for latents in base.step_latents)
    )


def test_an_edit_is_near_the_dense_one_and_far_pixels_are_the_base_s(editor: Editor, base: Base) -> None:
    edit = editor.edit(base, EDIT, corner())
    assert edit.report.decoder == "sparse"
    assert edit.report.to_dict()["decoder"] == "sparse"
    assert str(edit.report).endswith("; decoder sparse")
    raw = editor.edit(base, EDIT, corner(), background="latents")
    old, new, dense = (pixels(each.images) for each in (base, edit, raw))
    assert np.array_equal(new[:, 40:], old[:, 40:])
    assert not np.array_equal(dense[:, 40:], old[:, 40:])
    inside = np.abs(new - dense)[:, :8, :8]
    assert inside.mean() < 3
    assert np.abs(new - old)[:, :8, :8].mean() > 3 * inside.mean()


def test_edits_repeat(editor: Editor, base: Base) -> None:
    first = pixels(editor.edit(base, EDIT, corner()).images)
    editor.edit(base, EDIT, corner().flip(0))
    assert np.array_equal(pixels(editor.edit(base, EDIT, corner()).images), first)


def test_two_samples_with_masks_of_their_own_and_one_that_stays(editor: Editor) -> None:
    base = generate(editor, [PROMPT, PROMPT], height=64, width=64)
    masks = torch.stack([corner(), corner().flip(1)])
    edit = editor.edit(base, [EDIT, PROMPT], masks)
    assert edit.report.decoder == "sparse"
    assert np.array_equal(pixels(edit.images)[1], pixels(base.images)[1])
    both = editor.edit(base, [EDIT, EDIT], masks)
    assert np.abs(pixels(both.images)[0] - pixels(edit.images)[0]).max() <= 1
    assert not np.array_equal(pixels(both.images)[1], pixels(base.images)[1])


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_other_kinds_of_pictures(editor: Editor, output_type: str) -> None:
    base = generate(editor, output_type=output_type, num_images_per_prompt=2, height=64, width=64)
    edit = editor.edit(base, EDIT, corner())
    assert edit.report.decoder == "sparse"
    old, new = (np.asarray(each.images) for each in (base, edit))
    rows = np.s_[:, :, 40:] if output_type == "pt" else np.s_[:, 40:]
    assert np.array_equal(new[rows], old[rows])


def test_an_autoencoder_of_another_class(fresh: Callable[..., tuple[Editor, Any]]) -> None:
    editor, _ = fresh(vae=small_vae("tiny"))
    base = generate(editor)
    assert np.array_equal(pixels(base.images), pixels(editor.pipe(PROMPT, **arguments()).images))
    assert editor.edit(base, EDIT, corner()[:16, :16]).report.decoder == "sparse"


class TestDense:
    def test_where_it_is_asked_for(self, editor: Editor, base: Base) -> None:
        assert editor.edit(base, EDIT, corner(), dense=True).report.decoder == "dense (as its steps)"
        raw = editor.edit(base, EDIT, corner(), background="latents")
        assert raw.report.decoder == "dense (background='latents')"
        out = editor.pipe.vae.decode(raw.latents / editor.pipe.vae.config.scaling_factor, return_dict=False)[0]
        wanted = editor.pipe.image_processor.postprocess(out.detach(), output_type="pil")
        assert np.array_equal(pixels(raw.images), pixels(wanted))

    def test_where_most_of_the_picture_is_edited(self, tiny_editor_with: Callable[..., Editor]) -> None:
        few = tiny_editor_with(dense_above=0.2)
        base = generate(few)
        assert few.edit(base, EDIT, left_half()).report.decoder == "dense (as its steps)"

    def test_where_most_of_the_picture_would_be_decoded(
        self, editor: Editor, base: Base, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sparse_decoder.DENSE_ABOVE, "cpu", 0.01)
        edit = editor.edit(base, EDIT, corner())
        assert "of the picture would be decoded" in edit.report.decoder
        self.is_composed_of_the_dense_one(editor, base, edit)

    def test_with_tiling(self, fresh: Callable[..., tuple[Editor, Any]]) -> None:
        editor, pipe = fresh()
        pipe.vae.enable_tiling()
        base = generate(editor)
        assert base.decoded is None
        edit = editor.edit(base, EDIT, corner()[:16, :16])
        assert edit.report.decoder == "dense (the base keeps nothing of its decoder)"

    def test_with_a_decoder_that_was_compiled(self, fresh: Callable[..., tuple[Editor, Any]]) -> None:
        editor, pipe = fresh()
        pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")
        edit = editor.edit(generate(editor), EDIT, corner()[:16, :16])
        assert edit.report.decoder == "dense (the base keeps nothing of its decoder)"

    @staticmethod
    def is_composed_of_the_dense_one(editor: Editor, base: Base, edit: Edit) -> None:
        raw = editor.edit(base, EDIT, corner(), background="latents")
        assert np.array_equal(pixels(edit.images)[:, :8, :8], pixels(raw.images)[:, :8, :8])


class TestCallbacks:
    def test_what_a_callback_decodes_on_the_way_is_decoded_as_ever(self, editor: Editor) -> None:
        seen: list[torch.Tensor] = []

        def preview(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            seen.append(pipe.vae.decode(values["latents"] / pipe.vae.config.scaling_factor).sample)
            return {}

        base = generate(editor, callback_on_step_end=preview)
        assert len(seen) == STEPS
        assert base.decoded is not None
        latents = base.latents / editor.pipe.vae.config.scaling_factor
        assert torch.equal(base.decoded.latents, latents)
        seen.clear()
        edit = editor.edit(base, EDIT, corner()[:16, :16], callback_on_step_end=preview)
        assert edit.report.decoder == "sparse"

    def test_one_that_changes_the_vae_on_the_way(self, fresh: Callable[..., tuple[Editor, Any]]) -> None:
        editor, pipe = fresh()
        base = generate(editor)

        def change(*_: Any) -> dict[str, Any]:
            with torch.no_grad():
                pipe.vae.decoder.conv_out.weight.mul_(1.1)
            return {}

        edit = editor.edit(base, EDIT, corner()[:16, :16], callback_on_step_end=change)
        assert "the VAE is another one than the base was decoded with" in edit.report.decoder


def test_the_vae_of_a_pipeline_may_be_exchanged(editor: Editor, fresh: Callable[..., tuple[Editor, Any]]) -> None:
    own, pipe = fresh()
    first = generate(own)
    before = pipe.vae
    pipe.vae = small_vae("kl")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.mul_(2)
    second = generate(own)
    assert not np.array_equal(pixels(first.images), pixels(second.images))
    assert own.edit(second, EDIT, corner()[:16, :16]).report.decoder == "sparse"
    pipe.vae = before
    assert own.edit(first, EDIT, corner()[:16, :16]).report.decoder == "sparse"


def test_an_inverted_photo(editor: Editor, base: Base) -> None:
    photo = base.image
    made = editor.invert(photo, PROMPT, num_inference_steps=STEPS)
    assert made.decoded is not None
    assert np.array_equal(pixels(made.images), pixels([photo]))
    latents = made.latents / editor.pipe.vae.config.scaling_factor
    assert torch.equal(made.decoded.latents, latents)
    edit = editor.edit(made, EDIT, corner())
    assert edit.report.decoder == "sparse"
    assert np.array_equal(pixels(edit.images)[:, 40:], pixels([photo])[:, 40:])


def test_an_inverted_photo_of_a_pipeline_that_only_decodes_as_a_whole(
    editor: Editor, base: Base, fresh: Callable[..., tuple[Editor, Any]]
) -> None:
    own, pipe = fresh()
    pipe.vae.enable_tiling()
    made = own.invert(base.image, PROMPT, num_inference_steps=STEPS)
    assert made.decoded is None
    edit = own.edit(made, EDIT, corner())
    assert edit.report.decoder == "dense (the base keeps nothing of its decoder)"


def test_a_saved_base_is_decoded_as_sparsely(editor: Editor, base: Base, tmp_path: Path) -> None:
    base.save(tmp_path / "base")
    loaded = editor.load(tmp_path / "base")
    want, got = (editor.edit(each, EDIT, corner()) for each in (base, loaded))
    assert got.report.decoder == "sparse"
    assert np.array_equal(pixels(got.images), pixels(want.images))


def test_a_base_without_a_decoder_is_saved(tmp_path: Path, fresh: Callable[..., tuple[Editor, Any]]) -> None:
    editor, pipe = fresh()
    pipe.vae.enable_slicing()
    generate(editor).save(tmp_path / "base")
    assert editor.load(tmp_path / "base").decoded is None


def test_graphs_are_made_once(editor: Editor, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseDecoder, "_build", None)
    generate(editor, height=64, width=64)
    assert editor.edit(base, EDIT, corner()).report.decoder == "sparse"
