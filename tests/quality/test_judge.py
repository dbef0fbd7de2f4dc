"""The judge of the demo model on rendered scenes, whose truth is known, and its files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.demo_pipelines import EXAMPLES

from fisedit_compile.quality.cases import Item, Scene, load_cases
from fisedit_compile.quality.judge import Judge, cut_windows, shrink
from fisedit_compile.quality.judge_network import PICTURE
from fisedit_compile.quality.verdicts import shows

FOLDER = EXAMPLES / "demo_model" / "judge"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(FOLDER)


def drawn(scenes: list[Scene]) -> list[Any]:
    """Pictures of what cases say, rendered; objects are moved and scaled at random."""
    from demo_world import edits
    from demo_world.renderer import Renderer
    from demo_world.scene import WIDTHS
    from demo_world.scene import Scene as RenderedScene

    rng = np.random.default_rng(5)
    rendered = []
    for scene in scenes:
        objects = []
        for place, item in scene.items.items():
            low, high = WIDTHS[edits.SIZES[item.size]]
            jitter = (float(rng.uniform(-6, 6)), float(rng.uniform(-6, 6)))
            objects.append(edits.place_item(edits.Item(**vars(item)), place, float(rng.uniform(low, high)), jitter))
        background = edits.place_background(scene.background, tuple(rng.random(8).tolist()))
        rendered.append(RenderedScene(tuple(objects), background))
    levels = (255 * Renderer().render(rendered)[0]).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each) for each in levels]


def test_it_is_small_and_says_how_good_it_is(judge: Judge) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3e6
    assert set(judge.config.accuracy) == {"name", "colour", "accessory", "background"}
    assert all(0.9 < share <= 1 for share in judge.config.accuracy.values())


def test_it_knows_all_cases(judge: Judge) -> None:
    for case in load_cases():
        judge.check(case.before)
        judge.check(case.after)


def test_it_sees_in_rendered_pictures_what_is_there(judge: Judge) -> None:
    cases = load_cases("all", 40)
    scenes = [scene for case in cases for scene in (case.before, case.after)]
    right = [
        shows(judge.look(picture, scene), scene, place)
        for picture, scene in zip(drawn(scenes), scenes, strict=True)
        for place in (*scene.items, "background")
    ]
    assert np.mean(right) > 0.9


def test_it_tells_the_two_pictures_of_a_case_apart(judge: Judge) -> None:
    cases = load_cases("all", 40)
    pictures = drawn([case.before for case in cases])
    taken_for_edits = [
        shows(judge.look(picture, case.after), case.after, case.changed)
        for picture, case in zip(pictures, cases, strict=True)
    ]
    assert np.mean(taken_for_edits) < 0.1


@pytest.mark.parametrize(
    ("item", "background", "word"),
    [
        (Item("platypus", "", "none", "medium"), "green", "platypus"),
        (Item("cat", "", "wig", "medium"), "green", "wig"),
        (Item("car", "beige", "none", "medium"), "green", "beige"),
        (Item("cat", "", "none", "huge"), "green", "huge"),
        (Item("cat", "", "none", "small"), "in a cave", "in a cave"),
    ],
)
def test_a_scene_that_it_does_not_know_is_refused(judge: Judge, item: Item, background: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        judge.check(Scene({"left": item}, background))


def test_a_window_is_what_is_at_its_place() -> None:
    picture = torch.zeros(1, 3, 64, 64)
    picture[:, 0, 16:32, 32:48] = 1
    box = torch.tensor([[40 / 64, 24 / 64, 16 / 64]])
    assert torch.equal(cut_windows(picture, box, 8)[0, 0], torch.ones(8, 8))
    wider = cut_windows(picture, torch.tensor([[40 / 64, 24 / 64, 32 / 64]]), 8)[0, 0]
    assert torch.equal(wider[2:6, 2:6], torch.ones(4, 4))
    assert wider.sum() == 16
    assert shrink(picture).shape == (1, 3, PICTURE, PICTURE)
    assert shrink(picture).sum() * (64 / PICTURE) ** 2 == 256


def test_training_makes_a_judge_that_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train_judge

    options = ["--out", str(tmp_path), "--scenes", "64", "--held-out", "32", "--steps", "3", "--batch", "16"]
    monkeypatch.setattr(sys, "argv", ["train_judge.py", *options])
    train_judge.main()
    untrained = Judge.load(tmp_path)
    assert untrained.config.names == Judge.load(FOLDER).config.names
    assert untrained.config.accuracy["name"] < 0.5
