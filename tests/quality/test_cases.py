"""The cases: that they are what the script makes, and that one thing changes in each."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.demo_pipelines import EXAMPLES, demo_pipeline
from support.pipelines import tiny_pipeline

from fisedit_compile.editing.prompt_alignment import changed_words
from fisedit_compile.quality.cases import KINDS, SIZES, Case, Item, check_words, load_cases

CASES = load_cases()
MODEL = EXAMPLES / "demo_model"


def test_the_file_is_what_the_script_writes() -> None:
    from demo_world.edits import FILE, build_cases

    assert json.loads(Path(FILE).read_text()) == build_cases()


def test_there_are_as_many_of_each_kind_and_of_all_sizes() -> None:
    assert Counter(case.kind for case in CASES) == dict.fromkeys(KINDS, 40)
    assert set(Counter((case.kind, case.size) for case in CASES).values()) == {13, 14}
    assert len({case.id for case in CASES}) == len({case.seed for case in CASES}) == 200


def test_a_subset_has_all_kinds_and_any_first_few_have_several() -> None:
    quick = load_cases("quick")
    assert Counter(case.kind for case in quick) == dict.fromkeys(KINDS, 4)
    assert {case.size for case in quick} == set(SIZES)
    assert [case.kind for case in load_cases("quick", 5)] == list(KINDS)
    assert load_cases("all", 20) == quick


@pytest.mark.parametrize("count", [0, 21])
def test_more_cases_than_there_are_is_an_error(count: int) -> None:
    with pytest.raises(ValueError, match="give 1 to 20"):
        load_cases("quick", count)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_one_thing_changes_and_the_words_say_so(case: Case) -> None:
    before, after = case.before, case.after
    differing = [place for place in before.items if before.items[place] != after.items[place]]
    differing += ["background"] if before.background != after.background else []
    assert differing == [case.changed]
    removed, added = changed_words(case.prompt, case.edit)
    for scene, prompt in ((before, case.prompt), (after, case.edit)):
        words = prompt.replace(",", "").split()
        for item in scene.items.values():
            assert item.name in words
            assert not item.colour or item.colour in words
            assert item.accessory == "none" or item.accessory in words
    if case.kind == "background":
        assert added or removed
        return
    old, new = before.items[case.changed], after.items[case.changed]
    assert old.size == new.size == case.size
    assert (case.changed == "left") == (case.prompt.index(old.name) < len(case.prompt) / 3)
    expected: dict[str, tuple[Item, str, str]] = {
        "object": (replace(old, name=new.name, colour=new.colour), old.name, new.name),
        "colour": (replace(old, colour=new.colour), old.colour, new.colour),
        "added": (replace(old, accessory=new.accessory), "", new.accessory),
        "removed": (replace(old, accessory="none"), old.accessory, ""),
    }
    changed, gone, come = expected[case.kind]
    assert new == changed
    assert not gone or gone in removed
    assert not come or come in added


def test_the_demo_models_tokenizer_knows_all_words() -> None:
    check_words(CASES, demo_pipeline())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda pipe: setattr(pipe, "tokenizer", None), "has no tokenizer"),
        (lambda pipe: setattr(pipe, "tokenizer", tiny_pipeline().tokenizer), "does not know .* and \\d+ more"),
        (lambda pipe: setattr(pipe.tokenizer, "model_max_length", 9), "reads 9 tokens"),
    ],
)
def test_a_model_that_does_not_read_the_words_is_refused(change: Any, match: str) -> None:
    pipe = demo_pipeline()
    change(pipe)
    if "9" not in match and pipe.tokenizer:
        pipe.tokenizer.model_max_length = 32
    with pytest.raises(ValueError, match=match):
        check_words(CASES, pipe)
