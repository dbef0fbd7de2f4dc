"""Which tokens of a base prompt stand for those of an edited one, and prompts that change nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_tokenizers import LENGTH, WORDS, SlowTokenizer, byte_pairs, word_level
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fisedit_compile.editing.prompt_alignment import (
    align,
    align_batch,
    align_prompts,
    changed_words,
    removed_tokens,
)
from fisedit_compile.editing.prompt_tokens import check_text_length, tokenize
from fisedit_compile.errors import CaptureError, MaskError


def pairs(tokenizer: PreTrainedTokenizerBase, base: str, edit: str) -> dict[int, dict[int, float]]:
    """Edited position -> {base position: weight}, of real tokens and padding off the diagonal."""
    alignment = align(tokenizer, base, edit)
    mapper, keep = alignment.mapper, alignment.keep
    used = sum(tokenizer(edit, padding="max_length", truncation=True, max_length=LENGTH)["attention_mask"])
    found: dict[int, dict[int, float]] = {}
    for j in range(mapper.shape[1]):
        sources = {int(i): round(float(mapper[i, j]), 4) for i in mapper[:, j].nonzero()}
        assert bool(sources) == bool(keep[j])
        if j < used or sources not in ({}, {j: 1.0}):
            found[j] = sources
    return found


class TestAlign:
    @pytest.mark.parametrize("make", [word_level, byte_pairs, SlowTokenizer])
    @pytest.mark.parametrize("prompt", ["", "a red cat on the left", "sunset, sunset, sunset and a red lion, lion"])
    def test_the_same_prompt_gives_the_identity(self, make: type, prompt: str) -> None:
        alignment = align(make(), prompt, prompt)
        assert torch.equal(alignment.mapper, torch.eye(LENGTH))
        assert torch.equal(alignment.keep, torch.ones(LENGTH))
        assert alignment.mapper.dtype == alignment.keep.dtype == torch.float32

    def test_a_replaced_word_takes_the_old_words_map(self) -> None:
        found = pairs(word_level(), "a cat on the left", "a dog on the left")
        assert found == {j: {j: 1.0} for j in range(7)}

    def test_an_added_word_keeps_its_own_map(self) -> None:
        found = pairs(word_level(), "a cat on the left", "a red cat on the left")
        assert found == {0: {0: 1}, 1: {1: 1}, 2: {}, 3: {2: 1}, 4: {3: 1}, 5: {4: 1}, 6: {5: 1}, 7: {6: 1}}

    def test_a_removed_word_is_left_out_and_new_padding_keeps_its_own(self) -> None:
        tokenizer = word_level()
        found = pairs(tokenizer, "a red cat on the left", "a cat on the left")
        assert found == {0: {0: 1}, 1: {1: 1}, 2: {3: 1}, 3: {4: 1}, 4: {5: 1}, 5: {6: 1}, 6: {7: 1}}
        keep = align(tokenizer, "a red cat on the left", "a cat on the left").keep
        assert keep.tolist() == [1.0] * 7 + [0.0] + [1.0] * 8  # 7 was the base's end of text: no padding there

    def test_another_number_of_words_than_replaced_keep_their_own(self) -> None:
        found = pairs(word_level(), "a cat on the left", "a red lion on the left")
        assert found == {0: {0: 1}, 1: {1: 1}, 2: {}, 3: {}, 4: {3: 1}, 5: {4: 1}, 6: {5: 1}, 7: {6: 1}}

    def test_replacing_and_adding_at_once(self) -> None:
        found = pairs(word_level(), "a red cat and a dog", "a blue cat and a dog wearing a crown")
        assert found == {**{j: {j: 1} for j in range(7)}, 7: {}, 8: {}, 9: {}, 10: {7: 1}}

    def test_swapped_words_replace_each_other(self) -> None:
        found = pairs(word_level(), "a cat and a dog", "a dog and a cat")
        assert found == {j: {j: 1} for j in range(7)}

    def test_punctuation_is_no_part_of_a_word(self) -> None:
        found = pairs(word_level(), "a cat on the right", "a cat, on the right")
        assert found[2] == {2: 1}
        assert found[3] == {}
        assert found[4] == {3: 1}

    def test_letter_case_that_the_tokenizer_drops_is_no_change(self) -> None:
        assert torch.equal(align(word_level(), "a cat", "A Cat").mapper, torch.eye(LENGTH))


class TestWordsOfSeveralTokens:
    def test_the_tokenizer_splits_as_the_tests_expect(self) -> None:
        counts = {word: len(byte_pairs()(word, add_special_tokens=False)["input_ids"]) for word in WORDS}
        assert (counts["cat"], counts["lion"], counts["crown"], counts["sunset"]) == (1, 2, 3, 6)

    def test_an_unchanged_word_maps_token_by_token(self) -> None:
        found = pairs(byte_pairs(), "a lion on the left", "a red lion on the left")
        assert found[2] == {}
        assert found[3] == {2: 1}
        assert found[4] == {3: 1}
        assert found[5] == {4: 1}

    def test_one_token_for_several_takes_their_mean(self) -> None:
        found = pairs(byte_pairs(), "a crown on the left", "a cat on the left")
        assert found[2] == {2: 0.3333, 3: 0.3333, 4: 0.3333}
        assert found[3] == {5: 1}

    def test_several_tokens_for_one_all_take_it(self) -> None:
        found = pairs(byte_pairs(), "a cat on the left", "a crown on the left")
        assert found[2] == found[3] == found[4] == {2: 1}
        assert found[5] == {3: 1}

    def test_as_many_tokens_map_one_to_one(self) -> None:
        found = pairs(byte_pairs(), "a lion on the left", "a lien on the left")
        tokens = [len(byte_pairs()(word, add_special_tokens=False)["input_ids"]) for word in ("lion", "lien")]
        assert tokens == [2, 3]  # not as many: the mean
        assert found[2] == found[3] == found[4] == {2: 0.5, 3: 0.5}
        found = pairs(byte_pairs(), "a sunset on", "a sunlit on")
        count = len(byte_pairs()("sunlit", add_special_tokens=False)["input_ids"])
        assert count == 5
        assert set(found[2].values()) == {round(1 / 6, 4)}
        found = pairs(byte_pairs(), "a sunset on", "a sunbed on")
        count = len(byte_pairs()("sunbed", add_special_tokens=False)["input_ids"])
        assert count == 6
        assert all(found[j] == {j: 1} for j in range(2, 8))

    def test_the_same_letters_split_otherwise_are_another_word(self) -> None:
        found = pairs(byte_pairs(), "a cat", "a catcat")
        assert found[2] == {2: 1}
        assert found[3] == {2: 1}


class TestTruncation:
    prompt = "a cat and a dog and a lion on the left and a red apple on the right"  # 17 words, room for 14

    def test_words_cut_off_in_both_change_nothing(self) -> None:
        alignment = align(word_level(), self.prompt, self.prompt.replace("right", "left"))
        assert torch.equal(alignment.mapper, torch.eye(LENGTH))

    def test_words_that_the_base_cut_off_keep_their_own(self) -> None:
        edit = self.prompt.replace("a cat and ", "")  # three words move in from behind the cut
        alignment = align(word_level(), self.prompt, edit)
        assert alignment.mapper[14].tolist() == [0.0] * 11 + [1.0] + [0.0] * 4
        assert alignment.keep.tolist() == [1.0] * 12 + [0.0] * 3 + [1.0]
        assert alignment.mapper[15, 15] == 1  # end of text to end of text

    def test_no_padding_in_the_base(self) -> None:
        alignment = align(word_level(), self.prompt, "a cat")
        assert alignment.mapper[15, 3] == 1
        assert alignment.keep.tolist() == [1.0] * 4 + [0.0] * 12

    def test_a_word_cut_in_two_is_still_aligned(self) -> None:
        tokenizer = byte_pairs(length=8)  # bos, a, and the first 5 tokens of sunset, eos
        alignment = align(tokenizer, "a sunset", "a cat")
        assert torch.equal(alignment.mapper[2:7, 2], torch.full((5,), 0.2))

    def test_no_maximum_length(self) -> None:
        tokenizer = word_level()
        tokenizer.model_max_length = int(1e30)
        with pytest.raises(ValueError, match=r"set tokenizer\.model_max_length"):
            align(tokenizer, "a cat", "a dog")


class TestSlowTokenizers:
    """SlowTokenizer cuts words into pairs of letters: "lion" and "crown" are 2 and 3 tokens."""

    def test_words_are_found_by_tokenising_them_one_by_one(self) -> None:
        assert not SlowTokenizer().is_fast
        found = pairs(SlowTokenizer(), "a crown, on", "a lion, on")
        assert found[2] == found[3] == {2: 0.3333, 3: 0.3333, 4: 0.3333}
        assert found[4] == {5: 1}
        assert found[5] == {6: 1}

    def test_words_that_do_not_add_up_are_aligned_by_tokens(self) -> None:
        found = pairs(SlowTokenizer(), "a cat's crown", "a cat's red crown")  # "cat's" is ca t' s
        assert found == {
            **{j: {j: 1} for j in range(5)},
            5: {},
            6: {},
            **{j: {j - 2: 1} for j in range(7, 11)},
        }

    def test_truncated(self) -> None:
        alignment = align(SlowTokenizer(), "crown " * 6, "lion " + "crown " * 6)
        assert alignment.keep.tolist() == [1.0, 0.0, 0.0, *[1.0] * 13]


sentences = st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([word_level(), byte_pairs()]), sentences, sentences)
def test_columns_sum_to_keep_and_specials_are_kept(tokenizer: PreTrainedTokenizerFast, base: str, edit: str) -> None:
    alignment = align(tokenizer, base, edit)
    torch.testing.assert_close(alignment.mapper.sum(dim=0), alignment.keep)
    assert set(alignment.keep.tolist()) <= {0.0, 1.0}
    ends = [sum(tokenizer(prompt, truncation=True, max_length=LENGTH)["attention_mask"]) - 1 for prompt in (base, edit)]
    assert alignment.mapper[0, 0] == 1
    assert alignment.mapper[ends[0], ends[1]] == 1
    # the order of words is kept: later tokens come from later tokens
    first = [int(column.nonzero()[0]) for column in alignment.mapper.T[: ends[1] + 1] if column.any()]
    assert first == sorted(first)


class TestAlignBatch:
    def test_stacks_each_samples_alignment(self) -> None:
        bases, edits = ["a cat", "a dog on the left"], ["a red cat", "a dog"]
        mapper, keep = align_batch(word_level(), bases, edits, device="cpu")
        assert mapper.shape == (2, LENGTH, LENGTH)
        assert keep.shape == (2, LENGTH)
        for sample in range(2):
            alone = align(word_level(), bases[sample], edits[sample])
            assert torch.equal(mapper[sample], alone.mapper)
            assert torch.equal(keep[sample], alone.keep)

    @pytest.mark.parametrize(
        ("bases", "edits", "message"),
        [(["a"], ["a", "b"], "one for each"), ([], [], "one for each"), ("a", ["a"], "wrap it in a list")],
    )
    def test_bad_arguments(self, bases: list[str], edits: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            align_batch(word_level(), bases, edits)


@pytest.mark.parametrize(
    ("base", "edit", "removed", "added"),
    [
        ("a cat on the left", "a dog on the left", ["cat"], ["dog"]),
        ("a cat", "a cat wearing a crown", [], ["wearing", "a", "crown"]),
        ("a red cat, and a dog", "a cat, and a dog", ["red"], []),
        ("a Cat  on the left", "a cat on the left", [], []),
        ("a cat", "a cat.", [], ["."]),
        ("", "a cat", [], ["a", "cat"]),
    ],
)
def test_changed_words(base: str, edit: str, removed: list[str], added: list[str]) -> None:
    assert changed_words(base, edit) == (removed, added)


@pytest.mark.parametrize(
    ("edit", "changes"),
    [
        ("a red cat on the left", []),  # the base's own
        ("a cat on the left", [[2]]),
        ("a red lion on the left", [[3]]),
        ("a red cat at sunset", [[4, 5, 6]]),  # replaced by another number of words
        ("a red cat on the left, at sunset", [[]]),
        ("a blue cat wearing a crown on the left", [[2]]),  # one word between them: of one thing
        ("a blue lion on the right", [[2, 3], [6]]),
        ("a cat on the left wearing a crown", [[2], []]),
    ],
)
def test_the_tokens_of_words_that_go(edit: str, changes: list[list[int]]) -> None:
    pipe = SimpleNamespace(tokenizer=word_level())
    stays, goes = removed_tokens(pipe, ["a lion", "a red cat on the left"], ["a lion", edit], {})
    assert goes == changes
    assert not stays


def test_punctuation_parts_what_changes() -> None:
    pipe = SimpleNamespace(tokenizer=word_level())
    assert removed_tokens(pipe, ["a cat, a lion"], ["a lion, a cat"], {}) == [[[2], [5]]]
    assert removed_tokens(pipe, ["red cat, on the left"], ["blue lion on the right"], {}) == [[[1, 2, 3], [6]]]
    assert removed_tokens(pipe, ["cat, left"], ["lion, right"], {}) == [[[1], [3]]]


class Pipe(TextualInversionLoaderMixin):
    """What ``align_prompts`` reads of a pipeline: its tokenizers, and how it expands textual inversions."""

    def __init__(self, *tokenizers: Any) -> None:
        self.tokenizer, self.tokenizer_2 = (*tokenizers, None)[:2]


def with_vectors(count: int, tokenizer: PreTrainedTokenizerFast | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that knows ``<toy>``, a textual inversion of several vectors, named as diffusers names them."""
    tokenizer = tokenizer or word_level()
    tokenizer.add_tokens(["<toy>", *(f"<toy>_{number}" for number in range(1, count))])
    return tokenizer


