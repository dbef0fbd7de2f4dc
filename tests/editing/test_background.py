"""Pictures whose background is the base's: how far a decoder reaches, what is blended, what cannot be put together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from fisedit_compile import Editor
from fisedit_compile.editing.background import PixelBackground, decoder_reach
from fisedit_compile.masks.grown import grown

pytestmark = pytest.mark.usefixtures("one_thread")

#: Latents 8x6, pictures 16x12: two pixels a cell.
CELLS, SCALE = (8, 6), 2


def kl(layers: int = 1, blocks: int = 2, **arguments: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=[8] * blocks,
        layers_per_block=layers,
        norm_num_groups=4,
        latent_channels=4,
        **arguments,
    ).eval()


def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    blocks: Any = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (2, 1)}
    return AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), **blocks).eval()


def without_global_layers(vae: nn.Module) -> nn.Module:
    """The decoder's convolutions alone: norms let everything through, and there is no attention."""
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return vae


class TestDecoderReach:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: kl(mid_block_add_attention=False),
            lambda: kl(layers=2, blocks=3, mid_block_add_attention=False),
            tiny,
        ],
        ids=["kl of two levels", "kl of three levels", "tiny"],
    )
    def test_is_how_far_one_latent_cell_is_seen_without_norms(self, make: Callable[[], Any]) -> None:
        reach = decoder_reach(make())
        vae = without_global_layers(make()).double()
        size = 48
        latents = torch.randn(1, 4, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        changed = latents.clone()
        changed[..., size // 2, size // 2] += 1
        with torch.no_grad():
            old, new = (vae.decode(each, return_dict=False)[0] for each in (latents, changed))
        rows, columns = (old != new).any(dim=1)[0].nonzero().unbind(1)
        scale = old.shape[-1] // size
        first, last = size // 2 * scale, (size // 2 + 1) * scale - 1  # the cell's own pixels
        for seen in (rows, columns):
            assert first - int(seen.min()) == reach
            assert int(seen.max()) - last == reach

    def test_norms_and_attention_add_nothing(self) -> None:
        assert decoder_reach(kl()) == decoder_reach(kl(mid_block_add_attention=False)) == 24

    def test_of_the_decoder_of_stable_diffusion(self) -> None:
        with torch.device("meta"):
            vae = AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                block_out_channels=[128, 256, 512, 512],
                layers_per_block=2,
            )
        # One convolution and five ResNets at 8 pixels a cell; one and three at 4, 2 and 1; and the last convolution.
        assert decoder_reach(vae) == 88 + 28 + 14 + 8

    def test_a_decoder_that_cannot_be_built_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"decoder of Conv2d cannot be built.*background='latents'"):
            decoder_reach(nn.Conv2d(4, 3, 1))


def pipe() -> Any:
    return SimpleNamespace(vae=kl(mid_block_add_attention=False))


def pictures(kind: str, samples: int, seed: int, size: tuple[int, int] = (16, 12)) -> Any:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (samples, *size, 3), dtype=np.uint8)
    if kind == "pil":
        return [Image.fromarray(each) for each in pixels]
    if kind == "np":
        return pixels.astype(np.float32) / 255
    return (torch.from_numpy(pixels).movedim(-1, 1) / 255).to(getattr(torch, kind))


def pixels_of(given: Any) -> np.ndarray:
    """Pictures of any kind as an array [n, H, W, 3] of their own values."""
    if isinstance(given, Tensor):
        return given.movedim(1, -1).float().numpy()
    return given if isinstance(given, np.ndarray) else np.stack([np.asarray(each) for each in given])


def one_cell(samples: int = 1, row: int = 2, column: int = 1) -> Tensor:
    mask = torch.zeros(samples, *CELLS, dtype=torch.bool)
    mask[:, row, column] = True
    return mask


def background(grown: int = 2, feathered: int = 3) -> PixelBackground:
    return PixelBackground((16, 12, 3), grown, feathered)


class TestWeights:
    def test_one_around_the_mask_then_falling_evenly_to_zero(self) -> None:
        weights = background().weights(one_cell())[0]
        across = [*[1.0] * 6, 2 / 3, 1 / 3, *[0.0] * 4]  # the cell's pixels are columns 2 and 3, rows 4 and 5
        down = [1 / 3, 2 / 3, *[1.0] * 6, 2 / 3, 1 / 3, *[0.0] * 6]
        torch.testing.assert_close(weights[4], torch.tensor(across))
        torch.testing.assert_close(weights[:, 2], torch.tensor(down))

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 2**31), st.integers(0, 5), st.integers(1, 5), st.integers(1, 3))
    def test_are_exact_at_both_ends_of_the_feather(self, seed: int, grown: int, feathered: int, samples: int) -> None:
        mask = torch.rand(samples, *CELLS, generator=torch.Generator().manual_seed(seed)) < 0.05
        weights = background(grown, feathered).weights(mask)
        pixels = mask.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)
        ys, xs = torch.meshgrid(torch.arange(16), torch.arange(12), indexing="ij")
        for sample in range(samples):
            distance = torch.full((16, 12), 1000)
            for y, x in pixels[sample].nonzero().tolist():
                distance = torch.minimum(distance, torch.maximum((ys - y).abs(), (xs - x).abs()))
            assert torch.equal(weights[sample] == 1, distance <= grown)
            assert torch.equal(weights[sample] == 0, distance >= grown + feathered)


