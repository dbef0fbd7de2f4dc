"""Cross-attention under Prompt-to-Prompt control, against plain attention and its formula in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_tokenizers import LENGTH, word_level

from fisedit_compile.editing.prompt_alignment import align_batch
from fisedit_compile.kernels.attention.controlled_attention import attention_probabilities, controlled_attention
from fisedit_compile.testing import TOLERANCES, assert_close, relative_error


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


def by_sample(probs: torch.Tensor, samples: int) -> torch.Tensor:
    """Recorded maps [n * N, heads, L] as [n, heads, N, L]."""
    return probs.unflatten(0, (samples, -1)).transpose(1, 2)


class TestAttentionProbabilities:
    @pytest.mark.parametrize("samples", [2, 4])
    @pytest.mark.parametrize("scale", [None, 0.2])
    def test_times_the_values_it_is_attention_of_the_conditional_half(self, samples: int, scale: float | None) -> None:
        query, key, value = tensors()
        probs = attention_probabilities(query, key, samples=samples, scale=scale)
        assert probs.shape == (samples * 10, 3, 7)
        probs = by_sample(probs, samples)
        plain = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=scale)
        assert_close(probs @ value[-samples:], plain[-samples:])

    def test_keeps_the_dtype(self) -> None:
        query, key, _ = tensors(dtype=torch.bfloat16)
        probs = attention_probabilities(query, key, samples=2)
        assert probs.dtype == torch.bfloat16
        torch.testing.assert_close(probs.float().sum(dim=-1), torch.ones(20, 3), rtol=0, atol=1e-2)

    def test_keeps_the_first_tokens(self) -> None:
        query, key, _ = tensors()
        probs = attention_probabilities(query, key, samples=2, tokens=4)
        assert torch.equal(probs, attention_probabilities(query, key, samples=2)[..., :4])
        assert probs.is_contiguous()


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
                kept = by_sample(base_probs, samples)[sample, head].double() @ mapper[sample].double()
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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("batch", [2, 4, 6])
    def test_the_base_s_own_maps_change_no_bit_of_plain_attention(self, batch: int, dtype: torch.dtype) -> None:
        query, key, value = tensors(batch, dtype=dtype)
        probs = attention_probabilities(query, key, samples=2)
        out = controlled_attention(query, key, value, probs, torch.eye(7).expand(2, 7, 7), torch.ones(2, 7))
        assert torch.equal(out, F.scaled_dot_product_attention(query, key, value))

    def test_the_conditional_part_may_stand_anywhere(self) -> None:
        query, key, value = tensors(6)
        mapper, keep = random_alignment(2, 7, 3)
        base_probs = attention_probabilities(*tensors(6, seed=9)[:2], samples=2, part=0)
        assert torch.equal(base_probs, attention_probabilities(*(x[:2] for x in tensors(6, seed=9)[:2]), samples=2))
        out = controlled_attention(query, key, value, base_probs, mapper, keep, part=0)
        alone = controlled_attention(query[:2], key[:2], value[:2], base_probs, mapper, keep)
        assert torch.equal(out[:2], alone)
        assert torch.equal(out[2:], F.scaled_dot_product_attention(query[2:], key[2:], value[2:]))

    def test_without_kept_words_it_is_plain_attention(self) -> None:
        query, key, value = tensors()
        base_probs = torch.full((20, 3, 7), 1 / 7)
        out = controlled_attention(query, key, value, base_probs, torch.zeros(2, 7, 7), torch.zeros(2, 7))
        assert_close(out, F.scaled_dot_product_attention(query.double(), key.double(), value.double()))

    def test_a_query_that_saw_only_removed_words_keeps_its_own_shares(self) -> None:
        query, key, value = tensors(2)
        base_probs = torch.zeros(20, 3, 7)
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
        probs = by_sample(base_probs, 2)[..., 4:].double()
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
        kept = by_sample(base_probs, 1)
        torch.testing.assert_close(ratio, kept[..., [2, 5]] / kept[..., [1]], rtol=1e-4, atol=0)

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
        base_probs = torch.full((20, 3, 7), 1 / 7)
        with pytest.raises(ValueError, match=r"2 sample\(s\) is not in a batch of 3"):
            controlled_attention(query, key, value, base_probs, mapper, keep)
        query, key, value = tensors(4)
        with pytest.raises(ValueError, match=r"part 2 of 2 sample\(s\)"):
            controlled_attention(query, key, value, base_probs, mapper, keep, part=2)