def moved(pipe: Any, base: str, edit: str, **arguments: Any) -> dict[int, set[int]]:
    """Edited position -> base positions, where they are not the same, among the tokens of the edit."""
    mapper, _ = align_prompts(pipe, [base], [edit], arguments=arguments)
    sources = {new: set(mapper[0, :, new].nonzero().flatten().tolist()) for new in range(LENGTH)}
    return {new: old for new, old in sources.items() if old != {new}}


class TestTextualInversions:
    def test_the_words_behind_one_are_where_its_vectors_put_them(self) -> None:
        pipe = Pipe(with_vectors(4))
        # bos a <toy> <toy>_1 <toy>_2 <toy>_3 on the left eos, with "red" before "left" in the edit
        found = moved(pipe, "a <toy> on the left", "a <toy> on the red left")
        assert found == {8: set(), 9: {8}, 10: {9}}

    def test_its_vectors_are_one_word(self) -> None:
        pipe = Pipe(with_vectors(3))
        assert moved(pipe, "a cat on the left", "a <toy> on the left") == {
            **{new: {2} for new in (3, 4)},
            **{new: {new - 2} for new in (5, 6, 7, 8)},
        }
        mapper, _ = align_prompts(pipe, ["a <toy> on the left"], ["a cat on the left"], arguments={})
        torch.testing.assert_close(mapper[0, 2:5, 2], torch.full((3,), 1 / 3))

    def test_two_beside_each_other_are_two_words(self) -> None:
        tokenizer = with_vectors(2)
        units = tokenize(tokenizer, "a <toy> <toy>_1 <toy> <toy>_1 cat").units
        assert [unit.positions for unit in units] == [(0,), (1,), (2, 3), (4, 5), (6,), (7,)]

    def test_the_same_with_a_slow_tokenizer(self) -> None:
        tokenizer = SlowTokenizer()
        tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2"])
        found = moved(Pipe(tokenizer), "a <toy> on", "a red <toy> on")
        assert {new: old for new, old in found.items() if new < 9} == {
            2: set(),
            3: set(),
            **{new: {new - 2} for new in range(4, 9)},
        }


