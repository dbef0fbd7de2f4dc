"""The small CLIP: scenes that differ in one thing, its training, and the trained one against the renderer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from support.demo_pipelines import EXAMPLES

from fisedit_compile.quality.clip_scores import Clip

TRAINED = EXAMPLES / "demo_model" / "clip"


@pytest.mark.parametrize("kind", ["object", "colour", "added", "removed", "background", "swapped"])
def test_a_variation_differs_in_one_thing(kind: str) -> None:
    from demo_world.captions import describe_fully
    from demo_world.scene import sample_scene
    from demo_world.variations import vary

    rng, found = np.random.default_rng(3), 0
    while found < 20:
        before = sample_scene(rng)
        after = vary(before, kind, rng)
        if after is None:
            continue
        found += 1
        assert describe_fully(before) != describe_fully(after)
        changed = {
            field.name
            for one, other in zip(before.objects, after.objects, strict=True)
            for field in dataclasses.fields(one)
            if getattr(one, field.name) != getattr(other, field.name)
        }
        if kind == "background":
            assert not changed
            assert before.background.parameters == after.background.parameters
            continue
        assert before.background == after.background
        if kind == "swapped":
            assert {each.sprite for each in before.objects} == {each.sprite for each in after.objects}
            assert [each.place for each in before.objects] == [each.place for each in after.objects]
        else:
            word = {"object": {"name", "color"}, "colour": {"color"}}.get(kind, {"accessory"})
            assert word & changed <= changed <= word | {"center"}  # a hat needs room, so that its wearer may move


def test_captions_of_a_family_tell_its_scenes_apart() -> None:
    from demo_world.variations import sample_family

    rng = np.random.default_rng(0)
    for _ in range(50):
        family = sample_family(rng, 4)
        assert len(family.scenes) == len({*family.captions}) == 4


def test_training_saves_a_model_that_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import train_clip

    train_clip.main(["--out", str(tmp_path), "--smoke"])
    printed = capsys.readouterr().out
    assert "| background" in printed
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 6e6
    assert Clip.load(tmp_path)


@pytest.mark.skipif(not TRAINED.is_dir(), reason="examples/demo_model/clip is not trained: examples/train_clip.py")
def test_the_trained_one_tells_which_words_are_right() -> None:
    import train_clip

    *_, last = train_clip.report(Clip.load(TRAINED), count=20, seed=1).splitlines()
    assert float(last.split("|")[2]) > 0.9
