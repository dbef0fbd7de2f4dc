"""A base that does not fit is refused before its first step, and what it will take is known to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.pipelines import generate

import fisedit_compile.cache.memory as memory
from fisedit_compile import BaseMemoryError, Editor

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_estimate_is_what_the_base_takes(tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what it keeps of the decoder, which is known once that is captured, and takes less than a U-Net call."""
    base = generate(tiny_editor, num_images_per_prompt=2)
    assert base.decoded is not None
    nbytes = base.nbytes - base.decoded.nbytes
    for free in (nbytes, nbytes - 1):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        if free == nbytes:
            generate(tiny_editor, num_images_per_prompt=2)
            continue
        with pytest.raises(BaseMemoryError, match=r"A base of 4 steps would take 0\.0 GiB of cpu"):
            generate(tiny_editor, num_images_per_prompt=2)


def test_the_message_names_what_shrinks_it_and_nothing_is_computed(
    tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)

    def record(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("recorded before it was refused")

    monkeypatch.setattr(type(tiny_editor.unet), "record", record)
    with pytest.raises(BaseMemoryError) as refused:
        generate(tiny_editor, num_images_per_prompt=2)
    for option in ("fewer than 4 steps", "height and width", "2 pictures", "half", "'masked'", "cross_replace"):
        assert option in str(refused.value)


def test_options_that_would_not_help_are_not_named(tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    editor = Editor(tiny_editor.pipe, {"attention": "masked", "cross_replace": 0.0})
    with pytest.raises(BaseMemoryError) as refused:
        generate(editor)
    for option in ("pictures", "'masked'", "cross_replace"):
        assert option not in str(refused.value)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    from support.pipelines import CONFIG, tiny_pipeline

    editor = Editor(tiny_pipeline().to("cuda"), CONFIG)
    base = generate(editor)
    assert all(kept.device == torch.device("cuda", 0) for call in base.calls for kept in call.cache.values())