class TestTwoTextEncoders:
    def test_those_of_sdxl_differ_in_padding_alone_and_align_alike(self) -> None:
        second = word_level()
        second.pad_token = "<unk>"
        base, edit = ["a cat on the left"], ["a red cat on the left"]
        both = align_prompts(Pipe(word_level(), second), base, edit, arguments={})
        for found, alone in zip(both, align_batch(word_level(), base, edit), strict=True):
            assert torch.equal(found, alone)

    def test_a_textual_inversion_of_other_lengths_is_refused(self) -> None:
        pipe = Pipe(with_vectors(2), with_vectors(3))
        with pytest.raises(ValueError, match="as many vectors in tokenizer as in tokenizer_2"):
            align_prompts(pipe, ["a cat and a <toy>"], ["a dog and a red <toy>"], arguments={})

    def test_prompt_2_stays_and_has_to_align_alike(self) -> None:
        pipe = Pipe(word_level(), word_level())
        second = {"prompt_2": "a blue crown"}
        assert moved(pipe, "a red cat", "a red dog", **second) == {}
        with pytest.raises(ValueError, match="change the same words in prompt_2, which stays as it is unless"):
            align_prompts(pipe, ["a red cat"], ["a red cat on the left"], arguments=second)
        with pytest.raises(ValueError, match=r"1 prompt\(s\) in prompt_2 for 2"):
            align_prompts(pipe, ["a cat", "a dog"], ["a lion", "a lion"], arguments=second)

    def test_a_pipeline_with_the_second_tokenizer_alone(self) -> None:
        pipe = Pipe(None, word_level())
        assert moved(pipe, "a cat", "a red cat") == {2: set(), 3: {2}, 4: {3}}

    def test_a_pipeline_without_tokenizers(self) -> None:
        with pytest.raises(ValueError, match="SimpleNamespace has no tokenizer"):
            align_prompts(SimpleNamespace(), ["a cat"], ["a dog"], arguments={})

    def test_text_of_another_length_than_a_tokenizer_makes_is_refused(self) -> None:
        check_text_length(Pipe(word_level(), word_level()), LENGTH)
        with pytest.raises(CaptureError, match=rf"{2 * LENGTH} text tokens.*makes {LENGTH}.*cross_replace=0\.0"):
            check_text_length(Pipe(word_level()), 2 * LENGTH)