def test_what_has_to_be_decoded_covers_every_pixel_that_is_taken() -> None:
    made = PixelBackground((64, 48, 3), 4, 7)
    mask = torch.zeros(1, 16, 12, dtype=torch.bool)
    mask[0, 8, 6] = True
    cells = made.cells(torch.zeros(1, 4, 16, 12))
    assert cells == 4  # 11 pixels are 2.75 cells; and one more
    decoded = grown(mask, cells - 1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert not (made.weights(mask) > 0)[~decoded].any()


class TestCompose:
    @pytest.mark.parametrize("kind", ["pil", "np", "float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("samples", [1, 3])
    def test_far_pixels_are_the_base_s_and_near_ones_the_edit_s_bit_for_bit(self, kind: str, samples: int) -> None:
        base, edit = pictures(kind, samples, 1), pictures(kind, samples, 2)
        kept = pixels_of(base).copy(), pixels_of(edit).copy()
        mask = torch.cat([one_cell(row=2 + 2 * sample) for sample in range(samples)])
        made, left = background().compose(base, edit, mask)
        assert left == ()
        assert type(made) is type(edit)
        weights = background().weights(mask).numpy()
        old, new, out = pixels_of(base), pixels_of(edit), pixels_of(made)
        assert out.dtype == old.dtype
        assert np.array_equal(out[weights == 0], old[weights == 0])
        assert np.array_equal(out[weights == 1], new[weights == 1])
        assert (weights == 0).any()
        between = (weights > 0) & (weights < 1)
        low, high = np.minimum(old, new)[between], np.maximum(old, new)[between]
        assert ((out[between] >= low) & (out[between] <= high)).all()
        assert (out[between] != old[between]).any()
        assert np.array_equal(pixels_of(base), kept[0])  # neither is written to
        assert np.array_equal(pixels_of(edit), kept[1])

    @settings(deadline=None, max_examples=25)
    @given(st.integers(0, 2**31), st.sampled_from(["pil", "np", "float32", "bfloat16"]), st.sampled_from([0, 0.03, 1]))
    def test_is_the_plain_formula_over_the_whole_picture_bit_for_bit(self, seed: int, kind: str, share: float) -> None:
        base, edit = pictures(kind, 2, seed), pictures(kind, 2, seed + 1)
        mask = torch.rand(2, *CELLS, generator=torch.Generator().manual_seed(seed)) < share
        made, _ = background().compose(base, edit, mask)
        weight = background().weights(mask)[..., None]
        old, new = (torch.from_numpy(pixels_of(each)) for each in (base, edit))
        mixed = old.float() + weight * (new.float() - old.float())
        mixed = mixed.round() if kind == "pil" else mixed.to(getattr(torch, kind)) if kind == "bfloat16" else mixed
        plain = torch.where(weight == 1, new, torch.where(weight == 0, old, mixed.to(old.dtype)))
        assert np.array_equal(pixels_of(made), plain.numpy())

    def test_a_mask_of_everything_gives_the_edit(self) -> None:
        base, edit = pictures("pil", 1, 1), pictures("pil", 1, 2)
        made, _ = background().compose(base, edit, torch.ones(1, *CELLS, dtype=torch.bool))
        assert np.array_equal(pixels_of(made), pixels_of(edit))

    @pytest.mark.parametrize("flagged", ["base", "edit"])
    def test_a_picture_that_the_safety_checker_blackened_is_left_and_named(
        self, flagged: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        base, edit = pictures("np", 3, 1), pictures("np", 3, 2)
        (base if flagged == "base" else edit)[1] = 0
        flags: dict[str, Any] = {"base_flags": None, "edit_flags": [False] * 3}
        flags[f"{flagged}_flags"] = [False, True, False]
        with caplog.at_level(logging.WARNING, logger="fisedit_compile"):
            made, left = background().compose(base, edit, one_cell(3), **flags)
        assert left == (1,)
        assert "safety checker blackened the picture of sample(s) 1" in caplog.text
        assert np.array_equal(made[1], edit[1])
        for sample in (0, 2):
            assert np.array_equal(made[sample, 12:], base[sample, 12:])

    def test_pictures_unlike_the_base_s_are_refused(self) -> None:
        for edit in (pictures("np", 2, 2), pictures("np", 1, 2, (32, 24)), pictures("np", 1, 2)[..., :1]):
            with pytest.raises(ValueError, match=r"have to be alike.*background='latents'"):
                background().compose(pictures("np", 1, 1), edit, one_cell())


class TestOf:
    latents = torch.zeros(2, 4, *CELLS)

    @pytest.mark.parametrize("kind", ["pil", "np", "float32"])
    def test_stays_within_the_reach_of_the_decoder(self, kind: str) -> None:
        reach = decoder_reach(pipe().vae)
        made = PixelBackground.of(pipe(), pictures(kind, 2, 1), self.latents, {})
        assert made.shape == (16, 12, 3)
        assert made.grown > 0
        assert made.feathered > 0
        assert made.grown + made.feathered <= reach

    def test_the_scale_of_the_decoder_is_that_of_the_pictures(self) -> None:
        large = PixelBackground.of(pipe(), pictures("np", 2, 1, (56, 42)), self.latents, {})  # 7 pixels a cell
        far = large.weights(one_cell(2))[0] == 0
        rows = range(14 - large.grown - large.feathered + 1, 21 + large.grown + large.feathered - 1)
        assert far.shape == (56, 42)
        assert [row for row in range(56) if not far[row].all()] == [row for row in rows if row >= 0]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"pictures": pictures("np", 1, 1)}, r"1 picture\(s\) for 2 sample\(s\)"),
            ({"pictures": [*pictures("pil", 1, 1), *pictures("pil", 1, 1, (32, 24))]}, "several sizes"),
            ({"pictures": pictures("np", 2, 1, (17, 12))}, "17x12 pixels is not decoded from 8x6"),
            ({"pictures": torch.zeros(2, 4)}, r"a Tensor of shape \(2, 4\)"),
            ({"pictures": ["a", "b"]}, "as a list, not as output_type 'pil', 'np' or 'pt'"),
            ({"pictures": []}, "as a list"),
            ({"pipe": SimpleNamespace()}, "has no vae"),
            ({"pipe": SimpleNamespace(vae=None)}, "has no vae"),
            ({"arguments": {"padding_mask_crop": 32}}, "padding_mask_crop"),
        ],
    )
    def test_what_cannot_be_put_together_is_refused_with_the_way_out(self, given: dict[str, Any], message: str) -> None:
        arguments = {"pipe": pipe(), "pictures": pictures("np", 2, 1), "arguments": {}, **given}
        with pytest.raises(ValueError, match=f"{message}.*background='latents'"):
            PixelBackground.of(arguments["pipe"], arguments["pictures"], self.latents, arguments["arguments"])


