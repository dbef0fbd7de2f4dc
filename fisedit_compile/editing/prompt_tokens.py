"""A prompt as the text encoder sees it: textual inversions expanded, tokenized, cut to the encoder's length."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fisedit_compile.errors import CaptureError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokenizers without a length of their own report a number around 1e30.
_LONGEST_PROMPT = 1_000_000

#: A word, or a run of punctuation.
WORD = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True)
class Unit:
    """A word or a special token: what is compared, and the token positions it covers."""

    key: tuple[bool, tuple[int, ...]]  # (special token?, token ids)
    positions: tuple[int, ...]


@dataclass(frozen=True)
class PromptTokens:
    """The tokens of one prompt, padded and truncated as pipelines do.

    Attributes:
        ids: the token ids, padding included; what the text encoder gets.
        units: words and special tokens in order. All vectors of one textual inversion are one word.
        padding: positions of the padding.
        cut_off: the words that did not fit, as the tokenizer spells them; empty for a prompt that fits.
    """

    ids: tuple[int, ...]
    units: tuple[Unit, ...]
    padding: frozenset[int]
    cut_off: str

    @property
    def length(self) -> int:
        """Tokens that the text encoder takes, padding included."""
        return len(self.ids)


def pipeline_prompts(
    pipe: Any, prompts: Sequence[str], arguments: Mapping[str, Any]
) -> list[tuple[PreTrainedTokenizerBase, list[str]]]:
    """Each tokenizer of a pipeline with the prompts that it is given.

    Args:
        pipe: a diffusers pipeline with a ``tokenizer`` and perhaps a ``tokenizer_2`` (SDXL); one that is None
            (SDXL's refiner has only the second) is left out.
        prompts: the prompt of each sample.
        arguments: other arguments of the pipeline's call: ``prompt_2`` goes to the second tokenizer.

    Returns:
        Per tokenizer the prompts with textual inversions expanded to one token a vector
        (``pipe.maybe_convert_prompt``).

    Raises:
        ValueError: a pipeline without a tokenizer, or ``prompt_2`` for another number of samples.
    """
    tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    given = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    if not given:
        raise ValueError(f"{type(pipe).__name__} has no tokenizer, so the words of its prompts cannot be compared")
    second = arguments.get("prompt_2") or list(prompts)
    second = [second] if isinstance(second, str) else list(second)
    if len(given) > 1 and len(second) != len(prompts):
        raise ValueError(f"{len(second)} prompt(s) in prompt_2 for {len(prompts)} sample(s): give one for each")
    expand = getattr(pipe, "maybe_convert_prompt", None)
    return [
        (tokenizer, [expand(prompt, tokenizer) if expand else prompt for prompt in texts])
        for tokenizer, texts in zip(given, (list(prompts), second), strict=False)
    ]


def own_tokens(pipe: Any, prompts: Sequence[str], arguments: Mapping[str, Any]) -> int:
    """How many tokens hold all words of all prompts, begin and end of text included, for each of a pipeline's encoders.

    Rounded up to a multiple of 8, so that base and edits of prompts of about the same length read maps of one shape.

    Args:
        pipe, prompts, arguments: see :func:`pipeline_prompts`.
    """
    longest = 0
    for tokenizer, texts in pipeline_prompts(pipe, prompts, arguments):
        for tokens in (tokenize(tokenizer, text) for text in texts):
            longest = max(longest, tokens.length - len(tokens.padding))
    return -(-longest // 8) * 8


def check_text_length(pipe: Any, tokens: int) -> None:
    """Hold the tokenizers of a pipeline to the number of text tokens that its U-Net is given.

    Args:
        pipe: the diffusers pipeline.
        tokens: T of ``encoder_hidden_states``, ``[B, T, width]``.

    Raises:
        CaptureError: another number than a tokenizer pads prompts to, so that no token could be said to be a word.
    """
    for tokenizer, _ in pipeline_prompts(pipe, [], {}):
        if tokenizer.model_max_length != tokens:
            raise CaptureError(
                f"{type(pipe).__name__} gives its U-Net {tokens} text tokens where its {type(tokenizer).__name__} "
                f"makes {tokenizer.model_max_length} of a prompt, so the words of two prompts cannot be aligned: set "
                "cross_replace=0.0 in the editor's config, which turns Prompt-to-Prompt off"
            )


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str) -> PromptTokens:
    """The tokens of one prompt, textual inversions expanded already.

    Args:
        tokenizer: any transformers tokenizer with a ``model_max_length``, fast or not.
        prompt: its text.

    Raises:
        ValueError: the tokenizer has no maximum length.
    """
    length = tokenizer.model_max_length
    if length > _LONGEST_PROMPT:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no maximum length; set "
            "tokenizer.model_max_length to the number of tokens that the text encoder takes"
        )
    encoding = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_attention_mask=True)
    ids, used = encoding["input_ids"], encoding["attention_mask"]
    words = encoding.word_ids() if tokenizer.is_fast else _word_ids(tokenizer, prompt, ids)
    words = _join_inversions(tokenizer, ids, words)
    # Padding may have the id of the end of text (Stable Diffusion 1.5): the attention mask tells them apart.
    real = [position for position in range(length) if used[position]]

    def word_of(position: int) -> tuple[bool, int]:
        word = words[position]
        return (True, position) if word is None else (False, word)

    units = []
    for (special, _), group in groupby(real, key=word_of):
        positions = tuple(group)
        units.append(Unit((special, tuple(ids[position] for position in positions)), positions))
    padding = frozenset(range(length)) - frozenset(real)
    return PromptTokens(tuple(ids), tuple(units), padding, "" if padding else _cut_off(tokenizer, prompt, length))


def _cut_off(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> str:
    # A length far beyond any prompt keeps transformers from warning of a prompt longer than the model takes.
    everything = tokenizer(prompt, add_special_tokens=False, truncation=True, max_length=_LONGEST_PROMPT)["input_ids"]
    room = length - tokenizer.num_special_tokens_to_add()
    return tokenizer.decode(everything[room:]).strip() if len(everything) > room else ""


def _join_inversions(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], words: Sequence[int | None]
) -> list[int | None]:
    """Give the tokens ``name``, ``name_1``, ``name_2``, ... of one textual inversion the same word."""
    added = {number: token for token, number in tokenizer.get_added_vocab().items()}
    joined = list(words)
    name, count, word = "", 0, None
    for position, number in enumerate(ids):
        token = added.get(number, "")
        if name and token == f"{name}_{count + 1}":
            joined[position], count = word, count + 1
        else:
            name, count, word = token, 0, words[position]
    return joined


def _word_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int]) -> list[int | None]:
    """The word of each token (None: special token or padding), for tokenizers that do not tell."""
    room = len(ids) - tokenizer.num_special_tokens_to_add()
    cut = {"add_special_tokens": False, "truncation": True, "max_length": room}
    content: list[int] = tokenizer(prompt, **cut)["input_ids"]
    words: list[int] = []
    spelled: list[int] = []
    for number, word in enumerate(WORD.findall(prompt)):
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
