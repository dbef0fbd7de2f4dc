"""The demo world: what it draws, what it says about it, and how the demo model reads that."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from demo_world import models  # noqa: E402
from demo_world.captions import MAX_WORDS, describe, sample_captioned_scene  # noqa: E402
from demo_world.renderer import LAYERS, Renderer, encode_scenes, render_scene  # noqa: E402
from demo_world.scene import CANVAS, Background, Scene, SceneObject, place_object  # noqa: E402
from demo_world.sprites import build_archive, load_sprites, sprite_index  # noqa: E402
from demo_world.vocabulary import OBJECTS, TINTABLE, TINTS, words  # noqa: E402


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return models.build_tokenizer()


def scene_of(*objects: SceneObject, background: Background | None = None) -> Scene:
    return Scene(objects, background or Background("plain", ("green",)))


def test_sampling_and_rendering_repeat_for_a_seed(renderer: Renderer) -> None:
    scenes = [sample_captioned_scene(np.random.default_rng(7)) for _ in range(2)]
    assert scenes[0] == scenes[1]
    images, alphas = renderer.render([scene for scene, _ in scenes])
    assert torch.equal(images[0], images[1])
    assert torch.equal(alphas[0], alphas[1])


def test_a_scene_looks_the_same_in_any_batch(renderer: Renderer) -> None:
    rng = np.random.default_rng(1)
    scenes = [sample_captioned_scene(rng)[0] for _ in range(6)]
    images, alphas = renderer.render(encode_scenes(scenes))
    for n, scene in enumerate(scenes):
        alone = render_scene(scene, renderer)
        torch.testing.assert_close(alone.image, images[n])
        assert alphas[n].sum() == pytest.approx(alone.masks.sum().item(), rel=1e-5)


def test_image_equals_background_outside_the_silhouettes(renderer: Renderer) -> None:
    scene = scene_of(place_object("cat", (0, 1), 84, accessory="crown"), place_object("car", (2, 1), 84, color="blue"))
    drawn = render_scene(scene, renderer)
    empty = render_scene(dataclasses.replace(scene, objects=()), renderer)
    outside = drawn.masks.sum(0) == 0
    assert 0.5 < outside.float().mean() < 0.95
    assert torch.equal(drawn.image[:, outside], empty.image[:, outside])
    assert drawn.labels == ("cat", "crown", "blue car")
    assert drawn.owners == (0, 0, 1)


def test_silhouettes_lie_where_the_objects_stand(renderer: Renderer) -> None:
    scene = scene_of(place_object("dog", (0, 0), 84), place_object("star", (2, 2), 84))
    for item, mask in zip(scene.objects, render_scene(scene, renderer).masks, strict=True):
        rows, columns = torch.nonzero(mask > 0.5, as_tuple=True)
        x, y = columns.float().mean() + 0.5, rows.float().mean() + 0.5
        assert abs(x - item.center[0]) < 8
        assert abs(y - item.center[1]) < 8
        assert columns.max() - columns.min() < item.width
        assert rows.max() - rows.min() < item.width


def test_a_covered_object_is_not_visible(renderer: Renderer) -> None:
    below = place_object("cat", (1, 1), 60)
    above = place_object("heart", (1, 1), 148)
    masks = render_scene(scene_of(below, above), renderer).masks
    alone = render_scene(scene_of(below), renderer).masks
    assert masks[0].sum() < 0.1 * alone[0].sum()
    assert (masks.sum(0) <= 1 + 1e-5).all()


def test_a_tint_changes_the_colour_and_not_the_silhouette() -> None:
    index, sprites = sprite_index(), load_sprites()
    assert len(sprites) == len(index) + 1 == 1 + len(OBJECTS) + 2 + len(TINTABLE) * len(TINTS)
    assert not sprites[0].any()
    for name in TINTABLE:
        red, blue = sprites[index[f"red {name}"]], sprites[index[f"blue {name}"]]
        assert torch.equal(red[3], blue[3])
        assert red[0].sum() > 1.3 * blue[0].sum(), name
        assert blue[2].sum() > 1.3 * red[2].sum(), name


def test_captions_have_only_known_words_and_fit_the_text_encoder(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = np.random.default_rng(2)
    captions = [sample_captioned_scene(rng)[1] for _ in range(300)]
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (300, MAX_WORDS + 2)
    assert not (ids == tokenizer.unk_token_id).any()
    assert {word for caption in captions for word in caption.split()} <= set(words())
    decoded = tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert decoded == captions[0]


def test_tokenizer_reads_plain_writing(tokenizer: PreTrainedTokenizerFast) -> None:
    typed = tokenizer("A cat, on a green background").input_ids
    assert typed == tokenizer("a cat , on a green background").input_ids
    assert typed[0] == tokenizer.bos_token_id
    assert typed[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id in tokenizer("a zeppelin").input_ids


def test_caption_says_what_the_scene_holds() -> None:
    scene = scene_of(
        place_object("apple", (0, 0), 140, color="red", size="big"),
        place_object("owl", (2, 1), 84, accessory="hat"),
        background=Background("gradient", ("orange", "white")),
    )
    rng = np.random.default_rng(0)
    said = {describe(scene, rng) for _ in range(60)}
    objects = "a big red apple at the top left and an owl wearing a hat on the right"
    assert f"{objects} , on an orange and white background" in said
    # These are not the default places, so no caption leaves them out.
    assert all("at the top left" in caption and "on the right" in caption for caption in said)


def test_archive_needs_every_sprite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="npm pack"):
        build_archive(tmp_path, tmp_path / "objects.npz")


def test_normalised_latents_decode_to_the_same_picture() -> None:
    torch.manual_seed(0)
    vae = models.build_vae().double().eval().requires_grad_(False)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    before = vae.encode(images).latent_dist
    decoded = vae.decode(before.mean).sample
    mean, std = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
    models.normalise_latents(vae, mean, std)
    after = vae.encode(images).latent_dist
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros_like(mean))
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones_like(std))
    torch.testing.assert_close(after.std * std[:, None, None], before.std)
    torch.testing.assert_close(vae.decode(after.mean).sample, decoded)


def test_sprites_stay_in_the_picture() -> None:
    for place in ((0, 0), (2, 2), (1, 0)):
        item = place_object("cat", place, 148, accessory="hat", jitter=(9.0, -9.0))
        assert all(item.width / 2 <= c <= CANVAS - item.width / 2 for c in item.center)
    assert LAYERS == 6
