"""Embeddings of the prompt that the user made, in the place of the pipeline's: compel and sd_embed make such.

The prompt's words are given beside them, since control aligns the words of two prompts: as many tokens, at the same
places, without the syntax of whatever made the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.editing.arguments import call_parameters
from fisedit_compile.editing.prompt_tokens import pipeline_prompts

#: Of the prompt, one a sample; and of what it is guided away from.
OF_PROMPT = ("prompt_embeds", "pooled_prompt_embeds")
OF_NEGATIVE = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
EMBEDDINGS = (*OF_PROMPT, *OF_NEGATIVE)


def check_embeddings(pipe: Any, prompts: Sequence[str], arguments: Mapping[str, Any], *, controlled: bool) -> None:
    """Hold embeddings to the prompts beside them and to what the pipeline would make itself.

    Args:
        pipe: the pipeline.
        prompts: the words, one a sample.
        arguments: of the pipeline's call.
        controlled: whether attention maps are to be aligned by these words.

    Raises:
        ValueError: what is no finite floating-point tensor of a row a prompt; pooled embeddings without the others, or
            the others without pooled ones where the pipeline takes them; another number of tokens or channels than the
            pipeline's own have.
    """
    given = {name: arguments[name] for name in EMBEDDINGS if arguments.get(name) is not None}
    if not given:
        return
    for name, each in given.items():
        rank = 2 if "pooled" in name else 3
        if not isinstance(each, Tensor) or not each.is_floating_point() or each.ndim != rank:
            raise ValueError(f"{name} is {_described(each)}: give a floating-point tensor of {rank} dimensions")
        if len(each) != len(prompts):
            raise ValueError(f"{name} has {len(each)} row(s) for {len(prompts)} prompt(s): give one for each")
        if not each.isfinite().all():
            raise ValueError(f"{name} is not finite")
    for plain, pooled in (OF_PROMPT, OF_NEGATIVE):
        if (plain in given) != (pooled in given) and (pooled in given or pooled in call_parameters(pipe)):
            raise ValueError(f"{pooled if plain in given else plain}: {type(pipe).__name__} takes both or none")
    lengths = {tokenizer.model_max_length for tokenizer, _ in pipeline_prompts(pipe, [], {})}
    if "prompt_embeds" in given and not controlled:
        lengths = {given["prompt_embeds"].shape[1]}  # any, where no words have to be found among them
    width = pipe.unet.config.cross_attention_dim if pipe.unet.config.encoder_hid_dim_type is None else None
    for name in (OF_PROMPT[0], OF_NEGATIVE[0]):
        if name not in given:
            continue
        _, tokens, channels = given[name].shape
        if tokens not in lengths:
            what_to_do = ": give as many"
            if controlled and name in OF_PROMPT:
                what_to_do += ", or set cross_replace=0.0 in the editor's config, which turns Prompt-to-Prompt off"
            wanted = ", ".join(map(str, lengths))
            raise ValueError(f"{name} has {tokens} tokens where a prompt has {wanted}{what_to_do}")
        if isinstance(width, int) and channels != width:
            raise ValueError(f"{name} has {channels} channels, and the U-Net takes {width}")


def check_as_many_tokens(pipe: Any, before: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Hold an edit's embeddings to the number of tokens that its base's U-Net was given.

    Args:
        pipe: the pipeline.
        before: the arguments of the base's call.
        changes: those that are others for the edit.

    Raises:
        ValueError: another number.
    """
    if OF_PROMPT[0] not in changes:
        return
    made = pipeline_prompts(pipe, [], {})[0][0].model_max_length
    old, new = (made if each is None else each.shape[1] for each in (before.get(OF_PROMPT[0]), changes[OF_PROMPT[0]]))
    if old != new:
        raise ValueError(f"the edit's prompt has {new} tokens where the base's has {old}: give embeddings of as many")


def changed_embeddings(before: Mapping[str, Any], changes: Mapping[str, Any], samples: int) -> list[bool]:
    """Of each sample, whether its prompt's embeddings are others than the base's.

    Args:
        before: the arguments of the base's call.
        changes: those that are others for the edit.
        samples: how many prompts there are.
    """
    changed = torch.zeros(samples, dtype=torch.bool)
    for name in OF_PROMPT:
        if name in changes:
            old, new = before.get(name), changes[name]
            if old is None or new is None or old.shape != new.shape:
                return [True] * samples
            changed |= (old.to(new.device) != new).flatten(1).any(1).cpu()
    return changed.tolist()


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
