"""Editors and plain calls of one pipeline in several threads: each gives what it gives alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.pipelines import CONFIG, EDIT, PROMPT, STEPS, arguments, generate, left_half

from fisedit_compile import Base, Editor

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = 4


def at_once(*works: Callable[[], torch.Tensor]) -> list[list[torch.Tensor]]:
    """What each of ``works`` returns, again and again, all in threads of their own."""
    results: list[list[Any]] = [[] for _ in works]
    start = threading.Barrier(len(works))

    def repeat(work: Callable[[], torch.Tensor], into: list[Any]) -> None:
        torch.set_num_threads(1)
        start.wait()
        try:
            into.extend(work() for _ in range(ROUNDS))
        except Exception as error:  # shown by the assertion on the results
            into.append(error)

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(works, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_editors_and_plain_calls_on_one_pipeline(tiny_editor: Editor, tiny_base: Base) -> None:
    pipe, unet, scheduler = tiny_editor.pipe, tiny_editor.pipe.unet, tiny_editor.pipe.scheduler
    other = Editor(pipe, {**CONFIG, "attention": "masked"})
    other_base = generate(other)

    def plain() -> torch.Tensor:
        return pipe(EDIT, output_type="latent", **arguments(guidance_scale=1.0, num_inference_steps=3)).images  # type: ignore[no-any-return]

    works = [
        lambda: tiny_editor.edit(tiny_base, EDIT, left_half()).latents,
        lambda: other.edit(other_base, EDIT, left_half()).latents,
        lambda: generate(tiny_editor).latents,
        plain,
    ]
    alone = [work() for work in works]
    for results, want in zip(at_once(*works), alone, strict=True):
        assert len(results) == ROUNDS, results
        assert all(torch.equal(each, want) for each in results)
    assert pipe.unet is unet
    assert pipe.scheduler is scheduler


def test_a_plain_call_within_a_generation_is_not_recorded(tiny_editor: Editor, tiny_base: Base) -> None:
    pipe = tiny_editor.pipe
    want = pipe(EDIT, output_type="latent", **arguments(guidance_scale=2.0)).images
    got: list[torch.Tensor] = []

    def call(own: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            work = threading.Thread(
                target=lambda: got.append(pipe(EDIT, output_type="latent", **arguments(guidance_scale=2.0)).images)
            )
            work.start()
            work.join()
        return values

    base = generate(tiny_editor, callback_on_step_end=call)
    assert len(base.calls) == STEPS
    assert torch.equal(base.latents, tiny_base.latents)
    assert torch.equal(got[0], want)


def test_an_edit_within_an_edit(tiny_editor: Editor, tiny_base: Base) -> None:
    want = tiny_editor.edit(tiny_base, EDIT, left_half()).latents
    inner: list[torch.Tensor] = []

    def edit(own: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == STEPS - 1:
            inner.append(tiny_editor.edit(tiny_base, EDIT, left_half()).latents)
        return values

    outer = tiny_editor.edit(tiny_base, EDIT, left_half(), callback_on_step_end=edit)
    assert torch.equal(outer.latents, want)
    assert torch.equal(inner[0], want)


def test_the_pipeline_is_not_touched(tiny_editor: Editor, tiny_base: Base) -> None:
    pipe = tiny_editor.pipe
    before, timesteps = dict(vars(pipe)), pipe.scheduler.timesteps
    generate(tiny_editor, guidance_scale=2.5, num_inference_steps=3)
    tiny_editor.edit(tiny_base, EDIT, left_half())
    assert vars(pipe).keys() == before.keys()
    assert all(vars(pipe)[name] is before[name] for name in before)
    assert pipe.scheduler.timesteps is timesteps
    assert PROMPT in tiny_base.prompts
