"""Photos of sizes that the model does not take, and parts of photos: edits come back as large as the photo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.pipelines import CONFIG, EDIT, PROMPT, tiny_pipeline

from fisedit_compile import Base, Editor
from fisedit_compile.editing.photo import open_photo
from fisedit_compile.editing.photo_frame import PhotoFrame
from fisedit_compile.errors import MaskError

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0}
#: Pixels around a mask that are the edit's, of the small decoder.
REACH = 26


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor(tiny_pipeline(), CONFIG)


def drawn_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


class TestOddSizes:
    SIZE = (61, 37)

    @pytest.fixture(scope="class")
    def base(self, editor: Editor) -> Base:
        return editor.invert(photo(*self.SIZE), PROMPT, **SETTINGS)

    def test_the_base_is_the_photo_and_the_model_sees_more(self, base: Base) -> None:
        assert np.array_equal(base.image, photo(*self.SIZE))
        assert base.latents.shape[2:] == (20, 32)  # of 40x64 pixels
        seen = np.asarray(base.pictures[0])
        assert np.array_equal(seen[:37, :61], photo(*self.SIZE))
        assert np.array_equal(seen[:, 61:], seen[:, 57:60][:, ::-1])

    def test_an_edit_is_as_large_and_keeps_pixels_far_from_the_mask(self, editor: Editor, base: Base) -> None:
        edit = editor.edit(base, EDIT, drawn_mask(self.SIZE, (2, 4, 8, 12)))
        pixels, before = np.asarray(edit.image), np.asarray(photo(*self.SIZE))
        assert pixels.shape == before.shape
        assert np.array_equal(pixels[:, 8 + REACH :], before[:, 8 + REACH :])
        assert not np.array_equal(pixels[4:12, 2:8], before[4:12, 2:8])
        marked = edit.mask[0].nonzero()
        assert marked.min(0).values.tolist() == [2, 1]
        assert marked.max(0).values.tolist() == [5, 3]

    def test_other_kinds_of_pictures(self, editor: Editor, base: Base) -> None:
        mask = drawn_mask(self.SIZE, (2, 4, 8, 12))
        made = {
            kind: editor.edit(base, EDIT, mask, output_type=kind, background="latents").images
            for kind in ("pil", "np", "pt", "latent")
        }
        assert made["np"].shape == (1, 37, 61, 3)
        assert made["pt"].shape == (1, 3, 37, 61)
        assert made["latent"].shape == base.latents.shape
        assert np.abs(np.asarray(made["pil"][0]) - 255 * made["np"][0]).max() <= 0.51
        assert np.array_equal(made["pt"][0].permute(1, 2, 0), made["np"][0])

    def test_a_found_mask_and_a_second_round(self, editor: Editor, base: Base) -> None:
        first = editor.edit(base, EDIT)
        assert first.report.mask_source == "found"
        second = editor.edit(first, "an apple on the left", drawn_mask(self.SIZE, (2, 4, 8, 12)))
        assert second.image.size == self.SIZE
        assert np.array_equal(np.asarray(second.image)[:, 8 + REACH :], np.asarray(first.image)[:, 8 + REACH :])
        array = editor.edit(base, EDIT, drawn_mask(self.SIZE, (2, 4, 8, 12)), output_type="np", background="latents")
        with pytest.raises(ValueError, match="edited again as PIL images"):
            editor.edit(array, PROMPT)

    def test_a_saved_one_is_the_same(self, editor: Editor, base: Base, tmp_path: Path) -> None:
        base.save(tmp_path / "base")
        loaded, mask = editor.load(tmp_path / "base"), drawn_mask(self.SIZE, (2, 4, 8, 12))
        assert np.array_equal(loaded.image, base.image)
        assert np.array_equal(editor.edit(loaded, EDIT, mask).image, editor.edit(base, EDIT, mask).image)

    def test_who_draws_into_the_base_s_picture_changes_no_edit(self, editor: Editor) -> None:
        base, mask = editor.invert(photo(*self.SIZE), PROMPT, **SETTINGS), drawn_mask(self.SIZE, (2, 4, 8, 12))
        before = np.array(editor.edit(base, EDIT, mask).image)
        base.image.paste((0, 0, 0), (0, 0, *self.SIZE))
        assert np.array_equal(editor.edit(base, EDIT, mask).image, before)


class TestPart:
    SIZE, BOX = (300, 200), (100, 50, 163, 85)

    @pytest.fixture(scope="class")
    def base(self, editor: Editor) -> Base:
        return editor.invert(photo(*self.SIZE), PROMPT, box=self.BOX, **SETTINGS)

    def test_outside_the_box_nothing_changes(self, editor: Editor, base: Base) -> None:
        edit = editor.edit(base, EDIT, drawn_mask(self.SIZE, (98, 48, 110, 60)), background="latents")
        changed = (np.asarray(edit.image) != np.asarray(photo(*self.SIZE))).any(axis=2)
        assert changed[50:60, 100:110].any()
        changed[50:85, 100:163] = False
        assert not changed.any()
        assert base.latents.shape[2:] == (20, 32)

    def test_a_mask_beside_the_box(self, editor: Editor, base: Base) -> None:
        with pytest.raises(MaskError, match=r"nothing of the mask lies in the part .* box=\(100, 50, 163, 85\)"):
            editor.edit(base, EDIT, drawn_mask(self.SIZE, (0, 0, 50, 50)))

    def test_the_mask_of_an_edit_is_the_same_for_another(self, editor: Editor, base: Base) -> None:
        first = editor.edit(base, EDIT, drawn_mask(self.SIZE, (98, 48, 130, 70)))
        assert torch.equal(editor.edit(base, "an apple on the left", first.mask).mask, first.mask)
        assert base.frame is not None
        drawn = base.frame.mask_of_photo(first.mask[0])
        assert torch.equal(editor.edit(base, "an apple on the left", drawn).mask, first.mask)

    def test_several_photos(self, editor: Editor) -> None:
        photos = [photo(*self.SIZE, seed) for seed in (0, 1)]
        base = editor.invert(photos, [PROMPT, "an apple"], box=self.BOX, **SETTINGS)
        edit = editor.edit(base, [EDIT, "an apple"], drawn_mask(self.SIZE, self.BOX))
        assert np.array_equal(edit.images[1], photos[1])
        assert not np.array_equal(edit.images[0], photos[0])


@given(st.integers(1, 70), st.integers(1, 50), st.data())
def test_what_the_model_sees_goes_back_to_where_it_was(width: int, height: int, data: st.DataObject) -> None:
    left, upper = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, lower = data.draw(st.integers(left + 1, width)), data.draw(st.integers(upper + 1, height))
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = (-(-(right - left) // 8) * 8, -(-(lower - upper) // 8) * 8)
    frame = PhotoFrame((Image.fromarray(pixels),), (left, upper, right, lower), size)
    (seen,) = frame.pictures()
    assert seen.size == size
    assert np.array_equal(frame.restored([seen])[0], pixels)
    inverted = Image.fromarray(255 - np.asarray(seen))
    expected = pixels.copy()
    expected[upper:lower, left:right] = 255 - expected[upper:lower, left:right]
    assert np.array_equal(frame.restored([inverted])[0], expected)
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[upper:lower, left:right] = True
    cells: Any = frame.mask_of_model(mask, (0, 0))
    assert int(cells.sum()) == (right - left) * (lower - upper)
    every_cell = torch.ones(size[1] // 8, size[0] // 8, dtype=torch.bool)
    assert torch.equal(frame.mask_of_photo(every_cell), mask)


class TestFiles:
    def test_a_whole_one(self, tmp_path: Path) -> None:
        photo(32, 32).save(tmp_path / "photo.png")
        assert np.array_equal(open_photo(tmp_path / "photo.png"), photo(32, 32))

    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif", "bmp"])
    def test_one_that_is_cut_short(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"photo.{suffix}"
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(OSError, match=f"photo.{suffix}: no picture that can be read"):
            open_photo(path)

    def test_a_decompression_bomb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        photo(32, 32).save(tmp_path / "photo.png")
        for most in (600, 300):  # beyond it Pillow warns, beyond twice as much it refuses
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
            with pytest.raises(ValueError, match=r"photo\.png: a picture of too many pixels"):
                open_photo(tmp_path / "photo.png")

    def test_no_picture(self, tmp_path: Path) -> None:
        (tmp_path / "photo.png").write_text("words")
        with pytest.raises(OSError, match=r"photo\.png: no picture that can be read"):
            open_photo(tmp_path / "photo.png")
        with pytest.raises(FileNotFoundError):
            open_photo(tmp_path / "nothing.png")
