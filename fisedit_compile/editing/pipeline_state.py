"""What a base depends on beside the scheduler: the models of its pipeline, and how its words became tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from fisedit_compile.editing.pipeline_call import VaeRoute
from fisedit_compile.runtime.model_state import ModelState
from fisedit_compile.runtime.model_watch import ModelWatch
from fisedit_compile.utils.frozen_mapping import FrozenMapping

#: Parts of a pipeline that change no latents: the checker blackens pictures behind the decoder.
_WITHOUT_EFFECT = ("safety_checker",)

#: Parts of a pipeline that make tokens of words.
TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class PipelineState:
    """The models and tokenizers of a pipeline at one time; plain data, without any of them.

    Attributes:
        kind: name of the pipeline's class, whose loop an edit repeats.
        models: name of a part of the pipeline, ``"unet"`` or ``"text_encoder"`` for example, -> its state.
        tokens: name of a tokenizer -> the token ids that it makes of the base's prompts.
    """

    kind: str
    models: Mapping[str, ModelState]
    tokens: Mapping[str, tuple[tuple[int, ...], ...]]

    def of_prompts(self, pipe: Any, prompts: Sequence[str]) -> PipelineState:
        """The same state with the tokens of other prompts."""
        return replace(self, tokens=FrozenMapping(_tokens(pipe, prompts)))

    def read_weights(self) -> None:
        """Read the weights once, so that they can be told from those of other processes and of exchanged models.

        Raises:
            BaseMismatchError: a model has changed since the state was taken.
        """
        for state in self.models.values():
            state.digest()

    def difference(self, now: PipelineState) -> str:
        """What has changed up to ``now``, in words that fit behind "the base was generated with another"; or empty."""
        if self.kind != now.kind:
            return f"pipeline ({self.kind} -> {now.kind})"
        for name in {**self.models, **now.models}:
            title = "U-Net" if name == "unet" else name
            before, after = self.models.get(name), now.models.get(name)
            if before is None or after is None:
                return f"{title} (there {'is one now' if before is None else 'was one'})"
            if difference := before.difference(after):
                return f"{title} ({difference})"
        for name in {**self.tokens, **now.tokens}:
            if self.tokens.get(name) != now.tokens.get(name):
                return f"{name} (it makes other tokens of the base's prompts)"
        return ""


class PipelineWatch:
    """Looks at the parts of a pipeline beside its U-Net, at which its :class:`~fisedit_compile.SparseUNet` looks."""

    def __init__(self) -> None:
        self._watches: dict[str, ModelWatch] = {}
        self._searched: tuple[dict[str, ModelState], list[int], torch.device] | None = None

    def of(self, name: str) -> ModelWatch:
        """The watch of a part that was looked at."""
        return self._watches[name]

    def look(self, pipe: Any, unet: ModelState, prompts: Sequence[str]) -> PipelineState:
        """The state now; ``unet`` is that of the U-Net, ``prompts`` are the base's."""
        models = {"unet": unet}
        for name, part in pipe.components.items():
            if isinstance(part, VaeRoute):
                part = part.vae
            if isinstance(part, torch.nn.Module) and name != "unet" and name not in _WITHOUT_EFFECT:
                if name not in self._watches or self._watches[name].module is not part:
                    self._watches[name] = ModelWatch(part)
                models[name] = self.of(name).look()
        self._say_where(pipe, models)
        return PipelineState(type(pipe).__name__, FrozenMapping(models), FrozenMapping(_tokens(pipe, prompts)))

    def _say_where(self, pipe: Any, models: dict[str, ModelState]) -> None:
        """Let the pipeline of one call know the device that it runs on, as long as its parts are what they were.

        It would go through all modules of all parts for it, which takes 4 ms.
        """
        if not isinstance(getattr(type(pipe), "_execution_device", None), cached_property):
            return
        if any(getattr(pipe, name, None) is not None for name in _WITHOUT_EFFECT):  # nobody looks at these
            return
        watches = [state.live.watch() for state in models.values() if state.live is not None]
        # Hooks that offload are no part of a state.
        looks = [watch.descriptions for watch in watches if watch is not None]
        if self._searched is not None:
            before, then, device = self._searched
            same = all(before.get(name) is state for name, state in models.items())
            if same and looks == then and len(before) == len(models):
                vars(pipe)["_execution_device"] = device
                return
        self._searched = models, looks, pipe._execution_device


def _tokens(pipe: Any, prompts: Sequence[str]) -> dict[str, tuple[tuple[int, ...], ...]]:
    expand = getattr(pipe, "maybe_convert_prompt", lambda prompt, _: prompt)  # textual inversions, to a token a vector
    tokens = {}
    for name in TOKENIZERS:
        if (tokenizer := getattr(pipe, name, None)) is not None:
            texts = [expand(prompt, tokenizer) for prompt in prompts]
            tokens[name] = tuple(tuple(ids) for ids in tokenizer(texts)["input_ids"])
    return tokens
