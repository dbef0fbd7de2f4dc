"""Prompt-to-Prompt control: words that stay keep the attention maps they had in the base.

Source: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", 2022 (word swap and
prompt refinement, their section 3.3), as used in section 3.1 of FISEdit for the first, dense steps of an
edit. Where a word lies in the picture is decided by the cross-attention maps of those steps, so carrying them
over keeps the layout.

The shares of one query over all tokens are renormalised after the exchange: an added word brings its own
share on top of the base's, and without renormalisation the sum differs from 1 and inserting a word fails.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokenizers without a length of their own report a number around 1e30.
_LONGEST_PROMPT = 1_000_000

_WORD = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True)
class TokenAlignment:
    """Which tokens of a base prompt stand for the tokens of an edited prompt.

    Attributes:
        mapper: fp32 ``[T_base, T_edit]``; ``base_probs @ mapper`` gives for every edited token the map to
            keep. Columns sum to 1 where ``keep`` is 1 and to 0 elsewhere.
        keep: fp32 ``[T_edit]``; 1 where a token's map is taken from the base, 0 where the token keeps its
            own.
    """

    mapper: torch.Tensor
    keep: torch.Tensor


@dataclass(frozen=True)
class _Unit:
    """A word or a special token: what is compared, and the token positions it covers."""

    key: tuple[bool, tuple[int, ...]]  # (special token?, token ids)
    positions: tuple[int, ...]


def align(tokenizer: PreTrainedTokenizerBase, base_prompt: str, edit_prompt: str) -> TokenAlignment:
    """Align the tokens of an edited prompt with those of its base, padded and truncated as pipelines do.

    A diff over words (their token ids, so that what the text encoder cannot tell apart is equal) decides:

    - unchanged words, begin and end of text: token by token from the base;
    - as many words as they replace: each new word takes the maps of the old word in its place, token by token
      when both have as many tokens, else the mean over the old word's tokens (Prompt-to-Prompt's word swap);
    - added words, or another number of words than they replace: their own maps (its prompt refinement);
    - padding: the base's padding at the same position, if there is padding there.

    Args:
        tokenizer: any transformers tokenizer with a ``model_max_length``, fast or not. Prompts with
            textual-inversion tokens have to be expanded before (``pipe.maybe_convert_prompt``).
        base_prompt: the words of the base.
        edit_prompt: the new words; equal to the base's is no error here and gives the identity.

    Raises:
        ValueError: the tokenizer has no maximum length.
    """
    base, base_padding, length = _units(tokenizer, base_prompt)
    edit, edit_padding, _ = _units(tokenizer, edit_prompt)
    mapper = torch.zeros(length, length)
    matcher = SequenceMatcher(None, [unit.key for unit in base], [unit.key for unit in edit], autojunk=False)
    for operation, b0, b1, e0, e1 in matcher.get_opcodes():
        if operation not in ("equal", "replace") or b1 - b0 != e1 - e0:
            continue
        for old, new in zip(base[b0:b1], edit[e0:e1], strict=True):
            if len(old.positions) == len(new.positions):
                mapper[list(old.positions), list(new.positions)] = 1.0
            else:
                for position in new.positions:
                    mapper[list(old.positions), position] = 1.0 / len(old.positions)
    shared = sorted(base_padding & edit_padding)
    mapper[shared, shared] = 1.0
    return TokenAlignment(mapper=mapper, keep=(mapper.sum(dim=0) > 0).float())


def align_batch(
    tokenizer: PreTrainedTokenizerBase,
    base_prompts: Sequence[str],
    edit_prompts: Sequence[str],
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``align`` for each sample of a batch.

    Returns:
        mapper fp32 ``[n, T, T]`` and keep fp32 ``[n, T]``, on ``device``.

    Raises:
        ValueError: no prompts, or not one new prompt for each prompt of the base.
    """
    if isinstance(base_prompts, str) or isinstance(edit_prompts, str):
        raise ValueError("a single prompt was given where a list with one prompt a sample is wanted; wrap it in a list")
    if not base_prompts or len(base_prompts) != len(edit_prompts):
        raise ValueError(
            f"{len(edit_prompts)} new prompt(s) were given for {len(base_prompts)} prompt(s) of the base; "
            "give one for each sample"
        )
    pairs = zip(base_prompts, edit_prompts, strict=True)
    alignments = [align(tokenizer, base_prompt, edit_prompt) for base_prompt, edit_prompt in pairs]
    mapper = torch.stack([alignment.mapper for alignment in alignments])
    return mapper.to(device), torch.stack([alignment.keep for alignment in alignments]).to(device)


def changed_words(base_prompt: str, edit_prompt: str) -> tuple[list[str], list[str]]:
    """Words (and punctuation) of the base that went, and those that came, in order; letter case is ignored.

    Both are empty for prompts that differ in spaces and letter case only: an edit without a change.
    """
    old, new = _WORD.findall(base_prompt), _WORD.findall(edit_prompt)
    matcher = SequenceMatcher(None, [w.casefold() for w in old], [w.casefold() for w in new], autojunk=False)
    changes = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    removed = [word for _, b0, b1, _, _ in changes for word in old[b0:b1]]
    added = [word for _, _, _, e0, e1 in changes for word in new[e0:e1]]
    return removed, added


def _units(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[list[_Unit], set[int], int]:
    """Words and special tokens of a prompt in order, the positions of its padding, and the padded length."""
    length = tokenizer.model_max_length
    if length > _LONGEST_PROMPT:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no maximum length; set "
            "tokenizer.model_max_length to the number of tokens that the text encoder takes"
        )
    encoding = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_attention_mask=True)
    ids, used = encoding["input_ids"], encoding["attention_mask"]
    words = encoding.word_ids() if tokenizer.is_fast else _word_ids(tokenizer, prompt, ids)
    # Padding may have the id of the end of text (Stable Diffusion 1.5): the attention mask tells them apart.
    real = [position for position in range(length) if used[position]]

    def word_of(position: int) -> tuple[bool, int]:
        word = words[position]
        return (True, position) if word is None else (False, word)

    units = []
    for (special, _), group in groupby(real, key=word_of):
        positions = tuple(group)
        units.append(_Unit((special, tuple(ids[position] for position in positions)), positions))
    return units, set(range(length)) - set(real), length


def _word_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int]) -> list[int | None]:
    """The word of each token (None: special token or padding), for tokenizers that do not tell."""
    room = len(ids) - tokenizer.num_special_tokens_to_add()
    cut = {"add_special_tokens": False, "truncation": True, "max_length": room}
    content: list[int] = tokenizer(prompt, **cut)["input_ids"]
    words: list[int] = []
    spelled: list[int] = []
    for number, word in enumerate(_WORD.findall(prompt)):
        pieces = tokenizer(word, **cut)["input_ids"]
        spelled += pieces
        words += [number] * len(pieces)
    if spelled[:room] != content:  # its words are not ours (apostrophes, say): each token is its own word
        words = list(range(len(content)))
    for start in range(len(ids) - len(content) + 1):
        if ids[start : start + len(content)] == content:
            break
    else:
        raise ValueError(
            f"the tokens of {prompt!r} without special tokens are no part of those with them, so "
            f"{type(tokenizer).__name__} cannot be used for Prompt-to-Prompt; use a fast tokenizer"
        )
    found: list[int | None] = [None] * len(ids)
    found[start : start + len(content)] = words[: len(content)]
    return found
