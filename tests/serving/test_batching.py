"""Edits that wait at one replica are made together, and each answer is what it is alone."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.pipelines import CONFIG, tiny_pipeline
from support.services import CAT, DOG, SETTINGS, Service, request, service

from fisedit_compile import BaseMemoryError, BaseMismatchError, Edit, Editor, MaskError
from fisedit_compile.serving.errors import PictureGoneError
from fisedit_compile.serving.picture_files import as_png, of_png
from fisedit_compile.serving.requests import Answer, EditRequest, Progress, Request

pytestmark = pytest.mark.usefixtures("one_thread")

APPLE, ON_APPLE = "an apple on the left", "a dog on the apple"


@pytest.fixture
def tiny(tmp_path: Path, tiny_editor: Editor) -> Iterator[Service]:
    """Four edits at a time; any two prompts are similar to it."""
    with service(tmp_path, tiny_editor, similar=-1.0, batch=4) as made:
        yield made


def ask(made: Service, *requests: Request, **options: Any) -> list[Any]:
    """The answers to requests all of which wait before the first is drawn; an error in the place of an answer."""

    async def one(what: Request) -> list[Any]:
        return [event async for event in made.front.answer(what, **options)]

    async def all_of_them() -> list[Any]:
        go = threading.Event()
        made.worker._thread.submit(lambda: None).result()  # it is idle
        made.worker._thread.submit(go.wait)
        tasks = [asyncio.create_task(one(each)) for each in requests]
        while len(made.worker._queue) < len(requests):
            await asyncio.sleep(0.01)
        go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    events = asyncio.run(all_of_them())
    return events if options else [each if isinstance(each, Exception) else each[-1] for each in events]


def new(made: Service, *requests: Request) -> list[Answer]:
    """New pictures, one after the other."""
    return [ask(made, each)[0] for each in requests]


def left_half() -> bytes:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    return as_png(mask)


def together(answers: list[Any]) -> list[int]:
    return [answer.report.get("made_together", 0) for answer in answers]


def assert_same(answer: Answer, want: Any) -> None:
    off = np.asarray(of_png(answer.png), dtype=int) - np.asarray(want)
    assert np.abs(off).max() <= 1


def drawn(editor: Editor, prompt: str, seed: int) -> Any:
    seeded = torch.Generator().manual_seed(seed)
    return editor.generate(prompt, num_inference_steps=4, guidance_scale=5.0, generator=seeded, width=32, height=32)


def test_edits_that_wait_are_made_together(tiny: Service, tiny_editor: Editor) -> None:
    cat, apple = new(tiny, request(CAT, reuse="never"), request(APPLE, seed=4, reuse="never"))
    mask = left_half()
    changed = [EditRequest(cat.id, DOG, mask), EditRequest(apple.id, DOG, mask, negative_prompt="cat")]
    answers = ask(tiny, *changed, EditRequest(cat.id, ON_APPLE, mask), EditRequest(apple.id, ON_APPLE, mask))
    assert together(answers) == [4] * 4
    bases = {cat.id: drawn(tiny_editor, CAT, 3), apple.id: drawn(tiny_editor, APPLE, 4)}
    for answer, prompt, words in zip(answers, (DOG, DOG, ON_APPLE, ON_APPLE), (None, "cat", None, None), strict=True):
        changes = {} if words is None else {"negative_prompt": words}
        assert_same(answer, tiny_editor.edit(bases[answer.reuse.base], prompt, of_png(mask), **changes).image)
        assert tiny.library.get(answer.id).png == answer.png


def test_similar_pictures_are_changed_together(tiny: Service, tiny_editor: Editor) -> None:
    cat, _ = new(tiny, request(CAT, reuse="never"), request(CAT, seed=4, reuse="never"))
    for prompt in (DOG, APPLE):
        tiny.words.encode(prompt)  # so that requests wait in the order in which they are made
    answers = ask(tiny, request(DOG), request(APPLE), request(DOG, seed=4))
    assert sorted(together(answers)) == [1, 2, 2]  # a power of two; which of them wait first is a matter of threads
    assert [answer.reuse.kind for answer in answers] == ["edit"] * 3
    assert answers[0].reuse.base == cat.id
    for answer, prompt, seed in zip(answers, (DOG, APPLE, DOG), (3, 3, 4), strict=True):
        assert_same(answer, tiny_editor.edit(drawn(tiny_editor, CAT, seed), prompt, cross_replace=0).image)


def test_what_does_not_fit_is_drawn_by_itself(tiny: Service) -> None:
    other = dataclasses.replace(SETTINGS, width=48)
    cat, wide = new(tiny, request(CAT, reuse="never"), request(CAT, settings=other, reuse="never"))
    mask = left_half()
    answers = ask(
        tiny,
        EditRequest(cat.id, DOG, mask),
        EditRequest(wide.id, DOG, mask),
        EditRequest(cat.id, DOG, mask, guidance=6.0),
        EditRequest(cat.id, DOG),
        request(DOG, reuse="never"),
        EditRequest(cat.id, APPLE, mask),
        EditRequest(wide.id, APPLE, mask),
    )
    assert together(answers) == [2, 2, 1, 1, 0, 2, 2]
    tiny.names()
    tiny.bases.drop()
    answers = ask(tiny, EditRequest(cat.id, DOG, mask), EditRequest(cat.id, APPLE, mask))
    assert together(answers) == [1, 1]  # nobody waits for a base that has to be read first


def test_bases_wait_while_somebody_waits_for_a_picture(tiny: Service) -> None:
    quiet: list[bool] = []
    draw = tiny.engine.draw_together

    def watched(*arguments: Any) -> None:
        quiet.append(tiny.bases.quiet.is_set())
        draw(*arguments)

    tiny.engine.draw_together = watched
    new(tiny, request(CAT, reuse="never"), request(APPLE, seed=4, reuse="never"))
    assert quiet == [False, False]
    assert tiny.bases.quiet.wait(10)


def test_the_next_picture_is_drawn_while_one_is_written(tiny: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    add, generate, both = tiny.library.add, tiny.engine.editor.generate, threading.Event()
    calls: list[str] = []

    def slow(picture: Any) -> None:
        assert both.wait(60), "the second picture waits until the first is written"
        add(picture)

    def watched(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments[0])
        if len(calls) == 2:
            both.set()
        return generate(*arguments, **named)

    monkeypatch.setattr(tiny.library, "add", slow)
    monkeypatch.setattr(tiny.engine.editor, "generate", watched)
    answers = ask(tiny, request(CAT, reuse="never"), request(APPLE, seed=4, reuse="never"))
    assert sorted(calls) == sorted(answer.prompt for answer in answers) == sorted([CAT, APPLE])
    assert tiny.library.count() == 2


@pytest.mark.parametrize("kind", ["new", "edit"])
def test_nothing_is_kept_of_a_picture_that_cannot_be_written(
    tiny: Service, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (cat,) = new(tiny, request(CAT, reuse="never"))
    asked = request(DOG, reuse="never") if kind == "new" else EditRequest(cat.id, DOG, left_half())

    def fail(_: Any) -> None:
        raise OSError("no space left on the disk")

    with monkeypatch.context() as patched:
        patched.setattr(tiny.library, "add", fail)
        (answer,) = ask(tiny, asked)
    assert isinstance(answer, OSError)
    assert tiny.library.count() == 1
    assert list(tiny.bases._held) == [cat.id]
    assert not tiny.engine.recall._edits
    assert ask(tiny, asked)[0].prompt == DOG


def test_one_at_a_time(tmp_path: Path, tiny_editor: Editor) -> None:
    with service(tmp_path, tiny_editor, similar=-1.0) as made:
        new(made, request(CAT, reuse="never"))
        assert together(ask(made, request(DOG), request(APPLE))) == [1, 1]


def test_a_mask_that_is_too_large_is_a_new_picture(tmp_path: Path) -> None:
    editor = Editor(tiny_pipeline(), {**CONFIG, "dense_above": 0.01})
    with service(tmp_path, editor, similar=-1.0, batch=2) as made:
        new(made, request(CAT, reuse="never"))
        answers = ask(made, request(DOG), request(APPLE))
    for answer, prompt in zip(answers, (DOG, APPLE), strict=True):
        assert answer.reuse.kind == "none"
        assert answer.reuse.why.startswith("the mask that was found covers")
        assert of_png(answer.png).tobytes() == drawn(editor, prompt, 3).image.tobytes()


def test_one_that_fails_is_the_only_one(tiny: Service, tiny_editor: Editor) -> None:
    (cat,) = new(tiny, request(CAT, reuse="never"))
    nothing = as_png(Image.new("L", (32, 32)))
    answers = ask(
        tiny,
        EditRequest(cat.id, DOG, left_half()),
        EditRequest(cat.id, APPLE, nothing),
        EditRequest(cat.id, CAT, left_half()),
        EditRequest(cat.id, ON_APPLE, left_half()),
    )
    assert [type(each) for each in answers] == [Answer, MaskError, ValueError, Answer]
    base = drawn(tiny_editor, CAT, 3)
    for i, prompt in ((0, DOG), (3, ON_APPLE)):
        assert_same(answers[i], tiny_editor.edit(base, prompt, of_png(left_half())).image)
    assert tiny.library.count() == 3


@pytest.mark.parametrize("error", [BaseMismatchError("they do not fit"), BaseMemoryError("no room for two")], ids=repr)
def test_what_cannot_be_made_together_is_made_alone(
    tiny: Service, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    (cat,) = new(tiny, request(CAT, reuse="never"))
    edit_many = tiny.engine.editor.edit_many

    def alone(requests: Any, **options: Any) -> Any:
        if len(requests) > 1:
            raise error
        return edit_many(requests, **options)

    monkeypatch.setattr(tiny.engine.editor, "edit_many", alone)
    answers = ask(tiny, EditRequest(cat.id, DOG, left_half()), EditRequest(cat.id, APPLE, left_half()))
    assert together(answers) == [1, 1]


def test_steps_are_told_and_pictures_shown_of_each(tiny: Service, tiny_editor: Editor) -> None:
    (cat,) = new(tiny, request(CAT, reuse="never"))
    wanted = [EditRequest(cat.id, DOG, left_half()), EditRequest(cat.id, ON_APPLE, left_half())]
    both = ask(tiny, *wanted, progress=True, partial_pictures=1)
    alone = [ask(tiny, each, progress=True, partial_pictures=1)[0] for each in wanted]
    for (*steps, answer), (*want, last) in zip(both, alone, strict=True):
        assert [(each.step, each.steps) for each in steps] == [(i, 4) for i in range(1, 5)]
        for got, expected in zip(steps, want, strict=True):
            assert isinstance(got, Progress)
            assert (got.png is None) is (expected.png is None)
            if got.png is not None:
                off = np.asarray(of_png(got.png), dtype=int) - np.asarray(of_png(expected.png))
                assert np.abs(off).max() <= 1
        assert_same(answer, of_png(last.png))
        assert (answer.report["made_together"], last.report["made_together"]) == (2, 1)
        assert answer.report["macs_ratio"] == pytest.approx(last.report["macs_ratio"])


@pytest.mark.parametrize("leaving", [1, 2])
def test_who_leaves_ends_what_nobody_waits_for(tiny: Service, tiny_editor: Editor, leaving: int) -> None:
    settings = dataclasses.replace(SETTINGS, steps=40)
    cat, _ = new(tiny, request(CAT, reuse="never", settings=settings), request(CAT, reuse="never"))
    seen: list[int] = []

    async def watch(what: Request, first: asyncio.Event) -> Answer | None:
        async for event in tiny.front.answer(what, progress=True):
            if isinstance(event, Answer):
                return event
            first.set()
            seen.append(event.step)
        return None

    async def leave() -> list[Any]:
        go, first = threading.Event(), asyncio.Event()
        tiny.worker._thread.submit(go.wait)
        requests = [EditRequest(cat.id, prompt, left_half()) for prompt in (DOG, ON_APPLE)]
        tasks = [asyncio.create_task(watch(each, first)) for each in requests]
        while len(tiny.worker._queue) < 2:
            await asyncio.sleep(0.01)
        go.set()
        await first.wait()
        for task in tasks[:leaving]:
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        (last,) = [event async for event in tiny.front.answer(EditRequest(cat.id, APPLE, left_half()))]
        return [*answers, last]

    *answers, last = asyncio.run(leave())
    assert all(isinstance(each, asyncio.CancelledError) for each in answers[:leaving])
    assert tiny.library.count() == 2 + (2 - leaving) + 1
    if leaving == 1:
        assert answers[1].report["made_together"] == 2
        assert seen[-1] == 20
    else:
        assert max(seen) < 20
    assert last.report["made_together"] == 1
    assert tiny.front.waiting == 0


@pytest.mark.parametrize(("levels", "beside"), [(0, 1), (1, 1), (40, 1), (0, 0), (1, 0)])
def test_a_picture_whose_base_is_gone_is_made_again_but_for_rounding(
    tiny: Service, monkeypatch: pytest.MonkeyPatch, levels: int, beside: int
) -> None:
    """The number of edits that were made together rounds otherwise; what was answered stays the background."""
    (cat,) = new(tiny, request(CAT, reuse="never"))
    others = [EditRequest(cat.id, APPLE, left_half())] * beside
    dog, *_ = ask(tiny, EditRequest(cat.id, DOG, left_half()), *others)
    tiny.engine.recall._edits.clear()
    make = tiny.engine.artist.edit

    def rounded(request: Any) -> Edit:
        edit = make(request)
        pixels = np.clip(np.asarray(edit.image, dtype=int) + levels, 0, 255).astype(np.uint8)
        return dataclasses.replace(edit, images=[Image.fromarray(pixels)])

    monkeypatch.setattr(tiny.engine.artist, "edit", rounded)
    (answer,) = ask(tiny, EditRequest(dog.id, ON_APPLE, left_half()))
    if levels > 16 * beside:  # one that was made alone has to be the same to the pixel
        assert isinstance(answer, PictureGoneError)
        return
    before, after = (np.asarray(of_png(each.png)) for each in (dog, answer))
    assert np.array_equal(before[:, 28:], after[:, 28:])
    assert not np.array_equal(before, after)
