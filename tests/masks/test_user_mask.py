"""The mask a user gives: every kind of image, array and tensor, and what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fisedit_compile.errors import MaskError
from fisedit_compile.masks.user_mask import MaskLike, as_mask


def cells(*rows: str) -> torch.Tensor:
    """A picture in characters as bool [h, w]."""
    return torch.tensor([[character == "#" for character in row] for row in rows])


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the type
        return torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.quint8)


class TestUserMask:
    drawn = cells("####....", "####....", "........", ".......#")  # [4, 8]
    pooled = cells("##..", "...#")  # [2, 4]

    @pytest.mark.parametrize(
        "mask",
        [
            drawn,
            drawn.float(),
            drawn.to(torch.bfloat16) * 0.5,
            drawn.to(torch.uint8) * 128,
            drawn.long(),
            drawn[None],
            drawn[None, None],
            drawn.numpy(),
            drawn.numpy().astype(np.float16),
            drawn.numpy().astype(np.uint16),
            Image.fromarray(drawn.numpy().astype(np.uint8) * 255),
            Image.fromarray(drawn.numpy().astype(np.uint8) * 255).convert("1"),
            Image.fromarray(drawn.numpy().astype(np.uint8) * 255).convert("RGB"),
            Image.fromarray(drawn.numpy().astype(np.float32)),
            [drawn],
            (drawn.numpy(),),
        ],
        ids=lambda mask: f"{type(mask).__name__} {getattr(mask, 'dtype', getattr(mask, 'mode', ''))}",
    )
    def test_every_kind_of_mask_serves_all_samples(self, mask: MaskLike) -> None:
        found = as_mask(mask, samples=3, size=(2, 4))
        assert found.dtype == torch.bool
        assert torch.equal(found, self.pooled.expand(3, 2, 4))

    def test_soft_values_count_from_one_half(self) -> None:
        assert as_mask(torch.tensor([[0.49, 0.5]]), samples=1, size=(1, 2)).tolist() == [[[False, True]]]
        mask = np.array([[127, 128]], dtype=np.uint8)
        assert as_mask(mask, samples=1, size=(1, 2)).tolist() == [[[False, True]]]

    def test_one_mask_a_sample_in_any_form(self) -> None:
        other = self.drawn.flip(1)
        expected = torch.stack([self.pooled, self.pooled.flip(1)])
        stacked = torch.stack([self.drawn, other])
        enlarged = other.repeat_interleave(3, 0).repeat_interleave(5, 1)
        masks: list[MaskLike] = [stacked, stacked[:, None], stacked.numpy(), [self.drawn, enlarged.numpy()]]
        for mask in masks:
            assert torch.equal(as_mask(mask, samples=2, size=(2, 4)), expected)

    def test_a_smaller_mask_is_enlarged_by_nearest(self) -> None:
        expected = F.interpolate(self.pooled.float()[None, None], size=(6, 8), mode="nearest")[0] > 0
        assert torch.equal(as_mask(self.pooled, samples=1, size=(6, 8)), expected)

    @settings(deadline=None, max_examples=60)
    @given(*[st.integers(1, 40)] * 2, *[st.integers(1, 12)] * 2, st.integers(0, 2**32 - 1))
    def test_a_cell_is_active_exactly_if_an_active_pixel_overlaps_it(
        self, height: int, width: int, h: int, w: int, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        mask = rng.random((height, width)) < 0.05
        mask[rng.integers(height), rng.integers(width)] = True
        expected = np.zeros((h, w), dtype=bool)
        for y, x in np.argwhere(mask):
            # pixel [y, y + 1) of height covers [y * h, (y + 1) * h) in units of a cell's 1 / height
            rows = slice(y * h // height, -(-(y + 1) * h // height))
            columns = slice(x * w // width, -(-(x + 1) * w // width))
            expected[rows, columns] = True
        assert np.array_equal(as_mask(mask, samples=1, size=(h, w))[0].numpy(), expected)

    def test_the_users_tensor_is_neither_kept_nor_changed(self) -> None:
        mask = torch.eye(4, dtype=torch.bool)
        found = as_mask(mask, samples=1, size=(4, 4))
        found.zero_()
        assert mask.sum() == 4

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.zeros(4, 4), "mask 0 has no active pixel"),
            (torch.stack([torch.eye(4), torch.zeros(4, 4)]), "mask 1 has no active pixel"),
            (np.eye(4, dtype=np.uint8), "given as bool"),
            (torch.full((4, 4), torch.nan), "NaN or infinity"),
            (torch.full((4, 4), torch.inf), "NaN or infinity"),
            (torch.full((4, 4), 1.5), "reach from 1.5 to 1.5"),
            (torch.tensor([[-0.5, 1.0]]), "outside \\[0, 1\\]"),
            (torch.full((4, 4), 255), "convert to uint8"),
            (torch.full((4, 4), 1j), "complex64"),
            (torch.ones(3, 4, 4), "3 masks were given for 2"),
            (np.ones((4, 4, 3)), "greyscale"),
            (torch.ones(4), "shape \\(4,\\)"),
            (torch.ones(2, 3, 4, 4), "shape \\(2, 3, 4, 4\\)"),
            (torch.ones(0, 4), "shape \\(0, 4\\)"),
            ([torch.ones(4, 4)] * 3, "3 masks were given for 2"),
            ([torch.ones(2, 4, 4)], "item 0 of the sequence of masks holds 2"),
            ([], "empty sequence"),
            ([[0, 1], [1, 0]], "a list was given"),
            ("mask.png", "a str was given"),
            (np.array([["a"]]), "numpy array of <U1"),
        ],
    )
    def test_bad_masks_say_what_to_do(self, mask: MaskLike, message: str) -> None:
        with pytest.raises(MaskError, match=message):
            as_mask(mask, samples=2, size=(2, 2))

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.ones(4, 4, device="meta"), "meta device"),
            (torch.eye(4).to_sparse(), r"to_dense\(\)"),
            (quantized(), r"dequantize\(\)"),
            (torch.eye(4).to(torch.float8_e4m3fn), r"float8_e4m3fn was given; give mask\.float\(\)"),
            (torch.eye(4).to(torch.float8_e5m2), r"float8_e5m2 was given"),
            (np.ma.masked_array(np.eye(4), mask=np.eye(4) == 0), r"filled\(0\)"),
            (Image.new("LAB", (4, 4)), "mode LAB"),
            (Image.new("RGBA", (0, 4)), r"shape \(4, 0\)"),
        ],
        ids=lambda value: None if isinstance(value, str) else type(value).__name__,
    )
    def test_what_holds_no_readable_values_is_refused(self, mask: MaskLike, message: str) -> None:
        for given_mask in (mask, [mask]):
            with pytest.raises(MaskError, match=message):
                as_mask(given_mask, samples=1, size=(2, 2))


def drawn(mode: str, background: object, stroke: object) -> Image.Image:
    """A layer of 32x32 pixels with a stroke over the left half of its upper quarter."""
    image = Image.new(mode, (32, 32), background)
    image.paste(stroke, (0, 0, 16, 8))
    return image


def palette(transparent: int | bytes) -> Image.Image:
    """Index 1 drawn on index 0, both white; ``transparent`` is what a PNG or GIF says of its palette's opacity."""
    image = drawn("P", 0, 1)
    image.putpalette([255, 255, 255] * 2)
    image.info["transparency"] = transparent
    return image


