"""A pipeline is not searched for its device again while its parts stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import diffusers.hooks.group_offloading as group_offloading
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from support.pipelines import EDIT, generate, left_half, tiny_pipeline

from fisedit_compile import Editor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    search = group_offloading._get_group_onload_device
    monkeypatch.setattr(group_offloading, "_get_group_onload_device", lambda part: made.append(part) or search(part))
    return made


def test_two_edits_search_no_more(own_pipeline: Callable[..., Any], searches: list[Any]) -> None:
    editor = Editor(own_pipeline())
    base = generate(editor)
    first = editor.edit(base, EDIT, left_half())
    searches.clear()
    again = editor.edit(base, EDIT, left_half())
    assert not searches
    assert torch.equal(first.latents, again.latents)


def offload(pipe: Any) -> None:
    apply_group_offloading(
        pipe.text_encoder,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


@pytest.mark.parametrize(
    "change",
    [
        offload,
        lambda pipe: accelerate.cpu_offload_with_hook(pipe.text_encoder, torch.device("cpu")),
        lambda pipe: pipe.vae.to(torch.float64).to(torch.float32),
        lambda pipe: setattr(pipe, "vae", tiny_pipeline().vae),
    ],
    ids=["group offload", "model offload", "moved", "exchanged"],
)
def test_a_changed_pipeline_is_searched(
    own_pipeline: Callable[..., Any], change: Callable[[Any], None], searches: list[Any]
) -> None:
    pipe = own_pipeline()
    editor = Editor(pipe)
    generate(editor)
    searches.clear()
    generate(editor)
    assert not searches
    change(pipe)
    generate(editor)
    assert searches


def test_a_pipeline_with_a_part_that_nobody_looks_at_is_searched(
    own_pipeline: Callable[..., Any], searches: list[Any]
) -> None:
    pipe = own_pipeline()
    pipe.safety_checker = tiny_pipeline().text_encoder
    pipe.feature_extractor = lambda *_, **__: None
    pipe.run_safety_checker = lambda image, *_: (image, None)
    editor = Editor(pipe)
    generate(editor)
    searches.clear()
    generate(editor)
    assert searches
