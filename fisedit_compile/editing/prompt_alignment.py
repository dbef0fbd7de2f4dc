"""Which tokens of a base prompt stand for those of an edited one, for Prompt-to-Prompt control.

Source: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", 2022 (word swap and prompt
refinement, their section 3.3), as used in section 3.1 of FISEdit for the first, dense steps of an edit. Where a word
lies in the picture is decided by the cross-attention maps of those steps, so carrying them over keeps the layout.
``kernels/attention/controlled_attention.py`` exchanges the maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import torch

from fisedit_compile.editing.prompt_tokens import WORD, PromptTokens, pipeline_prompts, tokenize
from fisedit_compile.errors import MaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def align(tokenizer: PreTrainedTokenizerBase, base_prompt: str, edit_prompt: str) -> TokenAlignment:
    """Align the tokens of an edited prompt with those of its base, padded and truncated as pipelines do.

    A diff over words (their token ids, so that what the text encoder cannot tell apart is equal) decides:

    - unchanged words, begin and end of text: token by token from the base;
    - as many words as they replace: each new word takes the maps of the old word in its place, token by token
      when both have as many tokens, else the mean over the old word's tokens (Prompt-to-Prompt's word swap);
    - added words, or another number of words than they replace: their own maps (its prompt refinement);
    - padding: the base's padding at the same position, if there is padding there.

    Args:
        tokenizer: any transformers tokenizer with a ``model_max_length``, fast or not.
        base_prompt: the words of the base, textual inversions expanded as :func:`pipeline_prompts` does. All
            vectors of one textual inversion are one word.
        edit_prompt: the new words; equal to the base's is no error here and gives the identity.

    Raises:
        ValueError: the tokenizer has no maximum length.
    """
    return _align(tokenize(tokenizer, base_prompt), tokenize(tokenizer, edit_prompt))


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
    _check_counts(base_prompts, edit_prompts)
    pairs = zip(base_prompts, edit_prompts, strict=True)
    return _stack([align(tokenizer, base_prompt, edit_prompt) for base_prompt, edit_prompt in pairs], device)


def align_prompts(
    pipe: Any,
    base_prompts: Sequence[str],
    edit_prompts: Sequence[str],
    *,
    arguments: Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
    weighted: Sequence[bool] | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Align the prompts of an edit as all text encoders of its pipeline see them.

    Args:
        pipe: the diffusers pipeline; its tokenizers decide what a word is, and that a prompt changed at all.
        base_prompts: the prompt of each sample of the base, as it was typed.
        edit_prompts: one new prompt for each.
        arguments: the other arguments of the base's call, ``prompt_2`` (SDXL) among them.
        changes: those that are others for the edit; without, its words alone have to change something.
        weighted: of each sample, whether words are weighted, so that none have to change.
        device: where the result goes.

    Returns:
        mapper fp32 ``[n, T, T]`` and keep fp32 ``[n, T]``, on ``device``.

    Raises:
        MaskError: the prompts of a sample are not the same, but differ in nothing that a text encoder sees (letter
            case, spaces, or words beyond its length), so that there is no change to find or to draw; or no prompt
            changes at all.
        ValueError: not one new prompt for each prompt of the base, no tokenizer, or two text encoders that would
            align the words differently: cross-attention has one map for both.
    """
    _check_counts(base_prompts, edit_prompts)
    edit_arguments = {**arguments, **(changes or {})}
    old_texts = pipeline_prompts(pipe, base_prompts, arguments)
    new_texts = pipeline_prompts(pipe, edit_prompts, edit_arguments)
    encoders = [
        [
            (tokenize(tokenizer, old), tokenize(tokenizer, new))
            for old, new in zip(old_prompts, new_prompts, strict=True)
        ]
        for (tokenizer, old_prompts), (_, new_prompts) in zip(old_texts, new_texts, strict=True)
    ]
    if not changes:
        weighted = weighted or [False] * len(base_prompts)
        none_changes = list(base_prompts) == list(edit_prompts) and not any(weighted)
        for sample, prompts in enumerate(zip(base_prompts, edit_prompts, strict=True)):
            if not weighted[sample] and (none_changes or prompts[0] != prompts[1]):
                _check_change(sample, *prompts, [tokens[sample] for tokens in encoders])
    alignments = [[_align(old, new) for old, new in tokens] for tokens in encoders]
    for sample, (first, *others) in enumerate(zip(*alignments, strict=True)):
        if not all(torch.equal(first.mapper, other.mapper) for other in others):
            raise ValueError(
                f"the two text encoders of {type(pipe).__name__} would align the words of {edit_prompts[sample]!r} "
                "differently, and cross-attention has one map for both: "
                + (
                    "change the same words in prompt_2, which stays as it is unless edit(...) is given another"
                    if edit_arguments.get("prompt_2")
                    else "give a textual inversion as many vectors in tokenizer as in tokenizer_2"
                )
            )
    return _stack(alignments[0], device)


