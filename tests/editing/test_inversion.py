"""Bases of pictures that no model drew."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support.pipelines import CONFIG, EDIT, PROMPT, left_half, tiny_pipeline

from fisedit_compile import Base, Editor
from fisedit_compile.editing import inversion
from fisedit_compile.editing.stride import visit
from fisedit_compile.sparse_unet import SparseUNet
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6
SETTINGS: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0}


def photo(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    """Soft blobs of colour."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def base(tiny_editor: Editor) -> Base:
    return tiny_editor.invert(photo(), PROMPT, **SETTINGS)


def latents_of(pipe: Any, picture: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        encoded: torch.Tensor = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    return encoded


def test_the_base_is_the_picture(tiny_editor: Editor, base: Base) -> None:
    assert np.array_equal(base.image, photo())
    assert_close(base.latents, latents_of(tiny_editor.pipe, photo()))
    assert base.num_inference_steps == STEPS
    assert base.arguments["latents"].shape == base.latents.shape


@pytest.mark.parametrize("prompt", [PROMPT, ""], ids=["words", "no words"])
def test_pixels_far_from_the_mask_are_the_picture_s(tiny_editor: Editor, prompt: str) -> None:
    base = tiny_editor.invert(photo(64, 32), prompt, **SETTINGS)
    mask = torch.zeros(16, 32, dtype=torch.bool)
    mask[4:8, 2:6] = True
    edit = tiny_editor.edit(base, EDIT, mask)
    assert edit.report.background_identical
    assert np.array_equal(np.array(edit.image)[:, 56:], np.array(photo(64, 32))[:, 56:])
    assert not np.array_equal(edit.image, photo(64, 32))


@pytest.fixture(scope="module")
def quiet() -> Editor:
    """Its model says little, as a trained one does, so that a rounding stays one; all of its steps are dense."""
    pipe = tiny_pipeline()
    pipe.unet.conv_out.weight.data.mul_(0.1)
    return Editor(pipe, {"dense_steps": STEPS, "cross_replace": 0.0})


def test_dense_steps_of_unchanged_words_follow_the_picture(quiet: Editor) -> None:
    """The scheduler's own steps would leave it, and a mask would be found of that."""
    editor = quiet
    base = editor.invert(photo(), PROMPT, **SETTINGS)
    same = editor.edit(base, PROMPT, negative_prompt="", dense=True, background="latents")
    own = editor.pipe(PROMPT, output_type="latent", latents=base.arguments["latents"], **SETTINGS).images
    followed, left = (float((each - base.latents).abs().max()) for each in (same.latents, own))
    assert followed < 1e-3 < 1e-2 < left


def test_a_mask_is_found(tiny_editor: Editor, base: Base) -> None:
    edit = tiny_editor.edit(base, EDIT)
    assert edit.report.mask_source == "found"
    assert edit.report.background_identical


def test_each_evaluation_brings_the_noise_nearer(quiet: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """To noise from which the scheduler's own steps lead back."""
    distances = []
    for evaluations in (1, 2, 4):
        monkeypatch.setattr(inversion, "EVALUATIONS", evaluations)
        base = quiet.invert(photo(), PROMPT, **SETTINGS)
        again = quiet.pipe(
            PROMPT,
            latents=base.arguments["latents"],
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            output_type="latent",
        ).images
        distances.append(float((again - base.latents).abs().mean()))
    assert distances[0] > distances[1] > distances[2]


def test_each_evaluation_of_long_steps_brings_the_noise_nearer(monkeypatch: pytest.MonkeyPatch, quiet: Editor) -> None:
    """To noise from which the visited steps lead back."""
    pipe, distances = quiet.pipe, []
    editor = Editor(pipe, {"dense_steps": STEPS, "cross_replace": 0.0, "stride": 2})
    for evaluations in (1, 2, inversion.OF_LONG_STEPS):
        monkeypatch.setattr(inversion, "OF_LONG_STEPS", evaluations)
        base = editor.invert(photo(), PROMPT, **SETTINGS)
        with monkeypatch.context() as patch:
            scheduler = copy.deepcopy(pipe.scheduler)
            visit(scheduler, STEPS, base.visits, lambda: None)
            patch.setattr(pipe, "scheduler", scheduler)
            settings = {"num_inference_steps": len(base.visits), "guidance_scale": 1.0, "output_type": "latent"}
            again = pipe(PROMPT, latents=base.arguments["latents"], **settings).images
        distances.append(float((again - base.latents).abs().mean()))
    assert distances[0] > distances[1] > distances[2]


@pytest.mark.parametrize("scheduler", [name for name in inversion.INVERTIBLE if name != "DDIMScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_other_schedulers(
    tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch, scheduler: str, prediction: str
) -> None:
    made = getattr(diffusers, scheduler)(steps_offset=1, prediction_type=prediction)
    monkeypatch.setattr(tiny_editor.pipe, "scheduler", made)
    base = tiny_editor.invert(photo(), PROMPT, **SETTINGS)
    assert tiny_editor.edit(base, EDIT, left_half()).report.background_identical


def test_several_pictures_and_a_stride(tiny_editor_with: Callable[..., Editor]) -> None:
    editor = tiny_editor_with(stride=2)
    base = editor.invert([photo(), photo(seed=1)], [PROMPT, "an apple"], **SETTINGS)
    assert len(base.visits) < STEPS
    edit = editor.edit(base, [EDIT, "an apple"])
    assert torch.equal(edit.latents[1], base.latents[1])
    assert np.array_equal(edit.images[1], photo(seed=1))


@pytest.mark.parametrize(("stride", "visited", "evaluations"), [(1, 6, 2), (2, 3, 3)])
def test_the_unet_is_called_at_the_steps_that_edits_visit_alone(
    tiny_editor_with: Callable[..., Editor],
    monkeypatch: pytest.MonkeyPatch,
    stride: int,
    visited: int,
    evaluations: int,
) -> None:
    editor, calls = tiny_editor_with(stride=stride), Counter[str]()
    for name in ("dense", "record"):
        method = getattr(SparseUNet, name)

        def counted(*args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
            calls[name] += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(SparseUNet, name, counted)
    base = editor.invert(photo(), PROMPT, **SETTINGS)
    assert len(base.visits) == len(base.calls) == visited
    assert [call.step for call in base.calls] == list(base.visits)
    assert calls == {"dense": evaluations * visited, "record": visited}
    assert base.num_inference_steps == STEPS
    edit = editor.edit(base, EDIT, left_half())
    assert edit.report.sparse_steps == visited
    assert edit.report.background_identical


def test_a_saved_one_is_the_same(tiny_editor: Editor, base: Base, tmp_path: Any) -> None:
    base.save(tmp_path / "base")
    edits = [tiny_editor.edit(each, EDIT, left_half()) for each in (base, tiny_editor.load(tmp_path / "base"))]
    assert torch.equal(edits[0].latents, edits[1].latents)
    assert np.array_equal(edits[0].image, edits[1].image)


def test_pictures_are_read_as_they_are_meant(tiny_editor: Editor, base: Base) -> None:
    turned = photo().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.info["exif"] = exif.tobytes()
    opaque = photo().convert("RGBA")
    for picture in (turned, opaque):
        assert np.array_equal(tiny_editor.invert(picture, PROMPT, **SETTINGS).image, photo())
    gray = tiny_editor.invert(photo().convert("L"), PROMPT, **SETTINGS)
    assert np.array_equal(gray.image, photo().convert("L").convert("RGB"))


def animated() -> Image.Image:
    file = io.BytesIO()
    photo().save(file, "GIF", save_all=True, append_images=[photo(seed=1)])
    return Image.open(file)


def truncated() -> Image.Image:
    file = io.BytesIO()
    photo(64, 64).save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue()[:-200]))


def transparent() -> Image.Image:
    picture = photo().convert("RGBA")
    picture.putpixel((3, 3), (0, 0, 0, 0))
    return picture


@pytest.mark.parametrize(
    ("picture", "arguments", "message"),
    [
        ("photo.png", {}, "photo is a str: give a PIL image"),
        (np.zeros((32, 32, 3)), {}, "photo is a ndarray: give a PIL image"),
        ([], {}, "photo is a list of 0, .*: give a PIL image"),
        (photo(66, 66), {}, r"a picture of 66x66: .* draws 32x32, and is shown at most 4 times as much; give box="),
        (photo(20000, 32), {}, "a picture of 20000x32: .* give box="),
        (photo(), {"box": (0, 0, 33, 32)}, r"box=\(0, 0, 33, 32\) is no part of a picture of 32x32"),
        (photo(), {"box": (8, 8, 8, 32)}, "left < right, upper < lower"),
        (photo(), {"box": "all"}, "box='all': give left, upper, right and lower edge in pixels"),
        (truncated(), {}, "the picture cannot be read to its end"),
        ([photo(), photo(64, 32)], {}, "pictures of 32x32, 64x32: give pictures of one size"),
        (animated(), {}, "a picture of 2 frames"),
        (transparent(), {}, "transparent in parts"),
        (photo().convert("I"), {}, "mode 'I', which is not 8 bits"),
        (photo(), {"latents": torch.zeros(1)}, "latents: the picture decides it"),
        (photo(), {"height": 64}, "height: the picture decides it"),
        (photo(), {"num_images_per_prompt": 2}, "num_images_per_prompt: an inverted picture is one"),
        (photo(), {"eta": 0.5}, "adds noise at each step"),
        (photo(), {"prompt": ["a cat", "a dog"]}, r"2 prompt\(s\) for 1 picture\(s\)"),
        (photo(), {"steps": 3}, "steps=3: .* does not take it"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_what_is_refused_before_anything_is_computed(
    tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch, picture: Any, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(type(tiny_editor.pipe.vae), "encode", lambda *_, **__: pytest.fail("something was computed"))
    with pytest.raises(ValueError, match=message):
        tiny_editor.invert(picture, **{"prompt": PROMPT, **SETTINGS, **arguments})


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
def test_schedulers_that_cannot_be_run_backwards_are_named(
    tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    monkeypatch.setattr(tiny_editor.pipe, "scheduler", getattr(diffusers, scheduler)(steps_offset=1))
    with pytest.raises(ValueError, match=f"{scheduler} cannot be run backwards"):
        tiny_editor.invert(photo(), PROMPT, **SETTINGS)


def test_a_pipeline_that_starts_from_pictures_is_refused() -> None:
    editor = Editor(diffusers.StableDiffusionImg2ImgPipeline(**tiny_pipeline().components), CONFIG)
    with pytest.raises(ValueError, match="StableDiffusionImg2ImgPipeline starts from pictures itself"):
        editor.invert(photo(), PROMPT, **SETTINGS)
