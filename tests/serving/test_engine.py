"""The engine and the front behind HTTP: what a request is answered with, and that it is the right picture."""

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

from fisedit_compile import BaseMemoryError, Editor, MaskError, PipelineInterruptedError
from fisedit_compile.serving.errors import BusyError, OtherPipelineError, PictureGoneError, WithheldPictureError
from fisedit_compile.serving.picture_files import as_png, of_png
from fisedit_compile.serving.picture_id import new_picture_id
from fisedit_compile.serving.requests import (
    Answer,
    EditRequest,
    GenerationRequest,
    PhotoRequest,
    Progress,
    Request,
    Similar,
)
from fisedit_compile.serving.tasks import Stop

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(tmp_path: Path, tiny_editor: Editor) -> Iterator[Service]:
    """Any two prompts are similar to it."""
    with service(tmp_path, tiny_editor, similar=-1.0) as made:
        yield made


def ask(made: Service, what: Request) -> Answer:
    async def last() -> Answer:
        answers = [event async for event in made.front.answer(what)]
        assert isinstance(answers[-1], Answer)
        return answers[-1]

    return asyncio.run(last())


def left_half() -> bytes:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    return as_png(mask)


def drawn(editor: Editor, prompt: str, seed: int = 3, steps: int = 4, **changes: Any) -> Any:
    return editor.generate(
        prompt,
        num_inference_steps=steps,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(seed),
        width=32,
        height=32,
        **changes,
    )


