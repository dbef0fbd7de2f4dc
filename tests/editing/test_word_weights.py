"""Re-weighted words: which tokens they are, what they do to attention maps and pictures, and what is no such word."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.pipelines import EDIT, PROMPT, generate, left_half
from support.small_tokenizers import LENGTH, SlowTokenizer, byte_pairs, word_level

from fisedit_compile import Base, Editor
from fisedit_compile.editing.word_weights import token_weights, weights_of_samples
from fisedit_compile.kernels.attention.controlled_attention import attention_probabilities, controlled_attention
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


def weighed(tokenizer: Any, prompt: str, weights: dict[str, float], **second: Any) -> list[float]:
    pipe = SimpleNamespace(tokenizer=tokenizer, **second)
    return token_weights(pipe, [prompt], [weights], arguments={})[0].tolist()


def places(row: list[float]) -> dict[int, float]:
    return {place: weight for place, weight in enumerate(row) if weight != 1}


class TestTokens:
    @pytest.mark.parametrize(
        ("prompt", "weights", "expected"),
        [
            ("a red cat on the left", {"red": 2.0}, {2: 2.0}),
            ("a red cat, the red dog", {"red": 2.0}, {2: 2.0, 6: 2.0}),
            ("a red cat, the red dog", {"red dog": -1.0, "cat": 0.5}, {3: 0.5, 6: -1.0, 7: -1.0}),
            ("a red cat", {"RED": 2.0}, {2: 2.0}),
            ("a red cat", {"red cat": 2.0, "cat": 0.0}, {2: 2.0, 3: 0.0}),
            ("a red cat", {}, {}),
        ],
    )
    def test_of_words_and_words_in_a_row(
        self, prompt: str, weights: dict[str, float], expected: dict[int, float]
    ) -> None:
        row = weighed(word_level(), prompt, weights)
        assert len(row) == LENGTH
        assert places(row) == expected

    def test_all_tokens_of_a_word(self) -> None:
        assert places(weighed(byte_pairs(), "a lion", {"lion": 1.5})) == {2: 1.5, 3: 1.5}  # two tokens

    def test_with_a_slow_tokenizer(self) -> None:
        row = weighed(SlowTokenizer(), "a cat left", {"cat": 1.5})
        assert set(places(row).values()) == {1.5}

    @pytest.mark.parametrize(
        ("prompt", "word", "message"),
        [
            ("a red cat", "blue", "weights has 'blue', which is not in 'a red cat'"),
            ("a red cat", "re", "weights has 're', which is not in"),
            (
                "a cat " * 10 + "dog",
                "dog",
                "not as words of its own among the 16 tokens .*: give whole words, or a sho",
            ),
            ("a zebra and a gnu", "zebra", "whose tokens stand for other words"),
        ],
    )
    def test_what_is_no_word_of_the_prompt_is_refused(self, prompt: str, word: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            weighed(word_level(), prompt, {word: 2.0})

    def test_of_two_text_encoders(self) -> None:
        row = weighed(word_level(), "a red cat", {"cat": 2.0}, tokenizer_2=word_level())
        assert places(row) == {3: 2.0}
        pipe = SimpleNamespace(tokenizer=word_level(), tokenizer_2=word_level())
        given = {"weights": [{"cat": 2.0}], "arguments": {"prompt_2": ["the cat"]}}
        with pytest.raises(ValueError, match=r"at different places.*: use the same words in prompt_2"):
            token_weights(pipe, ["a red cat"], **given)


class TestAttention:
    def test_multiplies_the_maps_that_control_leaves(self) -> None:
        torch.manual_seed(0)
        query, key, value = torch.randn(4, 3, 10, 8), torch.randn(4, 3, 7, 8), torch.randn(4, 3, 7, 8)
        base, keep = torch.rand(20, 3, 7).softmax(-1), torch.tensor([1.0, 1, 0, 1, 0, 0, 1]).expand(2, 7)
        mapper = torch.diag_embed(keep)
        weight = torch.tensor([[1.0, 2, -1, 0, 1, 1, 1], [1.0] * 7])
        shown = torch.eye(7).expand(4, 3, 7, 7)  # values that show the maps themselves
        maps = controlled_attention(query, key, shown, base, mapper, keep)[2:]
        out = controlled_attention(query, key, value, base, mapper, keep, weight=weight)
        assert_close(out[2:], (maps * weight[:, None, None]) @ value[2:])
        assert torch.equal(out[:2], controlled_attention(query, key, value, base, mapper, keep)[:2])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weights_of_one_change_no_bit(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        query, key, value = (torch.randn(2, 3, size, 8, dtype=dtype) for size in (10, 7, 7))
        base = attention_probabilities(key.roll(1, 2).repeat(1, 1, 2, 1)[:, :, :10], key, samples=1)
        control = (base, torch.eye(7)[None], torch.ones(1, 7))
        want = controlled_attention(query, key, value, *control)
        assert torch.equal(controlled_attention(query, key, value, *control, weight=torch.ones(1, 7)), want)


class TestEdits:
    def test_of_the_base_s_own_words(self, tiny_editor: Editor, tiny_base: Base) -> None:
        more = tiny_editor.edit(tiny_base, PROMPT, left_half(), weights={"cat": 2.0})
        less = tiny_editor.edit(tiny_base, PROMPT, left_half(), weights={"cat": -2.0})
        assert more.report.background_identical
        assert not torch.equal(more.latents, tiny_base.latents)
        assert not torch.equal(more.latents, less.latents)
        again = tiny_editor.edit(tiny_base, PROMPT, left_half(), weights=[{"cat": 2.0}])
        assert torch.equal(more.latents, again.latents)

    def test_a_mask_is_found_from_weights_alone(self, tiny_editor: Editor, tiny_base: Base) -> None:
        edit = tiny_editor.edit(tiny_base, PROMPT, weights={"cat": 2.0})
        assert edit.mask.any()

    def test_of_other_words_and_in_dense_edits(self, tiny_editor: Editor, tiny_base: Base) -> None:
        for dense in (False, True):
            plain = tiny_editor.edit(tiny_base, EDIT, left_half(), dense=dense)
            edits = [
                tiny_editor.edit(tiny_base, EDIT, left_half(), dense=dense, weights=weights)
                for weights in ({"dog": 2.0}, {"dog": 1.0}, {"dog": 1})
            ]
            assert [torch.equal(each.latents, plain.latents) for each in edits] == [False, True, True]

    def test_a_sample_without_weights_or_new_words_stays(self, tiny_editor: Editor) -> None:
        base = generate(tiny_editor, [PROMPT, PROMPT], generator=[torch.Generator().manual_seed(i) for i in (1, 2)])
        edit = tiny_editor.edit(base, [PROMPT, PROMPT], left_half(), weights=[None, {"cat": 2.0}])
        assert torch.equal(edit.latents[0], base.latents[0])
        assert not torch.equal(edit.latents[1], base.latents[1])

    @pytest.mark.parametrize(
        ("prompt", "weights", "message"),
        [
            (EDIT, {"cat": 2.0}, "weights has 'cat', which is not in 'a dog on the left'"),
            (EDIT, {"dog": float("nan")}, r"weights has nan for 'dog': give a finite number, as a rule in \[-2, 2\]"),
            (EDIT, {"dog": True}, "weights has True for 'dog'"),
            (EDIT, {"dog": "2"}, "weights has '2' for 'dog'"),
            (EDIT, {"": 2.0}, "weights has '': give words of the prompt"),
            (EDIT, {3: 2.0}, "weights has 3: give words of the prompt"),
            (EDIT, 2.0, "weights=2.0: give a mapping of words to numbers"),
            (EDIT, [{"dog": 2.0}] * 2, r"2 mapping\(s\) in weights for 1 prompt\(s\)"),
            (PROMPT, {"cat": 1.0}, "the new prompt is the base's own"),
        ],
    )
    def test_bad_weights_are_refused_before_anything_is_computed(
        self,
        tiny_editor: Editor,
        tiny_base: Base,
        monkeypatch: pytest.MonkeyPatch,
        prompt: str,
        weights: Any,
        message: str,
    ) -> None:
        monkeypatch.setattr(type(tiny_editor.pipe), "encode_prompt", lambda *_, **__: pytest.fail("the pipeline ran"))
        with pytest.raises(ValueError, match=message):
            tiny_editor.edit(tiny_base, prompt, left_half(), weights=weights)

    def test_without_a_step_under_control_they_would_do_nothing(self, tiny_editor_with: Callable[..., Editor]) -> None:
        editor = tiny_editor_with(cross_replace=0.0)
        with pytest.raises(ValueError, match="this edit has none: generate the base with cross_replace above 0"):
            editor.edit(generate(editor), EDIT, left_half(), weights={"dog": 2.0})


def test_one_mapping_serves_all_prompts_and_ones_are_left_out() -> None:
    assert weights_of_samples({"a": 2, "b": 1}, 2) == ({"a": 2.0}, {"a": 2.0})
    assert weights_of_samples(None, 2) == ({}, {})
    assert weights_of_samples([None, {"a": 0}], 2) == ({}, {"a": 0.0})