class TestNothingChanged:
    long = "a cat and a dog and a lion on the left and a red apple on the right"  # 17 words, room for 14

    @pytest.mark.parametrize("pipe", [Pipe(word_level()), Pipe(byte_pairs()), Pipe(word_level(), byte_pairs())])
    @pytest.mark.parametrize("edit", ["A Cat on the left", "a cat on the left ", "a cat  on the\nleft"])
    def test_letter_case_and_spaces_are_refused(self, pipe: Any, edit: str) -> None:
        with pytest.raises(
            MaskError, match=r"nothing changed for sample 0.*letter case or spaces.*change at least one"
        ):
            align_prompts(pipe, ["a cat on the left"], [edit], arguments={})

    def test_a_tokenizer_that_keeps_letter_case_sees_a_change(self) -> None:
        assert moved(Pipe(SlowTokenizer()), "a cat", "a Cat") == {}

    def test_the_same_prompt_is_refused(self) -> None:
        with pytest.raises(MaskError, match="the base's own prompt"):
            align_prompts(Pipe(word_level()), ["a cat"], ["a cat"], arguments={})

    @pytest.mark.parametrize(("make", "last"), [(word_level, "right"), (SlowTokenizer, "ri gh t")])
    def test_words_beyond_the_encoders_length_are_refused_and_named(self, make: type, last: str) -> None:
        edit = self.long.replace("right", "lion")
        with pytest.raises(MaskError, match=rf"beyond the {LENGTH} tokens.*cut off: '.*{last}' there, '.*on' here"):
            align_prompts(Pipe(make()), [self.long], [edit], arguments={})

    def test_words_added_beyond_a_prompt_that_just_fits(self) -> None:
        full = " ".join(["cat"] * (LENGTH - 2))
        with pytest.raises(MaskError, match=r"cut off: 'nothing' there, 'red dog' here"):
            align_prompts(Pipe(word_level()), [full], [f"{full} red dog"], arguments={})
        assert tokenize(word_level(), full).cut_off == ""

    def test_one_encoder_that_sees_a_change_is_enough(self) -> None:
        pipe = Pipe(word_level(), SlowTokenizer())
        assert moved(pipe, "a cat", "a Cat") == {}

    def test_each_sample_by_itself(self) -> None:
        with pytest.raises(MaskError, match=r"nothing changed for sample 1: 'A dog'"):
            align_prompts(Pipe(word_level()), ["a cat", "a dog"], ["a lion", "A dog"], arguments={})
