"""How much single words of a new prompt count: Prompt-to-Prompt's re-weighting.

Source: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", 2022, section 3.2 (attention
re-weighting). In steps under control the cross-attention maps of a word's tokens are multiplied by its weight, after
what is kept of the base's was exchanged. The paper's weights are in [-2, 2]: above 1 a word shows more, below it less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fisedit_compile.editing.prompt_tokens import WORD, pipeline_prompts, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Word or words in a row -> weight.
Weights = Mapping[str, float]


def weights_of_samples(weights: Any, samples: int) -> tuple[Weights, ...]:
    """The weights of each sample's words; those of 1, which change nothing, are left out.

    Args:
        weights: as the user gave them: a mapping for all samples, a sequence with one for each, or None.
        samples: how many prompts there are.

    Raises:
        ValueError: anything else.
    """
    if weights is None or isinstance(weights, Mapping):
        each = [weights or {}] * samples
    elif isinstance(weights, (list, tuple)) and all(isinstance(item, (Mapping, type(None))) for item in weights):
        each = [item or {} for item in weights]
    else:
        raise ValueError(f"weights={weights!r}: give a mapping of words to numbers, or a list with one for each prompt")
    if len(each) != samples:
        raise ValueError(f"{len(each)} mapping(s) in weights for {samples} prompt(s): give one for each, or one")
    for word, weight in (item for mapping in each for item in mapping.items()):
        if not isinstance(word, str) or not WORD.findall(word):
            raise ValueError(f"weights has {word!r}: give words of the prompt")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"weights has {weight!r} for {word!r}: give a finite number, as a rule in [-2, 2]")
    return tuple({word: float(weight) for word, weight in mapping.items() if weight != 1} for mapping in each)


def token_weights(
    pipe: Any,
    prompts: Sequence[str],
    weights: Sequence[Weights],
    *,
    arguments: Mapping[str, Any],
    device: torch.device | str | None = None,
) -> Tensor:
    """What the attention map of each token is multiplied by, fp32 ``[n, T]``; 1 where nothing was asked for.

    A word counts wherever the prompt has it; where two of the words cover a token, their product.

    Args:
        pipe: the diffusers pipeline; its tokenizers say which tokens are a word's.
        prompts: of the edit, one a sample.
        weights: of :func:`weights_of_samples`.
        arguments: the other arguments of the edit's call, ``prompt_2`` (SDXL) among them.
        device: where the result goes.

    Raises:
        ValueError: a word that a prompt has not, or that is not tokens of its own among those that the text encoder
            reads; or one that lies elsewhere for the second text encoder: cross-attention has one map for both.
    """
    texts = pipeline_prompts(pipe, prompts, arguments)
    rows = [torch.ones(len(prompts), tokenizer.model_max_length) for tokenizer, _ in texts]
    for sample, mapping in enumerate(weights):
        for word, weight in mapping.items():
            words = pipeline_prompts(pipe, [word], {})  # a textual inversion is a token a vector in both
            for row, (tokenizer, prompts_of_encoder), (_, [spelled]) in zip(rows, texts, words, strict=True):
                row[sample, _positions(tokenizer, prompts_of_encoder[sample], spelled)] *= weight
    if not all(torch.equal(rows[0], other) for other in rows[1:]):
        raise ValueError(
            f"the two text encoders of {type(pipe).__name__} have the words of weights at different places, and "
            "cross-attention has one map for both: use the same words in prompt_2"
        )
    return rows[0].to(device)


def _positions(tokenizer: PreTrainedTokenizerBase, prompt: str, word: str) -> list[int]:
    """The positions of the tokens of a word, or of words in a row, wherever a prompt has them."""
    written = len(_found(_words(prompt), _words(word)))
    if not written:
        raise ValueError(f"weights has {word!r}, which is not in {prompt!r}: give words of the new prompt")
    units = tokenize(tokenizer, prompt).units
    keys = [unit.key for unit in tokenize(tokenizer, word).units if not unit.key[0]]
    starts = _found([unit.key for unit in units], keys)
    if not starts:
        raise ValueError(
            f"weights has {word!r}, which is in {prompt!r}, but not as words of its own among the "
            f"{tokenizer.model_max_length} tokens that the text encoder reads: give whole words, or a shorter prompt"
        )
    if len(starts) > written:
        raise ValueError(f"weights has {word!r}, whose tokens stand for other words of {prompt!r}, too: leave it out")
    return [position for start in starts for unit in units[start : start + len(keys)] for position in unit.positions]


def _words(text: str) -> list[str]:
    return [word.casefold() for word in WORD.findall(text)]


def _found(items: Sequence[object], wanted: Sequence[object]) -> list[int]:
    """Where ``wanted`` lies among ``items``, item by item."""
    last = len(items) - len(wanted)
    return [start for start in range(last + 1) if list(items[start : start + len(wanted)]) == list(wanted)]