class TestAlpha:
    stroke = torch.zeros(1, 8, 8, dtype=torch.bool)
    stroke[:, :2, :4] = True

    @pytest.mark.parametrize(
        "mask",
        [
            drawn("RGBA", (255, 255, 255, 0), (255, 255, 255, 255)),
            drawn("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)),
            drawn("RGBA", (200, 30, 30, 0), (200, 30, 30, 255)),
            drawn("RGBA", (0, 0, 0, 0), (255, 255, 255, 255)),
            drawn("RGBA", (0, 0, 0, 255), (255, 255, 255, 255)),
            drawn("RGBA", (0, 0, 0, 90), (255, 255, 255, 90)),
            drawn("LA", (255, 0), (255, 255)),
            drawn("LA", (0, 10), (0, 200)),
            drawn("LA", (0, 255), (255, 255)),
            palette(0),
            palette(bytes([0, 255])),
        ],
        ids=[
            "white on transparent white",
            "black on transparent black",
            "colour on itself",
            "white on transparent black",
            "opaque",
            "alike everywhere",
            "grey with alpha",
            "soft alpha",
            "opaque grey with alpha",
            "palette with a transparent index",
            "palette with opacities",
        ],
    )
    def test_a_stroke_is_found_by_opacity_or_by_colour(self, mask: Image.Image) -> None:
        assert torch.equal(as_mask(mask, samples=1, size=(8, 8)), self.stroke)

    def test_soft_white_strokes_count_from_half_opacity(self) -> None:
        ramp = np.zeros((1, 256, 4), dtype=np.uint8)
        ramp[0, 1:, :3], ramp[0, :, 3] = 255, np.arange(256)
        found = as_mask(Image.fromarray(ramp), samples=1, size=(1, 256))
        assert torch.equal(found[0, 0], torch.arange(256) >= 128)

    @pytest.mark.parametrize(
        "mask",
        [
            drawn("RGBA", (90, 90, 90, 255), (0, 0, 0, 0)),
            drawn("RGBA", (200, 220, 210, 255), (0, 0, 0, 0)),
            drawn("RGBA", (0, 0, 0, 0), (255, 0, 0, 255)),
            drawn("RGBA", (255, 255, 255, 0), (0, 0, 0, 255)),
            drawn("LA", (255, 0), (0, 255)),
        ],
        ids=[
            "hole in grey",
            "hole in a bright picture",
            "red on black",
            "black on transparent white",
            "grey with alpha",
        ],
    )
    def test_colours_and_opacity_that_mark_different_regions_are_refused(self, mask: Image.Image) -> None:
        with pytest.raises(MaskError, match=r"alpha channel.*getchannel\('A'\)"):
            as_mask(mask, samples=1, size=(8, 8))

    def test_a_layer_without_a_stroke_marks_nothing(self) -> None:
        with pytest.raises(MaskError, match="no active pixel"):
            as_mask(Image.new("RGBA", (8, 8), (255, 255, 255, 0)), samples=1, size=(2, 2))

    def test_an_array_with_alpha_is_refused_by_name(self) -> None:
        with pytest.raises(MaskError, match=r"alpha \[H, W, 4\]"):
            as_mask(np.ones((8, 8, 4), dtype=np.uint8), samples=1, size=(2, 2))