def removed_tokens(
    pipe: Any, base_prompts: Sequence[str], edit_prompts: Sequence[str], arguments: Mapping[str, Any]
) -> list[list[list[int]]]:
    """What an edit changes in each prompt, one thing after the other, as the tokens that it takes away for it.

    Changes with one word between them are one: "a big red cat" becomes "a small red dog" by one change.

    Args:
        pipe, base_prompts, edit_prompts, arguments: see :func:`align_prompts`; the first text encoder's tokens count.

    Returns:
        For each prompt and each change the positions of the tokens of words that go, or that others take the place of;
        none for words that are only added.
    """
    (tokenizer, old_texts), *_ = pipeline_prompts(pipe, base_prompts, arguments)
    (_, new_texts), *_ = pipeline_prompts(pipe, edit_prompts, arguments)
    return [
        _changes(tokenizer, tokenize(tokenizer, old), tokenize(tokenizer, new))
        for old, new in zip(old_texts, new_texts, strict=True)
    ]


def _changes(tokenizer: Any, old: PromptTokens, new: PromptTokens) -> list[list[int]]:
    """See :func:`removed_tokens`."""
    changes: list[list[int]] = []
    last = 0  # the unit behind the last change
    for operation, first, behind, _, _ in _differences(old, new):
        if operation == "equal":
            continue
        between = old.units[last:first]
        if not changes or len(between) != 1 or not _is_word(tokenizer, old, between[0].positions):
            changes.append([])
        changes[-1] += [position for unit in old.units[first:behind] for position in unit.positions]
        last = behind
    return changes


def _is_word(tokenizer: Any, prompt: PromptTokens, positions: Sequence[int]) -> bool:
    """Whether some tokens are a word, and no punctuation, which parts one thing from the next."""
    return any(letter.isalnum() for letter in tokenizer.decode([prompt.ids[each] for each in positions]))


def changed_words(base_prompt: str, edit_prompt: str) -> tuple[list[str], list[str]]:
    """Words (and punctuation) of the base that went, and those that came, in order; letter case is ignored.

    Both are empty for prompts that differ in spaces and letter case only: an edit without a change.
    """
    old, new = WORD.findall(base_prompt), WORD.findall(edit_prompt)
    matcher = SequenceMatcher(None, [w.casefold() for w in old], [w.casefold() for w in new], autojunk=False)
    changes = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    removed = [word for _, b0, b1, _, _ in changes for word in old[b0:b1]]
    added = [word for _, _, _, e0, e1 in changes for word in new[e0:e1]]
    return removed, added


def _check_counts(base_prompts: Sequence[str], edit_prompts: Sequence[str]) -> None:
    if isinstance(base_prompts, str) or isinstance(edit_prompts, str):
        raise ValueError("a single prompt was given where a list with one prompt a sample is wanted; wrap it in a list")
    if not base_prompts or len(base_prompts) != len(edit_prompts):
        raise ValueError(
            f"{len(edit_prompts)} new prompt(s) were given for {len(base_prompts)} prompt(s) of the base; "
            "give one for each sample"
        )


def _check_change(
    sample: int, base_prompt: str, edit_prompt: str, encoders: Sequence[tuple[PromptTokens, PromptTokens]]
) -> None:
    """Refuse a sample whose prompts give every text encoder the same tokens."""
    if any(old.ids != new.ids for old, new in encoders):
        return
    what = f"nothing changed for sample {sample}: {edit_prompt!r} "
    if base_prompt == edit_prompt:
        raise MaskError(what + "is the base's own prompt; change at least one word")
    cut_off = [(old, new) for old, new in encoders if old.cut_off != new.cut_off]
    if cut_off:
        old, new = cut_off[0]
        raise MaskError(
            what + f"differs from the base's prompt only beyond the {new.length} tokens that the text encoder reads "
            f"(cut off: {old.cut_off or 'nothing'!r} there, {new.cut_off or 'nothing'!r} here); shorten the prompts "
            "or change words that are read"
        )
    raise MaskError(
        what + f"and the base's prompt {base_prompt!r} are the same tokens, so they differ in nothing that the text "
        "encoder sees, such as letter case or spaces; change at least one word"
    )


def _align(base: PromptTokens, edit: PromptTokens) -> TokenAlignment:
    mapper = torch.zeros(base.length, edit.length)
    for operation, b0, b1, e0, e1 in _differences(base, edit):
        if operation not in ("equal", "replace") or b1 - b0 != e1 - e0:
            continue
        for old, new in zip(base.units[b0:b1], edit.units[e0:e1], strict=True):
            if len(old.positions) == len(new.positions):
                mapper[list(old.positions), list(new.positions)] = 1.0
            else:
                for position in new.positions:
                    mapper[list(old.positions), position] = 1.0 / len(old.positions)
    shared = sorted(base.padding & edit.padding)
    mapper[shared, shared] = 1.0
    return TokenAlignment(mapper=mapper, keep=(mapper.sum(dim=0) > 0).float())


def _differences(base: PromptTokens, edit: PromptTokens) -> Sequence[tuple[str, int, int, int, int]]:
    """What makes the words of one prompt those of another, as :meth:`difflib.SequenceMatcher.get_opcodes` has it."""
    old_keys, new_keys = ([unit.key for unit in tokens.units] for tokens in (base, edit))
    return SequenceMatcher(None, old_keys, new_keys, autojunk=False).get_opcodes()


def _stack(
    alignments: Sequence[TokenAlignment], device: torch.device | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    mapper = torch.stack([alignment.mapper for alignment in alignments])
    return mapper.to(device), torch.stack([alignment.keep for alignment in alignments]).to(device)
