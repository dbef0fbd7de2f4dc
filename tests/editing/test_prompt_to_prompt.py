"""Token alignment and cross-attention under Prompt-to-Prompt control."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fisedit_compile.editing.prompt_to_prompt import align, align_batch, changed_words
from fisedit_compile.kernels.attention.controlled_attention import attention_probabilities, controlled_attention
from fisedit_compile.testing import TOLERANCES, assert_close, relative_error

WORDS = "a the cat dog lion red blue apple wearing crown on left right and , sunset".split()  # noqa: SIM905
LENGTH = 16


def with_specials(tokenizer: Tokenizer, length: int = LENGTH) -> PreTrainedTokenizerFast:
    """Begin and end of text around the words; padding is the end of text, as in Stable Diffusion 1.5."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<bos>", "<eos>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
    )


def word_level() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return with_specials(tokenizer)


def byte_pairs(length: int = LENGTH) -> PreTrainedTokenizerFast:
    """CLIP's kind. Short frequent words are one token; "lion" is 2, "crown" 3 and "sunset" 6 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<bos>", "<eos>", "<unk>", *alphabet, *(letter + "</w>" for letter in alphabet)]
    spelling = (
        "c a,ca t</w>,d o,do g</w>,r e,re d</w>,o n</w>,l e,le f,lef t</w>,t h,th e</w>,a n,an d</w>,l i,c r,w n</w>"
    )
    merges = [(left, right) for left, right in (pair.split() for pair in spelling.split(","))]
    vocabulary += [left + right for left, right in merges]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return with_specials(tokenizer, length)


class SlowTokenizer(PreTrainedTokenizer):
    """In plain Python, without word ids: letters in pairs, apostrophes part of a word."""

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012  (the name and type that transformers looks for)

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        super().__init__(
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<eos>",
            unk_token="<unk>",
            model_max_length=LENGTH,
        )

    @property
    def vocab_size(self) -> int:
        return len(self.known)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.known)

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return [word[i : i + 2] for word in text.replace(",", " ,").split() for i in range(0, len(word), 2)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.known.setdefault(token, 1000 + len(self.known))

    def _convert_id_to_token(self, index: int) -> str:
        return next(token for token, i in self.known.items() if i == index)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [self.bos_token_id, *token_ids_0, self.eos_token_id]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 2


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


def tensors(
    batch: int = 4, tokens: int = 7, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query [B, 3, 10, 8], key and value [B, 3, T, 8]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, 3, 10, 8), (batch, 3, tokens, 8), (batch, 3, tokens, 8)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def random_alignment(samples: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keep = (torch.rand(samples, tokens, generator=generator) < 0.6).float()
    source = torch.randint(tokens, (samples, tokens), generator=generator)
    mapper = F.one_hot(source, tokens).float().transpose(1, 2) * keep[:, None]
    return mapper, keep


class TestAttentionProbabilities:
    @pytest.mark.parametrize("samples", [2, 4])
    @pytest.mark.parametrize("scale", [None, 0.2])
    def test_times_the_values_it_is_attention_of_the_conditional_half(self, samples: int, scale: float | None) -> None:
        query, key, value = tensors()
        probs = attention_probabilities(query, key, samples=samples, scale=scale)
        assert probs.shape == (samples, 3, 10, 7)
        plain = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=scale)
        assert_close(probs @ value[-samples:], plain[-samples:])

    def test_keeps_the_dtype(self) -> None:
        query, key, _ = tensors(dtype=torch.bfloat16)
        probs = attention_probabilities(query, key, samples=2)
        assert probs.dtype == torch.bfloat16
        torch.testing.assert_close(probs.float().sum(dim=-1), torch.ones(2, 3, 10), rtol=0, atol=1e-2)


class TestControlledAttention:
    @pytest.mark.parametrize("batch", [2, 4])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_the_same_prompt_is_plain_attention(self, batch: int, dtype: torch.dtype) -> None:
        query, key, value = tensors(batch, dtype=dtype)
        probs = attention_probabilities(query, key, samples=2)
        out = controlled_attention(query, key, value, probs, torch.eye(7).expand(2, 7, 7), torch.ones(2, 7))
        assert out.dtype == dtype
        plain = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
        assert_close(out, plain, dtype)

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 2**31 - 1), st.integers(1, 3), st.booleans(), st.integers(2, 9))
    def test_is_the_formula_with_shares_that_sum_to_one(
        self, seed: int, samples: int, guided: bool, tokens: int
    ) -> None:
        query, key, value = tensors(samples * (2 if guided else 1), tokens, seed=seed)
        old_query, old_key, _ = tensors(samples, tokens, seed=seed + 1)
        base_probs = attention_probabilities(old_query, old_key, samples=samples)
        mapper, keep = random_alignment(samples, tokens, seed)
        out = controlled_attention(query, key, value, base_probs, mapper, keep)

        query, key, value = query.double(), key.double(), value.double()
        expected = F.scaled_dot_product_attention(query, key, value)
        for sample in range(samples):
            row = len(query) - samples + sample
            for head in range(3):
                fresh = (query[row, head] @ key[row, head].T / 8**0.5).softmax(dim=-1)
                kept = base_probs[sample, head].double() @ mapper[sample].double()
                probs = torch.where(keep[sample] > 0, kept, fresh)
                expected[row, head] = probs / probs.sum(dim=-1, keepdim=True) @ value[row, head]
        assert_close(out, expected)
        ones = controlled_attention(query, key, torch.ones_like(value), base_probs, mapper, keep)
        torch.testing.assert_close(ones, torch.ones_like(ones))

    def test_the_unconditional_half_is_plain_attention(self) -> None:
        query, key, value = tensors()
        mapper, keep = random_alignment(2, 7, 3)
        base_probs = attention_probabilities(*tensors(seed=9)[:2], samples=2)
        out = controlled_attention(query, key, value, base_probs, mapper, keep)
        plain = F.scaled_dot_product_attention(query[:2], key[:2], value[:2])
        assert torch.equal(out[:2], plain)
        alone = controlled_attention(query[2:], key[2:], value[2:], base_probs, mapper, keep)
        assert torch.equal(out[2:], alone)

    def test_without_kept_words_it_is_plain_attention(self) -> None:
        query, key, value = tensors()
        base_probs = torch.full((2, 3, 10, 7), 1 / 7)
        out = controlled_attention(query, key, value, base_probs, torch.zeros(2, 7, 7), torch.zeros(2, 7))
        assert_close(out, F.scaled_dot_product_attention(query.double(), key.double(), value.double()))

    def test_a_query_that_saw_only_removed_words_keeps_its_own_shares(self) -> None:
        query, key, value = tensors(2)
        base_probs = torch.zeros(2, 3, 10, 7)
        base_probs[..., 6] = 1  # all on the last word, which the edit has not
        mapper = torch.eye(7)
        mapper[6] = 0
        out = controlled_attention(query, key, value, base_probs, mapper.expand(2, 7, 7), torch.ones(2, 7))
        assert_close(out, F.scaled_dot_product_attention(query.double(), key.double(), value.double()))

    def test_prompts_of_other_token_counts(self) -> None:
        query, key, value = tensors(2, tokens=5)
        base_probs = attention_probabilities(*tensors(2, tokens=9)[:2], samples=2)
        mapper = torch.zeros(2, 9, 5)
        mapper[:, 4:, :] = torch.eye(5)
        out = controlled_attention(query, key, value, base_probs, mapper, torch.ones(2, 5))
        probs = base_probs[..., 4:].double()
        assert_close(out, probs / probs.sum(dim=-1, keepdim=True) @ value.double())

    def test_an_inserted_word_from_the_prompts_on(self) -> None:
        mapper, keep = align_batch(word_level(), ["a cat on the left"], ["a red cat on the left"])
        query, key, _ = tensors(2, LENGTH)
        base_probs = attention_probabilities(*tensors(2, LENGTH, seed=4)[:2], samples=1)
        one_hot = torch.eye(LENGTH).expand(2, 3, LENGTH, LENGTH)  # values that show the shares themselves
        shares = controlled_attention(query, key, one_hot, base_probs, mapper, keep)[1:]
        torch.testing.assert_close(shares.sum(dim=-1), torch.ones(1, 3, 10))
        # "a" (1), "cat" (2 to 3) and "left" (5 to 6) stand to each other as they did in the base
        ratio = shares[..., [3, 6]] / shares[..., [1]]
        torch.testing.assert_close(ratio, base_probs[..., [2, 5]] / base_probs[..., [1]], rtol=1e-4, atol=0)

    def test_exports_and_compiles_without_a_break(self) -> None:
        class Layer(torch.nn.Module):
            def forward(
                self,
                query: torch.Tensor,
                key: torch.Tensor,
                value: torch.Tensor,
                base_probs: torch.Tensor,
                mapper: torch.Tensor,
                keep: torch.Tensor,
            ) -> torch.Tensor:
                return controlled_attention(query, key, value, base_probs, mapper, keep, scale=0.3)

        base_probs = attention_probabilities(*tensors(seed=9)[:2], samples=2)
        arguments = (*tensors(), base_probs, *random_alignment(2, 7, 3))
        expected = Layer()(*arguments)
        exported = torch.export.export(Layer(), arguments, strict=False).module()
        assert relative_error(exported(*arguments), expected) <= TOLERANCES[torch.float32]
        compiled = torch.compile(Layer(), backend="eager", fullgraph=True)
        assert relative_error(compiled(*arguments), expected) <= TOLERANCES[torch.float32]

    def test_a_batch_that_does_not_fit(self) -> None:
        query, key, value = tensors(3)
        mapper, keep = random_alignment(2, 7, 3)
        with pytest.raises(ValueError, match=r"2 sample\(s\) were given for a batch of 3"):
            controlled_attention(query, key, value, torch.full((2, 3, 10, 7), 1 / 7), mapper, keep)
