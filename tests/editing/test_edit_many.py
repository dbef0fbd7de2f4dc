"""Edits that are made together: each is what it is alone, and its background its own base's."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from PIL import Image
from support.pipelines import CONFIG, EDIT, PROMPT, generate, left_half, tiny_pipeline
from transformers import CLIPTextConfig, CLIPTextModel

from fisedit_compile import (
    Base,
    BaseMismatchError,
    Edit,
    Editor,
    EditRequest,
    LargeMaskError,
    MaskError,
    PipelineInterruptedError,
)
from fisedit_compile.cache.host_tier import Staging
from fisedit_compile.cache.joined_calls import JoinedCalls
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

DOG, APPLE, THERE = "a dog on the apple", "an apple on the left", "a cat on the apple"


def right_half() -> torch.Tensor:
    return ~left_half()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(edit: Edit) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(each) for each in edit.images]).astype(int)


def longer_texts() -> Any:
    """A pipeline whose texts have 24 tokens."""
    small = tiny_pipeline()
    tokenizer = copy.deepcopy(small.tokenizer)
    tokenizer.model_max_length = 24
    torch.manual_seed(1)
    config = CLIPTextConfig(**{**small.text_encoder.config.to_dict(), "max_position_embeddings": 24})
    return tiny_pipeline(tokenizer=tokenizer, text_encoder=CLIPTextModel(config).eval())


@pytest.fixture(scope="module")
def bases(tiny_editor: Editor) -> list[Base]:
    """Of one, one and two pictures: the words, noise and negative prompts of each are its own."""
    return [
        generate(tiny_editor),
        generate(tiny_editor, DOG, generator=seeded(4), negative_prompt="apple"),
        generate(tiny_editor, [PROMPT, THERE], generator=seeded(5)),
    ]


def assert_as_alone(editor: Editor, requests: Sequence[EditRequest], edits: Sequence[Any], **options: Any) -> None:
    """Each edit has the mask, the picture and the background that it has alone."""
    assert len(edits) == len(requests)
    for request, got in zip(requests, edits, strict=True):
        want = editor.edit(
            request.base,
            request.prompt,
            request.mask,
            weights=request.weights,
            combine=request.combine,
            largest_mask=request.largest_mask,
            **request.arguments,
            **options,
        )
        assert torch.equal(got.mask, want.mask)
        assert_close(got.latents, want.latents)
        assert np.abs(pixels(got) - pixels(want)).max() <= 1
        base = editor.base_of(request.base) if isinstance(request.base, Edit) else request.base
        outside = ~got.mask[:, None].expand_as(got.latents)
        assert torch.equal(got.latents[outside], base.latents[outside])
        assert not torch.equal(got.latents, base.latents)
        for name in ("mask_area", "mask_source", "removed_words", "added_words", "dense_steps", "sparse_steps"):
            assert getattr(got.report, name) == getattr(want.report, name), name
        assert got.report.ran_dense is want.report.ran_dense
        assert got.report.decoder == want.report.decoder
        assert got.report.background_identical
        assert got.report.made_together == len(requests)


@pytest.mark.parametrize(
    ("which", "masks"),
    [
        ("0", ["found"]),
        ("01", ["given", "given"]),
        ("01", ["found", "found"]),
        ("01", ["given", "found"]),
        ("00", ["found", "given"]),
        ("012", ["found", "given", "found"]),
        ("21", ["given", "given"]),
    ],
    ids=str,
)
def test_each_edit_is_what_it_is_alone(tiny_editor: Editor, bases: list[Base], which: str, masks: list[str]) -> None:
    prompts = {0: APPLE, 1: EDIT, 2: [APPLE, DOG]}
    requests = [
        EditRequest(bases[int(base)], prompts[int(base)], None if mask == "found" else left_half())
        for base, mask in zip(which, masks, strict=True)
    ]
    assert_as_alone(tiny_editor, requests, tiny_editor.edit_many(requests))


@pytest.mark.parametrize(("cache", "attention"), [("balanced", "masked"), ("small", "full")])
def test_bases_in_few_bits_and_longer_steps(cache: str, attention: str) -> None:
    editor = Editor(tiny_pipeline(), {**CONFIG, "cache": cache, "attention": attention, "stride": 2})
    made = [generate(editor, num_inference_steps=8), generate(editor, DOG, num_inference_steps=8, generator=seeded(4))]
    requests = [EditRequest(made[0], APPLE), EditRequest(made[1], EDIT, left_half()), EditRequest(made[0], EDIT)]
    assert_as_alone(editor, requests, editor.edit_many(requests))


def test_bases_in_host_memory(tiny_editor: Editor, bases: list[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [EditRequest(bases[0], APPLE), EditRequest(bases[1], EDIT, left_half()), EditRequest(bases[0], EDIT)]
    want = tiny_editor.edit_many(requests)
    monkeypatch.setattr(Base, "tier", "host")  # one device stands for two
    monkeypatch.setattr(Staging, "_is_away", lambda self, cache: True)
    for _ in range(2):
        got = tiny_editor.edit_many(requests)
        assert all(torch.equal(one.latents, other.latents) for one, other in zip(got, want, strict=True))
    tiny_editor._maker._staging = None


def test_prompts_of_which_bases_keep_more_or_fewer_tokens() -> None:
    editor = Editor(longer_texts(), {**CONFIG, "cross_replace": 0.5})
    long = f"{PROMPT} on {DOG} on {THERE}"
    made = [generate(editor), generate(editor, long, generator=seeded(4))]
    kept = [{t.shape[2] for e, t in base.calls[0].cache.items() if e.kind == "attention"} for base in made]
    assert kept == [{8}, {24}]
    longer = [f"{APPLE} on the apple on the left", long.replace("dog", "apple")]
    mixed, given, found = (None, left_half()), (left_half(), left_half()), (None, None)
    for masks, order in ((mixed, 1), (mixed, -1), (given, -1), (found, 1)):
        pairs = zip(made, longer, masks, strict=True)
        requests = [EditRequest(base, prompt, mask) for base, prompt, mask in pairs][::order]
        assert_as_alone(editor, requests, editor.edit_many(requests))


def test_words_that_count_more_masks_that_are_joined_and_samples_that_stay(
    tiny_editor: Editor, bases: list[Base]
) -> None:
    requests = [
        EditRequest(bases[0], PROMPT, weights={"cat": 0.2}),
        EditRequest(bases[1], EDIT, left_half(), combine="or"),
        EditRequest(bases[2], [PROMPT, DOG], negative_prompt="left"),
        EditRequest(bases[2], [PROMPT, DOG], right_half(), weights=[None, {"apple": 1.5}]),
    ]
    edits = tiny_editor.edit_many(requests)
    assert_as_alone(tiny_editor, requests, edits)
    assert torch.equal(edits[3].latents[0], bases[2].latents[0])


@pytest.mark.parametrize("control", [0.0, 0.25])
def test_nothing_but_maps_is_brought_together_for_those_that_run_dense(
    monkeypatch: pytest.MonkeyPatch, control: float
) -> None:
    brought: list[bool] = []
    real = JoinedCalls.fill

    def fill(calls: JoinedCalls, *args: Any, maps_alone: bool = False) -> Recorded:
        brought.append(maps_alone)
        return real(calls, *args, maps_alone=maps_alone)

    monkeypatch.setattr(JoinedCalls, "fill", fill)
    editor = Editor(tiny_pipeline(), {**CONFIG, "dense_above": 0.6})
    base, other = generate(editor), generate(editor, DOG, generator=seeded(4))
    everything = torch.ones(16, 16, dtype=torch.bool)
    options: dict[str, Any] = {"cross_replace": control}
    edits = editor.edit_many([EditRequest(each, EDIT, everything, **options) for each in (base, other)])
    assert all(edit.report.ran_dense for edit in edits)  # type: ignore[union-attr]
    assert brought == [True] * (1 if control else 0)  # one of four steps is controlled


def test_one_whose_mask_is_so_large_that_it_runs_dense() -> None:
    editor = Editor(tiny_pipeline(), {**CONFIG, "dense_above": 0.6})
    base, other = generate(editor), generate(editor, DOG, generator=seeded(4))
    large = torch.ones(16, 16, dtype=torch.bool)
    large[:, 12:] = False
    requests = [EditRequest(base, APPLE, large), EditRequest(other, EDIT, left_half()), EditRequest(other, EDIT, large)]
    requests.append(EditRequest(base, DOG, large))
    edits = editor.edit_many(requests)
    assert [edit.report.ran_dense for edit in edits] == [True, False, True, True]
    # Three that run dense are two and one, so that no U-Net is captured for three pictures.
    assert {program.lowered.batch for program in editor.unet._programs} <= {2, 4, 8}
    assert_as_alone(editor, requests, edits)


@pytest.mark.parametrize(
    "changes", [{"guidance_scale": 1.0}, {"height": 48, "width": 32}, {"num_images_per_prompt": 2}], ids=str
)
def test_other_kinds_of_calls(tiny_editor: Editor, changes: dict[str, Any]) -> None:
    made = [generate(tiny_editor, **changes), generate(tiny_editor, DOG, **{**changes, "generator": seeded(4)})]
    requests = [EditRequest(made[0], APPLE), EditRequest(made[1], EDIT)]
    assert_as_alone(tiny_editor, requests, tiny_editor.edit_many(requests))


@pytest.mark.parametrize("kind", ["np", "pt", "latent"])
def test_pictures_of_any_kind(tiny_editor: Editor, bases: list[Base], kind: str) -> None:
    requests = [EditRequest(bases[0], APPLE, left_half()), EditRequest(bases[2], [APPLE, DOG], left_half())]
    options: dict[str, Any] = {"output_type": kind, "background": "latents"}
    for request, got in zip(requests, tiny_editor.edit_many(requests, **options), strict=True):
        want = tiny_editor.edit(request.base, request.prompt, request.mask, **options)
        assert type(got.images) is type(want.images)
        assert got.images.shape == want.images.shape
        np.testing.assert_allclose(np.asarray(got.images), np.asarray(want.images), atol=1e-4)


def test_embeddings_beside_the_words(tiny_editor: Editor) -> None:
    encode = tiny_editor.pipe.encode_prompt
    own = {each: encode([each], torch.device("cpu"), 1, False)[0].detach() for each in (PROMPT, DOG, APPLE, EDIT)}
    made = [
        generate(tiny_editor, each, generator=seeded(seed), prompt_embeds=2 * own[each], num_images_per_prompt=copies)
        for each, seed, copies in ((PROMPT, 3, 1), (DOG, 4, 2))
    ]
    requests = [
        EditRequest(base, prompt, left_half(), prompt_embeds=2 * own[prompt])
        for base, prompt in zip(made, (APPLE, EDIT), strict=True)
    ]
    assert_as_alone(tiny_editor, requests, tiny_editor.edit_many(requests))


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, EulerDiscreteScheduler])
def test_each_has_the_noise_of_its_own_base(
    tiny_editor: Editor, scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor, pipe = tiny_editor, tiny_editor.pipe
    monkeypatch.setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config))
    drawn = [
        generate(editor),
        generate(editor, [PROMPT, DOG], generator=[seeded(5), seeded(6)]),
        generate(editor, latents=torch.randn(1, 4, 16, 16, generator=seeded(7)), generator=seeded(8)),
    ]
    prompts: list[Any] = [APPLE, [EDIT, APPLE], DOG]
    requests = [EditRequest(base, prompt) for base, prompt in zip(drawn, prompts, strict=True)]
    assert_as_alone(editor, requests, editor.edit_many(requests))
    both = EditRequest(generate(editor, [PROMPT, DOG], generator=seeded(5)), [EDIT, APPLE])
    if scheduler is EulerDiscreteScheduler:
        assert_as_alone(editor, [requests[0], both], editor.edit_many([requests[0], both]))
    else:
        with pytest.raises(BaseMismatchError, match="edit 1: its base drew the noise of several pictures from one"):
            editor.edit_many([requests[0], both])


def test_photos_beside_pictures(tiny_editor: Editor, bases: list[Base]) -> None:
    pictures = [Image.fromarray(np.asarray(bases[1].image)), Image.fromarray(np.asarray(bases[1].image)[:, :29])]
    settings = {"num_inference_steps": 4, "guidance_scale": 5.0}
    requests = [
        *(EditRequest(tiny_editor.invert(each, DOG, **settings), EDIT, left_half()) for each in pictures),
        EditRequest(bases[0], APPLE),
    ]
    edits = tiny_editor.edit_many(requests)
    assert_as_alone(tiny_editor, requests, edits)
    assert [edit.image.size for edit in edits] == [(32, 32), (29, 32), (32, 32)]


def test_rounds_and_saved_bases(tiny_editor: Editor, bases: list[Base], tmp_path: Path) -> None:
    bases[0].save(tmp_path / "base")
    requests = [EditRequest(tiny_editor.load(tmp_path / "base"), EDIT, left_half()), EditRequest(bases[1], EDIT)]
    first = tiny_editor.edit_many(requests)
    for edit, request in zip(first, requests, strict=True):
        own = tiny_editor.base_of(edit)
        assert own.prompts == (EDIT,)
        assert own.arguments.get("negative_prompt") == request.base.arguments.get("negative_prompt")
        assert torch.equal(own.latents, edit.latents)
        for one, other in zip(edit.trajectory.generators, request.base.generators, strict=True):
            assert torch.equal(one[0], other[0])
        assert all(each.untyped_storage().nbytes() == each.nbytes for each in edit.trajectory.latents)
    again = [
        EditRequest(first[1], APPLE),
        EditRequest(first[0], APPLE, right_half()),
        EditRequest(bases[2], [DOG, DOG]),
    ]
    second = tiny_editor.edit_many(again)
    assert_as_alone(tiny_editor, again, second)
    alone = tiny_editor.edit(tiny_editor.edit(bases[0], EDIT, left_half()), APPLE, right_half())
    assert_close(second[1].latents, alone.latents)
    tiny_editor.base_of(second[1]).save(tmp_path / "second")
    assert torch.equal(tiny_editor.load(tmp_path / "second").latents, second[1].latents)


def test_bases_are_not_held_and_not_changed(tiny_editor: Editor) -> None:
    editor = tiny_editor
    made = [generate(editor), generate(editor, DOG, generator=seeded(4))]
    before = [{e: t.clone() for e, t in call.cache.items()} for base in made for call in base.calls]
    edits = editor.edit_many([EditRequest(made[0], APPLE), EditRequest(made[1], EDIT)])
    after = [call.cache for base in made for call in base.calls]
    assert all(torch.equal(b[e], a[e]) for b, a in zip(before, after, strict=True) for e in b)
    held = [weakref.ref(base.calls[-1].cache) for base in made]
    del made, after
    gc.collect()
    assert [each() for each in held] == [None, None]
    assert editor.edit(edits[0], DOG, right_half()).report.background_identical


class TestFailing:
    def test_the_edit_is_named(self, tiny_editor: Editor, bases: list[Base]) -> None:
        good = EditRequest(bases[0], APPLE)
        with pytest.raises(MaskError, match=r"^edit 1: nothing changed for sample 0"):
            tiny_editor.edit_many([good, EditRequest(bases[0], "a  cat on the left")])
        with pytest.raises(ValueError, match=r"^edit 0: the new prompt is the base's own"):
            tiny_editor.edit_many([EditRequest(bases[0], PROMPT), good])
        with pytest.raises(LargeMaskError, match=r"^edit 2: the mask that was found covers"):
            tiny_editor.edit_many([good, good, EditRequest(bases[1], EDIT, largest_mask=0.001)])

    def test_the_others_are_made(self, tiny_editor: Editor, bases: list[Base]) -> None:
        requests = [
            EditRequest(bases[0], APPLE),
            EditRequest(bases[1], EDIT, largest_mask=0.001),
            EditRequest(bases[0], PROMPT),
            EditRequest(bases[2], [APPLE, DOG], left_half()),
            EditRequest(bases[0], EDIT, torch.zeros(16, 16)),
        ]
        made = tiny_editor.edit_many(requests, return_exceptions=True)
        assert [type(each) for each in made] == [Edit, LargeMaskError, ValueError, Edit, MaskError]
        for i in (0, 3):
            want = tiny_editor.edit(requests[i].base, requests[i].prompt, requests[i].mask)
            assert torch.equal(made[i].mask, want.mask)
            assert_close(made[i].latents, want.latents)
            assert np.abs(pixels(made[i]) - pixels(want)).max() <= 1

    def test_all_fail(self, tiny_editor: Editor, bases: list[Base]) -> None:
        requests = [EditRequest(base, EDIT, largest_mask=0.001) for base in bases[:2]]
        made = tiny_editor.edit_many(requests, return_exceptions=True)
        assert [type(each) for each in made] == [LargeMaskError, LargeMaskError]
        made = tiny_editor.edit_many([EditRequest(bases[0], PROMPT)], return_exceptions=True)
        assert isinstance(made[0], ValueError)

    def test_one_that_is_interrupted_ends_all(self, tiny_editor: Editor, bases: list[Base]) -> None:
        def stop(pipe: Any, *_: Any) -> dict[str, Any]:
            pipe._interrupt = True
            return {}

        with pytest.raises(PipelineInterruptedError):
            tiny_editor.edit_many(
                [EditRequest(bases[0], APPLE, callback_on_step_end=stop), EditRequest(bases[1], EDIT)],
                return_exceptions=True,
            )


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"height": 48, "width": 32}, "its base has latents of 16x24, not 16x16 cells"),
            ({"num_inference_steps": 5}, "its base has 5 steps, not 4"),
            ({"guidance_scale": 4.0}, "its guidance_scale is 4.0, not 5.0"),
            ({"guidance_rescale": 0.5}, "its guidance_rescale is 0.5, not 0.0"),
            ({"output_type": "np"}, "its output_type is 'np', not 'pil'"),
            ({"cross_attention_kwargs": {"scale": 0.5}}, "its cross_attention_kwargs is another dict, not None"),
        ],
        ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
    )
    def test_bases_that_differ(self, tiny_editor: Editor, bases: list[Base], changes: dict[str, Any], why: str) -> None:
        other = generate(tiny_editor, **changes)
        with pytest.raises(ValueError, match=f"edit 2 cannot be made together with edit 0: {why}"):
            tiny_editor.edit_many([EditRequest(each, EDIT) for each in (bases[0], bases[0], other)])

    def test_the_same_in_other_words_is_the_same(self, tiny_editor: Editor, bases: list[Base]) -> None:
        other = generate(tiny_editor, height=32, width=32, guidance_rescale=0, eta=0.0, generator=seeded(9))
        requests = [EditRequest(bases[0], EDIT), EditRequest(other, EDIT)]
        assert_as_alone(tiny_editor, requests, tiny_editor.edit_many(requests))

    def test_other_schedules(self, tiny_editor: Editor, bases: list[Base], monkeypatch: pytest.MonkeyPatch) -> None:
        editor, base = tiny_editor, bases[0]
        monkeypatch.setattr(editor.pipe, "scheduler", EulerDiscreteScheduler.from_config(editor.pipe.scheduler.config))
        other = generate(editor)
        with pytest.raises(ValueError, match=r"edit 1 .* the scheduler of its base is another one \(Euler"):
            editor.edit_many([EditRequest(base, EDIT), EditRequest(other, EDIT)])
        with pytest.raises(BaseMismatchError, match="edit 0: the scheduler is another one"):
            editor.edit_many([EditRequest(base, EDIT), EditRequest(base, APPLE)])

    def test_a_model_that_was_changed_between_bases(self) -> None:
        editor = Editor(tiny_pipeline(), CONFIG)
        base = generate(editor)
        with torch.no_grad():
            editor.pipe.unet.conv_in.weight.mul_(1.01)
        new = generate(editor)
        with pytest.raises(BaseMismatchError, match="edit 1: the base was generated with another U-Net"):
            editor.edit_many([EditRequest(new, EDIT), EditRequest(base, EDIT)])
        kept = editor.edit_many([EditRequest(new, EDIT), EditRequest(base, EDIT)], return_exceptions=True)
        assert torch.equal(kept[0].latents, editor.edit(new, EDIT).latents)
        assert isinstance(kept[1], BaseMismatchError)

    def test_what_is_no_list_of_requests(self, tiny_editor: Editor, bases: list[Base]) -> None:
        for given in ([], [(bases[0], EDIT)], [bases[0]]):
            with pytest.raises(ValueError, match="edit_many takes a list of EditRequest"):
                tiny_editor.edit_many(given)
        with pytest.raises(ValueError, match="background is the same for all edits"):
            EditRequest(bases[0], EDIT, background="latents")
        with pytest.raises(ValueError, match="dense is of an edit that is made alone"):
            EditRequest(bases[0], EDIT, dense=True)
        with pytest.raises(ValueError, match=r"edit 1: steps=3: edit\(\.\.\.\) does not take it"):
            tiny_editor.edit_many([EditRequest(bases[0], EDIT), EditRequest(bases[0], EDIT, steps=3)])


def test_each_has_a_callback_that_sees_its_own_samples(tiny_editor: Editor, bases: list[Base]) -> None:
    seen: dict[str, list[torch.Tensor]] = {}

    def noting(name: str) -> Any:
        def note(pipe: Any, step: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, Any]:
            seen.setdefault(name, []).append(values["latents"].clone())
            return {}

        return note

    requests = [
        EditRequest(bases[0], PROMPT),  # fails before the others begin
        EditRequest(bases[0], APPLE, callback_on_step_end=noting("one")),
        EditRequest(bases[1], EDIT),
        EditRequest(bases[2], [APPLE, DOG], callback_on_step_end=noting("two")),
    ]
    edits = tiny_editor.edit_many(requests, return_exceptions=True)
    for name, request, edit in (("one", requests[1], edits[1]), ("two", requests[3], edits[3])):
        tiny_editor.edit(request.base, request.prompt, callback_on_step_end=noting("alone"))
        for got, want in zip(seen.pop(name), seen.pop("alone"), strict=True):
            assert_close(got, want)
        assert tiny_editor.base_of(edit).prompts == edit.trajectory.prompts
    assert seen == {}


def test_a_callback_changes_its_own_samples(tiny_editor: Editor, bases: list[Base]) -> None:
    def brighter(pipe: Any, step: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": values["latents"] * 1.05}

    requests = [EditRequest(bases[0], APPLE, callback_on_step_end=brighter), EditRequest(bases[1], EDIT)]
    edits = tiny_editor.edit_many(requests)
    assert_close(edits[0].latents, tiny_editor.edit(bases[0], APPLE, callback_on_step_end=brighter).latents)
    assert_close(edits[1].latents, tiny_editor.edit(bases[1], EDIT).latents)
    with pytest.raises(BaseMismatchError, match="brighter"):
        tiny_editor.base_of(edits[0])
    with pytest.raises(ValueError, match="may return its latents alone"):
        tiny_editor.edit_many([EditRequest(bases[0], APPLE, callback_on_step_end=lambda *_: {"x": 1}), requests[1]])


def test_multiply_accumulates_are_those_of_each_alone(tiny_editor: Editor, bases: list[Base]) -> None:
    requests = [EditRequest(bases[0], APPLE, left_half()), EditRequest(bases[2], [APPLE, DOG])]
    for request, got in zip(requests, tiny_editor.edit_many(requests), strict=True):
        want = tiny_editor.edit(request.base, request.prompt, request.mask).report.macs
        assert got.report.macs == pytest.approx(want)
        assert "for 2 edits" in str(got.report)


def test_in_two_threads(tiny_editor: Editor, bases: list[Base]) -> None:
    requests = [
        [EditRequest(bases[0], APPLE), EditRequest(bases[1], EDIT, left_half())],
        [EditRequest(bases[1], APPLE, left_half()), EditRequest(bases[2], [APPLE, DOG])],
    ]
    want = [[edit.latents for edit in tiny_editor.edit_many(each)] for each in requests]
    got: list[list[list[torch.Tensor]]] = [[], []]

    def work(i: int) -> None:
        torch.set_num_threads(1)
        for _ in range(3):
            got[i].append([edit.latents for edit in tiny_editor.edit_many(requests[i])])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(got[i]) == 3
        assert all(torch.equal(a, b) for made in got[i] for a, b in zip(made, want[i], strict=True))
