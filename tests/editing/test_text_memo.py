"""Texts that were encoded before are not encoded again, and no other encoder's output is ever taken for this one's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.pipelines import CONFIG, EDIT, PROMPT, arguments, generate, left_half, tiny_pipeline
from support.pipelines_sdxl import tiny_sdxl
from torch.utils._python_dispatch import TorchDispatchMode

import fisedit_compile.editing.text_memo as text_memo
from fisedit_compile import BaseMismatchError, Editor
from fisedit_compile.editing.text_memo import TextMemo

OTHER = "an apple on the left"

pytestmark = pytest.mark.usefixtures("one_thread")


class TextsEncoded(TorchDispatchMode):
    """Counts them from outside: anything that a test put on an encoder would be seen as another encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.lookups = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.lookups += func is torch.ops.aten.embedding.default
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return self.lookups // 2  # tokens and positions


def encoded(run: Callable[[], object]) -> int:
    """How many texts ``run`` encodes."""
    with TextsEncoded() as mode:
        run()
    return mode.count


@pytest.fixture(scope="module")
def captured(own_pipeline: Callable[..., Any]) -> Editor:
    return Editor(own_pipeline())


@pytest.fixture
def editor(captured: Editor, monkeypatch: pytest.MonkeyPatch) -> Editor:
    """An editor that knows no text, with a text encoder of its own."""
    captured._texts._known.clear()
    captured._texts._nbytes = 0
    monkeypatch.setattr(captured.pipe, "text_encoder", copy.deepcopy(captured.pipe.text_encoder))
    return captured


def pixels(given: Any) -> np.ndarray:
    return np.stack([np.asarray(each) for each in given])


def test_an_edit_encodes_its_new_words_alone(editor: Editor, own_pipeline: Callable[..., Any]) -> None:
    base = generate(editor)
    edits = []
    assert encoded(lambda: edits.append(editor.edit(base, EDIT, left_half()))) == 1
    assert encoded(lambda: edits.append(editor.edit(base, EDIT, left_half()))) == 0
    assert encoded(lambda: editor.edit(base, OTHER, left_half(), negative_prompt="a dog")) == 2
    fresh = Editor(own_pipeline())
    want = fresh.edit(generate(fresh), EDIT, left_half())
    for edit in edits:
        assert torch.equal(edit.latents, want.latents)
        assert np.array_equal(pixels(edit.images), pixels(want.images))


def test_of_several_text_encoders() -> None:
    editor = Editor(tiny_sdxl(), CONFIG)
    mask = torch.ones(16, 16)
    mask[:12] = 0
    base = generate(editor, negative_prompt="a cat")
    edits = []
    assert encoded(lambda: edits.append(editor.edit(base, EDIT, mask))) == 2
    assert encoded(lambda: edits.append(editor.edit(base, EDIT, mask))) == 0
    assert torch.equal(edits[0].latents, edits[1].latents)


def last_weight(encoder: Any) -> torch.Tensor:
    """Of the last layer norm, which transformers 4 has one module further down."""
    weight: torch.Tensor = getattr(encoder, "text_model", encoder).final_layer_norm.weight
    return weight


def test_an_encoder_that_changed_encodes_again(editor: Editor) -> None:
    pipe = editor.pipe
    generate(editor)
    with torch.no_grad():
        last_weight(pipe.text_encoder).mul_(2)
    plain = pipe(PROMPT, **arguments()).images
    bases = []
    assert encoded(lambda: bases.append(generate(editor))) == 2
    assert np.array_equal(pixels(bases[0].images), pixels(plain))
    other = tiny_pipeline().text_encoder
    pipe.text_encoder = other
    plain = pipe(PROMPT, **arguments()).images
    assert encoded(lambda: bases.append(generate(editor))) == 2
    assert np.array_equal(pixels(bases[1].images), pixels(plain))


def test_what_was_changed_meanwhile_by_another_thread_is_not_kept(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = last_weight(editor.pipe.text_encoder)
    before = weight.detach().clone()

    def keep(*_: Any) -> None:
        raise AssertionError("kept")

    def encode_and_change(memo: TextMemo, name: str, encoder: Any, state: Any, args: Any, kwargs: Any) -> Any:
        def changed(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                weight.mul_(1.5)
            return encoder(*args, **kwargs)

        return encode(memo, name, changed, state, args, kwargs)  # type: ignore[arg-type]

    encode = TextMemo.encode
    with monkeypatch.context() as patch:
        patch.setattr(TextMemo, "encode", encode_and_change)
        patch.setattr(TextMemo, "_keep", keep)
        with pytest.raises(BaseMismatchError):
            generate(editor)
    with torch.no_grad():
        weight.copy_(before)
    plain = editor.pipe(PROMPT, **arguments()).images
    assert np.array_equal(pixels(generate(editor).images), pixels(plain))


def test_who_writes_to_embeddings_writes_to_their_own(editor: Editor) -> None:
    def zero(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["prompt_embeds"].zero_()
        return {}

    base = generate(editor)
    generate(editor, callback_on_step_end=zero, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert torch.equal(generate(editor).latents, base.latents)


def test_with_a_scale_for_lora_all_texts_are_encoded(editor: Editor) -> None:
    for _ in range(2):
        assert encoded(lambda: generate(editor, cross_attention_kwargs={"scale": 0.5})) == 2


def test_in_training_all_texts_are_encoded(editor: Editor) -> None:
    editor.pipe.text_encoder.train()
    for _ in range(2):
        assert encoded(lambda: generate(editor)) == 2


def test_what_was_asked_for_longest_ago_goes_first(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(editor)
    each = editor._texts._nbytes // 2
    monkeypatch.setattr(text_memo, "MOST_BYTES", 2 * each)
    generate(editor, EDIT)  # the negative prompt is asked for again, and the first prompt goes
    assert editor._texts._nbytes == 2 * each
    assert encoded(lambda: generate(editor, EDIT)) == 0
    assert encoded(lambda: generate(editor, PROMPT)) == 1