class TestWithoutBases:
    """A service that reuses nothing draws by the pipeline as it is."""

    def test_pictures_are_the_pipelines_and_can_be_edited(self, tmp_path: Path, tiny_editor: Editor) -> None:
        with service(tmp_path, tiny_editor, records=False, reuse="never") as made:
            first, again = ask(made, request()), ask(made, request())
            assert first.id != again.id
            assert first.png == again.png
            assert first.report == {"recorded": False}
            assert not made.bases.nbytes
            assert of_png(first.png).tobytes() == plain(tiny_editor.pipe, CAT).tobytes()
            edited = ask(made, EditRequest(first.id, DOG, left_half()))
            off = np.asarray(of_png(edited.png), int) - np.asarray(of_png(first.png))
            assert not off[:, 28:].any()
            assert off[:, :12].any()

    def test_one_that_comes_out_otherwise_than_by_rounding_is_not_edited(
        self, tmp_path: Path, tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = drawn(tiny_editor, CAT, seed=5)
        with service(tmp_path, tiny_editor, records=False, reuse="never") as made:
            first = ask(made, request())
            monkeypatch.setattr(made.engine.artist, "new_picture", lambda *_: other)
            with pytest.raises(PictureGoneError, match="what is drawn again of it is another picture"):
                ask(made, EditRequest(first.id, DOG, left_half()))

    def test_it_can_be_stopped(self, tmp_path: Path, tiny_editor: Editor) -> None:
        async def leave(made: Service) -> list[int]:
            seen = []
            async for event in made.front.answer(request(settings=settings), progress=True):
                assert isinstance(event, Progress)
                seen.append(event.step)
                break
            while made.front.waiting or made.worker._ending:
                await asyncio.sleep(0.01)
            return seen

        settings = dataclasses.replace(SETTINGS, steps=30)
        with service(tmp_path, tiny_editor, records=False, reuse="never") as made:
            assert asyncio.run(leave(made)) == [1]
            assert not made.library.count()
            assert of_png(ask(made, request()).png).tobytes() == plain(tiny_editor.pipe, CAT).tobytes()


def plain(pipe: Any, prompt: str) -> Image.Image:
    arguments = {"num_inference_steps": 4, "guidance_scale": 5.0, "width": 32, "height": 32}
    return pipe(prompt, generator=torch.Generator().manual_seed(3), **arguments).images[0]


class TestGeneration:
    def test_the_same_request_has_the_stored_picture(self, tiny: Service, tiny_editor: Editor) -> None:
        first, again = ask(tiny, request()), ask(tiny, request())
        assert first.reuse.kind == "none"
        assert (again.id, again.png, again.reuse.kind, again.reuse.base) == (first.id, first.png, "stored", first.id)
        assert of_png(first.png).tobytes() == drawn(tiny_editor, CAT).image.tobytes()

    def test_any_seed_takes_any_picture_of_the_words_and_a_seed_its_own(self, tiny: Service) -> None:
        first = ask(tiny, request(seed=3))
        assert ask(tiny, request(seed=None)).id == first.id
        other = ask(tiny, request(seed=4))
        assert (other.reuse.kind, other.reuse.why) == ("none", "there is no picture of these settings")
        assert other.png != first.png

    def test_never(self, tiny: Service) -> None:
        first, again = (ask(tiny, request(reuse="never")) for _ in range(2))
        assert first.id != again.id
        assert first.png == again.png
        assert again.reuse.why == "reuse is switched off"

    @pytest.mark.parametrize(
        "change", [{"steps": 5}, {"guidance": 4.0}, {"negative_prompt": "apple"}, {"width": 64}], ids=str
    )
    def test_other_settings_share_nothing(self, tiny: Service, change: dict[str, Any]) -> None:
        ask(tiny, request())
        settings = dataclasses.replace(SETTINGS, **change)
        assert ask(tiny, request(settings=settings)).reuse.kind == "none"
        assert ask(tiny, request(DOG, settings=settings)).reuse.base != ask(tiny, request()).id

    def test_a_similar_one_is_changed(self, tiny: Service, tiny_editor: Editor) -> None:
        base = ask(tiny, request())
        edited = ask(tiny, request(DOG))
        assert (edited.reuse.kind, edited.reuse.base) == ("edit", base.id)
        assert -1 <= edited.reuse.similarity <= 1
        assert edited.reuse.seconds_saved is not None
        want = tiny_editor.edit(drawn(tiny_editor, CAT), DOG, cross_replace=0)
        assert of_png(edited.png).tobytes() == want.image.tobytes()
        assert edited.reuse.mask_area == want.report.mask_area
        assert ask(tiny, request(DOG)).id == edited.id

    def test_one_that_is_not_similar_enough_is_drawn(self, tmp_path: Path, tiny_editor: Editor) -> None:
        with service(tmp_path, tiny_editor, similar=1.01) as made:
            ask(made, request())
            answer = ask(made, request(DOG))
        assert answer.reuse.kind == "none"
        assert answer.reuse.why.startswith("no stored request is as similar as 1.010; one has 0.")
        assert of_png(answer.png).tobytes() == drawn(tiny_editor, DOG).image.tobytes()

    def test_a_mask_that_is_too_large_is_a_new_picture(self, tmp_path: Path) -> None:
        editor = Editor(tiny_pipeline(), {**CONFIG, "dense_above": 0.01})
        with service(tmp_path, editor, similar=-1.0) as made:
            ask(made, request())
            answer = ask(made, request(DOG))
            assert answer.reuse.kind == "none"
            assert "of the picture, and largest_mask is 1%" in answer.reuse.why
            assert of_png(answer.png).tobytes() == drawn(editor, DOG).image.tobytes()

    def test_a_large_mask_is_an_edit_where_that_visits_fewer_steps(self, tmp_path: Path) -> None:
        editor = Editor(tiny_pipeline(), {"dense_steps": 1, "dense_above": 0.01, "stride": 2})
        settings = dataclasses.replace(SETTINGS, steps=8)
        with service(tmp_path, editor, similar=-1.0) as made:
            base = ask(made, request(settings=settings))
            answer = ask(made, request(DOG, settings=settings))
            assert (answer.reuse.kind, answer.reuse.base) == ("edit", base.id)
            assert answer.report["ran_dense"]
            want = editor.edit(drawn(editor, CAT, steps=8), DOG, cross_replace=0)
            assert of_png(answer.png).tobytes() == want.image.tobytes()

    def test_words_that_the_encoder_does_not_tell_apart_are_a_new_picture(self, tiny: Service) -> None:
        ask(tiny, request("a zebra on the left"))
        answer = ask(tiny, request("a rhino on the left"))
        assert answer.reuse.kind == "none"
        assert "change" in answer.reuse.why

    def test_a_base_that_is_gone_is_a_new_picture_and_is_met_once(self, tiny: Service) -> None:
        first = ask(tiny, request())
        assert tiny.names() == {first.id}
        tiny.store.evict(0)
        tiny.bases.drop()
        assert ask(tiny, request(DOG)).reuse.why == "the base of the similar picture is not there any more"
        assert ask(tiny, request("an apple on the left")).reuse.base != first.id

    def test_an_edit_is_changed_as_well_where_it_is_recorded_in_less_time(self, tmp_path: Path) -> None:
        editor = Editor(tiny_pipeline(), {"dense_steps": 1, "dense_above": 1.0, "stride": 2})
        settings = dataclasses.replace(SETTINGS, steps=8)
        apple = "a dog on the apple"
        with service(tmp_path, editor, similar=-1.0) as made:
            cat = ask(made, request(settings=settings))
            dog = ask(made, request(DOG, settings=settings))
            route = made.library.route_of(dog.id)
            assert route == made.library.route_of(cat.id) == cat.id
            assert len(made.front._index) == 2
            job = dataclasses.replace(
                made.front._plan(request(apple, settings=settings)), similar=Similar(dog.id, 0.9), route=route
            )
            answer = made.engine.draw(job)
            assert answer.reuse.base == dog.id
            assert made.names() == {cat.id, dog.id}
            made.engine.recall._edits.clear()
            made.bases.drop()
            made.store.evict(0)
            again = made.engine.draw(dataclasses.replace(job, id=new_picture_id()))
            assert again.reuse.why == "the base of the similar picture is not there any more"
        base = editor.generate(
            CAT,
            num_inference_steps=8,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(3),
            width=32,
            height=32,
        )
        want = editor.edit(editor.edit(base, DOG, cross_replace=0), apple, cross_replace=0)
        assert of_png(answer.png).tobytes() == want.image.tobytes()

    def test_a_repeated_job_is_answered_once(self, tiny: Service) -> None:
        job = tiny.front._plan(request())
        first = tiny.engine.draw(job)
        assert tiny.engine.draw(job) == first
        assert tiny.library.count() == 1


class TestEdit:
    def test_by_name_with_a_mask(self, tiny: Service, tiny_editor: Editor) -> None:
        base = ask(tiny, request())
        answer = ask(tiny, EditRequest(base.id, DOG, left_half(), guidance=6.0, negative_prompt="apple"))
        want = tiny_editor.edit(
            drawn(tiny_editor, CAT), DOG, of_png(left_half()), guidance_scale=6.0, negative_prompt="apple"
        )
        assert of_png(answer.png).tobytes() == want.image.tobytes()
        assert (answer.reuse.base, answer.reuse.similarity, answer.reuse.mask_area) == (base.id, None, 0.5)
        assert (answer.settings.guidance, answer.settings.negative_prompt) == (6.0, "apple")

    def test_what_somebody_asked_for_is_no_answer_to_a_request_of_its_words(self, tiny: Service) -> None:
        base = ask(tiny, request())
        asked = ask(tiny, EditRequest(base.id, DOG, left_half()))
        assert ask(tiny, request(DOG)).id != asked.id

    @pytest.mark.parametrize("lost", ["nothing", "edit", "bases", "process"])
    def test_in_rounds_whatever_is_lost_in_between(self, tmp_path: Path, tiny_editor: Editor, lost: str) -> None:
        with service(tmp_path, tiny_editor) as made:
            base = ask(made, request())
            first = ask(made, EditRequest(base.id, DOG, left_half()))
            second = ask(made, EditRequest(first.id, "a dog on the apple", left_half()))
            made.names()
            if lost != "nothing":
                made.engine.recall._edits.clear()
            if lost in ("bases", "process"):
                made.store.evict(0)
                made.bases.drop()
            if lost != "process":
                third = ask(made, EditRequest(second.id, "an apple on the apple", left_half()))
        if lost == "process":
            with service(tmp_path, tiny_editor) as made:
                third = ask(made, EditRequest(second.id, "an apple on the apple", left_half()))
        rounds = tiny_editor.edit(drawn(tiny_editor, CAT), DOG, of_png(left_half()))
        rounds = tiny_editor.edit(rounds, "a dog on the apple", of_png(left_half()))
        assert of_png(second.png).tobytes() == rounds.image.tobytes()
        rounds = tiny_editor.edit(rounds, "an apple on the apple", of_png(left_half()))
        assert of_png(third.png).tobytes() == rounds.image.tobytes()

    def test_one_that_the_service_chose_is_made_again_as_it_was(self, tmp_path: Path, tiny_editor: Editor) -> None:
        with service(tmp_path, tiny_editor, similar=-1.0) as made:
            ask(made, request())
            reused = ask(made, request(DOG))
            assert reused.reuse.kind == "edit"
            made.names()
            made.engine.recall._edits.clear()
            made.store.evict(0)
            made.bases.drop()
            answer = ask(made, EditRequest(reused.id, "a dog on the apple", left_half()))
        dog = tiny_editor.edit(drawn(tiny_editor, CAT), DOG, cross_replace=0)
        want = tiny_editor.edit(dog, "a dog on the apple", of_png(left_half()))
        assert of_png(answer.png).tobytes() == want.image.tobytes()

    def test_one_that_cannot_be_drawn_again_is_refused(
        self, tiny: Service, tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = ask(tiny, request())
        tiny.names()
        tiny.store.evict(0)
        tiny.bases.drop()
        other = drawn(tiny_editor, CAT, seed=5)  # as by a device that rounds otherwise
        monkeypatch.setattr(tiny.engine.artist, "new_picture", lambda *_: other)
        with pytest.raises(PictureGoneError, match="what is drawn again of it is another picture"):
            ask(tiny, EditRequest(base.id, DOG, left_half()))

    def test_a_base_that_is_damaged_is_drawn_again(self, tiny: Service, tiny_editor: Editor) -> None:
        base = ask(tiny, request())
        assert tiny.names() == {base.id}
        shard = tiny.store.folder / base.id / "base.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        tiny.bases.drop()
        answer = ask(tiny, EditRequest(base.id, DOG, left_half()))
        want = tiny_editor.edit(drawn(tiny_editor, CAT), DOG, of_png(left_half()))
        assert of_png(answer.png).tobytes() == want.image.tobytes()
        assert tiny.names() == {base.id}
        tiny.bases.drop()
        assert tiny.bases.find(base.id) is not None

    def test_refused(self, tiny: Service) -> None:
        with pytest.raises(PictureGoneError, match="there is no picture p"):
            ask(tiny, EditRequest("p" + 22 * "x", DOG))
        base = ask(tiny, request())
        with pytest.raises(ValueError, match="change at least one word"):
            ask(tiny, EditRequest(base.id, CAT, left_half()))
        with pytest.raises(MaskError):
            ask(tiny, EditRequest(base.id, DOG, as_png(Image.new("L", (32, 32)))))
        asyncio.run(tiny.front.remove(base.id))
        with pytest.raises(PictureGoneError):
            ask(tiny, EditRequest(base.id, DOG, left_half()))
        assert ask(tiny, request()).id != base.id

    def test_a_photo(self, tiny: Service, tiny_editor: Editor) -> None:
        photo = drawn(tiny_editor, "an apple").image
        kept = ask(tiny, PhotoRequest(as_png(photo), CAT, 4, 5.0))
        assert of_png(kept.png).tobytes() == photo.tobytes()
        answer = ask(tiny, EditRequest(kept.id, DOG, left_half()))
        want = tiny_editor.edit(
            tiny_editor.invert(photo, CAT, num_inference_steps=4, guidance_scale=5.0), DOG, of_png(left_half())
        )
        assert of_png(answer.png).tobytes() == want.image.tobytes()


class TestRunning:
    def test_nothing_is_kept_of_what_the_safety_checker_blackens(
        self, tiny: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        generate = tiny.engine.editor.generate
        monkeypatch.setattr(
            tiny.engine.editor, "generate", lambda *a, **k: dataclasses.replace(generate(*a, **k), nsfw=(True,))
        )
        with pytest.raises(WithheldPictureError, match="try other words"):
            ask(tiny, request())
        assert tiny.library.count() == 0
        assert tiny.names() == set()

    def test_memory_that_bases_take_is_given_back_where_it_is_needed(
        self, tiny: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ask(tiny, request())
        generate = tiny.engine.editor.generate

        def full(*arguments: Any, **named: Any) -> Any:
            if tiny.bases.nbytes:
                raise BaseMemoryError("no room")
            return generate(*arguments, **named)

        monkeypatch.setattr(tiny.engine.editor, "generate", full)
        assert ask(tiny, request(DOG, reuse="never")).prompt == DOG

    def test_another_pipeline_is_refused(self, tiny: Service) -> None:
        job = dataclasses.replace(tiny.front._plan(request()), pipeline="another")
        with pytest.raises(OtherPipelineError, match="start it again"):
            tiny.engine.draw(job)

    def test_the_digest_is_of_everything(self, tiny_editor: Editor) -> None:
        before = tiny_editor.digest()
        assert Editor(tiny_pipeline(sparse_decoder=True), CONFIG).digest() == before
        assert Editor(tiny_pipeline(sparse_decoder=True), {**CONFIG, "attention": "masked"}).digest() != before
        pipe = tiny_pipeline(sparse_decoder=True)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.5)
        assert Editor(pipe, CONFIG).digest() != before
        pipe = tiny_pipeline(sparse_decoder=True)
        with torch.no_grad():
            next(pipe.vae.parameters())[0] += 1
        assert Editor(pipe, CONFIG).digest() != before

    def test_steps_are_told_and_change_nothing(self, tiny: Service) -> None:
        async def watched() -> list[Any]:
            plain = {"progress": True, "partial_pictures": 1}
            return [event async for event in tiny.front.answer(request(reuse="never"), **plain)]

        *steps, answer = asyncio.run(watched())
        assert [(each.step, each.steps) for each in steps] == [(i, 4) for i in range(1, 5)]
        assert [each.png is not None for each in steps] == [False, True, False, False]
        assert of_png(steps[1].png).size == (32, 32)
        assert answer.png == ask(tiny, request(reuse="never")).png

    @pytest.mark.parametrize("running", [True, False])
    def test_whoever_leaves_ends_the_job(self, tiny: Service, monkeypatch: pytest.MonkeyPatch, running: bool) -> None:
        """And leaves the turn to the next, which is not stopped."""
        began, steps = threading.Event(), []
        original = tiny.engine.editor.generate

        def generate(prompt: str, **arguments: Any) -> Any:
            def note(*_: Any) -> dict[str, Any]:
                steps.append(prompt)
                began.set()
                threading.Event().wait(0.1)
                return {}

            return original(prompt, **{**arguments, "callback_on_step_end": note})

        monkeypatch.setattr(tiny.engine.editor, "generate", generate)
        settings = dataclasses.replace(SETTINGS, steps=40)

        async def leave() -> Answer:
            async def first() -> None:
                async for _ in tiny.front.answer(request(CAT, settings=settings)):
                    pass

            async def next_one() -> Answer:
                (answer,) = [event async for event in tiny.front.answer(request(DOG, reuse="never"))]
                assert isinstance(answer, Answer)
                return answer

            leaving = asyncio.create_task(first())
            await asyncio.to_thread(began.wait)
            other = asyncio.create_task(next_one())
            if not running:  # the one that waits leaves
                third = asyncio.create_task(first())
                await asyncio.sleep(0.05)
                third.cancel()
            leaving.cancel()
            return await other

        answer = asyncio.run(leave())
        assert answer.prompt == DOG
        assert 1 <= steps.count(CAT) < 10
        assert steps.count(DOG) == 4
        assert tiny.library.count() == 1
        assert tiny.front.waiting == 0

    def test_stopped_before_it_begins(self, tiny: Service) -> None:
        stop = Stop()
        tiny.engine.interrupt(stop)
        with pytest.raises(PipelineInterruptedError, match="before it began"):
            tiny.engine.draw(tiny.front._plan(request()), stop=stop)
        assert tiny.engine.draw(tiny.front._plan(request())).prompt == CAT

    def test_too_many_wait(self, tmp_path: Path, tiny_editor: Editor) -> None:
        async def two(made: Service) -> None:
            first = made.front.answer(request(reuse="never"), progress=True)
            assert isinstance(await anext(first), Progress)
            with pytest.raises(BusyError, match="1 requests") as caught:
                await anext(made.front.answer(request(DOG)))
            assert caught.value.retry_after >= 1
            assert [event async for event in first]

        with service(tmp_path, tiny_editor, most_waiting=1) as made:
            asyncio.run(two(made))
            assert ask(made, request(DOG)).prompt == DOG

    def test_bases_that_do_not_fit_into_memory_come_from_the_store(self, tmp_path: Path, tiny_editor: Editor) -> None:
        with service(tmp_path, tiny_editor, memory=1, similar=-1.0) as made:
            cat, dog = ask(made, request(CAT, reuse="never")), ask(made, request(DOG, reuse="never"))
            assert made.names() == {cat.id, dog.id}
            assert set(made.bases._held) == {dog.id}
            answer = ask(made, EditRequest(cat.id, DOG, left_half()))
            assert set(made.bases._held) == {cat.id}
        want = tiny_editor.edit(drawn(tiny_editor, CAT), DOG, of_png(left_half()))
        assert of_png(answer.png).tobytes() == want.image.tobytes()


def test_requests_are_what_they_are(tiny: Service) -> None:
    """A request without a seed is answered with the seed that repeats it."""
    answer = ask(tiny, GenerationRequest(CAT, SETTINGS))
    again = ask(tiny, GenerationRequest(CAT, SETTINGS, answer.seed, reuse="never"))
    assert again.png == answer.png
