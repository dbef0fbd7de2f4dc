"""The masks that measurements use: squares of an area, files of real ones, and masks of any picture's size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compile.errors import MaskError
from fisedit_compile.masks.sample_masks import latent_mask, read_masks, square_mask


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1, exclude_min=True))
def test_a_square_lies_in_the_middle_and_has_about_the_area(height: int, width: int, share: float) -> None:
    mask = square_mask(share, (height, width))
    assert mask.shape == (1, height, width)
    y, x = mask[0].nonzero().unbind(1)
    top, bottom, left, right = int(y.min()), int(y.max()), int(x.min()), int(x.max())
    rows, columns = bottom - top + 1, right - left + 1
    assert mask.sum() == rows * columns  # one rectangle
    assert abs(top - (height - 1 - bottom)) <= 1
    assert abs(left - (width - 1 - right)) <= 1
    side = max(round((share * height * width) ** 0.5), 1)
    if side <= min(height, width):
        assert rows == columns == side
    else:
        assert min(height, width) in (rows, columns)
        assert abs(rows * columns - share * height * width) <= min(height, width) / 2
    assert mask.all() or share < 1


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_shares_are_above_zero_and_up_to_one(share: float) -> None:
    with pytest.raises(ValueError, match=r"edit_size is .*\(0, 1\]"):
        square_mask(share, (8, 8))


def test_files_hold_masks_or_their_bits(tmp_path: Path) -> None:
    masks = np.random.default_rng(0).random((5, 8, 8)) < 0.3
    np.savez(tmp_path / "plain.npz", masks=masks[:, :, :6])
    np.savez(tmp_path / "packed.npz", packed=np.packbits(masks.reshape(5, -1), axis=1))
    assert torch.equal(read_masks(tmp_path / "plain.npz"), torch.from_numpy(masks[:, :, :6]))
    assert torch.equal(read_masks(tmp_path / "packed.npz"), torch.from_numpy(masks))


@pytest.mark.parametrize(
    ("arrays", "held"),
    [
        ({}, "holds nothing"),
        ({"masks": np.ones((2, 8, 8))}, r"masks float64 \[2, 8, 8\]"),
        ({"masks": np.ones((0, 8, 8), bool)}, r"masks bool \[0, 8, 8\]"),
        ({"packed": np.ones((2, 3), np.uint8)}, r"packed uint8 \[2, 3\]"),
        ({"other": np.ones(2, np.uint8)}, r"other uint8 \[2\]"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], held: str) -> None:
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(ValueError, match=f"{held}.*: wanted is 'masks', bool"):
        read_masks(tmp_path / "file.npz")


def test_an_array_alone_is_no_file_of_masks(tmp_path: Path) -> None:
    np.save(tmp_path / "masks.npy", np.ones((2, 8, 8), bool))
    with pytest.raises(ValueError, match="holds nothing"):
        read_masks(tmp_path / "masks.npy")
    (tmp_path / "text.npz").write_text("masks")
    with pytest.raises(ValueError, match=r"is no \.npz of masks"):
        read_masks(tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError):
        read_masks(tmp_path / "none.npz")


def test_masks_of_the_latents_size_stay_as_they_are() -> None:
    mask = torch.zeros(2, 6, 4, dtype=torch.bool)
    assert torch.equal(latent_mask(mask, (6, 4)), mask)  # though empty
    assert latent_mask(mask.numpy()[0], (6, 4)).shape == (1, 6, 4)


@pytest.mark.parametrize(("shape", "fits"), [((48, 32), True), ((47, 32), True), ((3, 2), True), ((40, 32), False)])
def test_masks_have_the_proportions_of_the_latents(shape: tuple[int, int], fits: bool) -> None:
    mask = torch.ones(shape)
    if fits:
        assert latent_mask(mask, (6, 4)).all()
    else:
        with pytest.raises(MaskError, match="a mask of 40x32 for latents of 6x4"):
            latent_mask(mask, (6, 4))
