"""The paper's figures, by a CLIP of random weights: what they are by definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.small_tokenizers import byte_pairs
from transformers import CLIPImageProcessor, CLIPModel

from fisedit_compile.quality.clip_scores import Clip

WORDS = ("a cat on the left", "a dog on the left")


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Clip:
    return Clip.load(clip_folder)


def picture(seed: int) -> Any:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8))


def test_figures_are_cosines_of_the_embeddings(clip_folder: Path, clip: Clip) -> None:
    model, pictures = CLIPModel.from_pretrained(clip_folder).eval(), [picture(0), picture(1)]
    tokens = byte_pairs()(list(WORDS), return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(pictures, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, **pixels)
    images, texts = out.image_embeds.double().numpy(), out.text_embeds.double().numpy()
    figures = clip.score(*pictures, *WORDS)
    assert figures.image_similarity == pytest.approx(images[0] @ images[1], abs=1e-5)
    steps = images[1] - images[0], texts[1] - texts[0]
    cosine = steps[0] @ steps[1] / np.linalg.norm(steps[0]) / np.linalg.norm(steps[1])
    assert figures.directional_similarity == pytest.approx(cosine, abs=1e-4)
    assert figures.follows == (images[1] @ texts[1] > images[1] @ texts[0])


def test_the_other_way_round_the_direction_is_the_same_and_backwards_it_is_opposite(clip: Clip) -> None:
    there = clip.score(picture(0), picture(1), *WORDS)
    back = clip.score(picture(1), picture(0), *reversed(WORDS))
    against = clip.score(picture(1), picture(0), *WORDS)
    assert back.directional_similarity == pytest.approx(there.directional_similarity, abs=1e-5)
    assert against.directional_similarity == pytest.approx(-there.directional_similarity, abs=1e-5)
    assert back.image_similarity == pytest.approx(there.image_similarity, abs=1e-5)
    assert abs(there.directional_similarity) > 1e-3


def test_features_are_the_embeddings_of_pictures_whatever_stands_beside_them(clip_folder: Path, clip: Clip) -> None:
    features = clip.features([picture(0), picture(1)])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(features[1:], clip.features([picture(1)]))
    similarity = clip.score(picture(0), picture(1), *WORDS).image_similarity
    assert float(features[0] @ features[1]) == pytest.approx(similarity, abs=1e-5)


def test_weights_in_half_precision_are_computed_with_in_single(clip_folder: Path, tmp_path: Path, clip: Clip) -> None:
    CLIPModel.from_pretrained(clip_folder).half().save_pretrained(tmp_path)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    features = Clip.load(tmp_path).features([picture(0)])
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, clip.features([picture(0)]), atol=1e-2, rtol=0)


def test_an_edit_that_follows_the_words_one_way_does_not_follow_them_the_other_way(clip: Clip) -> None:
    there, back = (clip.score(picture(0), picture(2), *words) for words in (WORDS, tuple(reversed(WORDS))))
    assert there.follows != back.follows


def test_equal_pictures_are_as_near_as_can_be(clip: Clip) -> None:
    assert clip.score(picture(0), picture(0), *WORDS).image_similarity == pytest.approx(1, abs=1e-5)


def test_a_folder_without_such_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder of a CLIP model"):
        Clip.load(tmp_path)
