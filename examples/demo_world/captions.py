"""Scenes in plain English, in the few sentence shapes that the model is taught."""

from __future__ import annotations

import numpy as np

from .scene import DEFAULT_PLACES, Background, Scene, SceneObject, sample_scene
from .vocabulary import PLACES, SCENERY

VOWELS = "aeiou"
MAX_WORDS = 30  # the text encoder reads 32 tokens, two of them the marks of beginning and end


def article(word: str) -> str:
    """`word` after "a" or "an"."""
    # "a unicorn", but "an umbrella"
    return f"an {word}" if word[0] in VOWELS and not word.startswith("uni") else f"a {word}"


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A caption such as "a cat wearing a hat on the left and a star on the right , on a green background".

    A place goes unsaid only where it is the default one, so words always settle the layout; `rng` picks among
    sentences of equal meaning, and now and then leaves the background unsaid.
    """
    defaults = DEFAULT_PLACES[len(scene.objects)]
    usual = tuple(item.place for item in scene.objects) == defaults
    say_places = not (usual and rng.random() < 0.5)
    phrases = [_object_phrase(item, say_places, hat_first=rng.random() < 0.6) for item in scene.objects]
    subject = " and ".join(filter(None, (" , ".join(phrases[:-1]), phrases[-1])))
    if rng.random() < 0.06:
        return subject
    return f"{subject} , {_background_phrase(scene.background)}"


def describe_fully(scene: Scene) -> str:
    """The caption that says everything: each place, what is worn before it, and the background."""
    phrases = [_object_phrase(item, True, hat_first=True) for item in scene.objects]
    subject = " and ".join(filter(None, (" , ".join(phrases[:-1]), phrases[-1])))
    return f"{subject} , {_background_phrase(scene.background)}"


def _object_phrase(item: SceneObject, say_place: bool, hat_first: bool) -> str:
    adjectives = [item.size] if item.size != "normal" else []
    adjectives += [item.color] if item.color else []
    noun = article(" ".join([*adjectives, item.name]))
    wearing = f"wearing {article(item.accessory)}" if item.accessory else ""
    place = PLACES[item.place] if say_place else ""
    tail = (wearing, place) if hat_first else (place, wearing)
    return " ".join(filter(None, (noun, *tail)))


def _background_phrase(background: Background) -> str:
    if background.kind in SCENERY:
        return SCENERY[background.kind]
    return f"on {article(' and '.join(background.colors))} background"


def sample_captioned_scene(rng: np.random.Generator) -> tuple[Scene, str]:
    """A random scene and its caption, of at most `MAX_WORDS` words."""
    while True:
        scene = sample_scene(rng)
        caption = describe(scene, rng)
        if len(caption.split()) <= MAX_WORDS:
            return scene, caption