CAT, DOG = "a cat on a green background", "a dog on a green background"


@pytest.fixture(scope="module")
def editor() -> Editor:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(Path(__file__).parents[2] / "examples" / "demo_model")
    pipe.set_progress_bar_config(disable=True)
    return Editor(pipe, {"dense_below": 8, "dense_steps": 1})


def generate(editor: Editor, output_type: str) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    size = {"height": 64, "width": 128}
    return editor.generate(
        [CAT, CAT], num_inference_steps=2, generator=generators, output_type=output_type, guidance_scale=5.0, **size
    )


class TestEditsOfAPipeline:
    mask = torch.zeros(2, 16, 32, dtype=torch.bool)
    mask[0, 2:6, 2:6] = mask[1, 9:14, 22:28] = True

    @pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
    def test_far_pixels_are_the_base_s_and_those_of_the_mask_the_decoder_s(
        self, editor: Editor, output_type: str
    ) -> None:
        base = generate(editor, output_type)
        edit = editor.edit(base, [DOG, DOG], self.mask)
        raw = editor.edit(base, [DOG, DOG], self.mask, background="latents")
        assert torch.equal(edit.latents, raw.latents)
        old, new, decoded = (pixels_of(each.images) for each in (base, edit, raw))
        pixels = self.mask.repeat_interleave(4, 1).repeat_interleave(4, 2).float()
        reach = decoder_reach(editor.pipe.vae)
        far = F.max_pool2d(pixels, 2 * reach + 1, stride=1, padding=reach).numpy() == 0
        assert far.any()
        assert np.array_equal(new[far], old[far])
        assert not np.array_equal(decoded[far], old[far])  # what the decoder alone would do
        inside = pixels.numpy() == 1
        dense = np.abs(new[inside].astype(float) - decoded[inside])
        assert 0 < dense.mean() < 0.02 * (255 if output_type == "pil" else 1)  # the norms' statistics are the base's
        assert (edit.report.decoder, raw.report.decoder) == ("sparse", "dense (background='latents')")
        assert (edit.report.background, edit.report.uncomposed) == ("pixels", ())
        assert "background identical in pixels" in str(edit.report)
        assert "background identical in latents" in str(raw.report)

    def test_a_blackened_picture_stays_black_and_is_reported(
        self, editor: Editor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = generate(editor, "np")

        def check(image: Tensor, *_: object) -> tuple[Tensor, list[bool]]:
            image[1] = 0
            return image, [False, True]

        monkeypatch.setattr(editor.pipe, "run_safety_checker", check)
        edit = editor.edit(base, [DOG, DOG], self.mask)
        assert edit.report.uncomposed == (1,)
        assert "not in sample(s) 1: blackened" in str(edit.report)
        assert not edit.images[1].any()
        assert np.array_equal(edit.images[0, :, 64:], base.images[0, :, 64:])

    def test_another_word_for_the_background_is_refused(self, editor: Editor) -> None:
        with pytest.raises(ValueError, match=r"background='picture': choose 'pixels' or 'latents'"):
            editor.edit(generate(editor, "np"), [DOG, DOG], self.mask, background="picture")  # type: ignore[arg-type]
