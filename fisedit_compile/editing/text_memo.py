"""What text encoders made of texts before: an edit's negative prompt, and often all but one prompt, are known ones.

The encoder of Stable Diffusion 2 takes a GPU's host 8 ms a text, as long as three sparse steps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisedit_compile.editing.arguments import owned
from fisedit_compile.runtime.model_state import ModelState
from fisedit_compile.runtime.model_watch import ModelWatch

#: What is kept at most; the texts that were asked for longest ago go first.
MOST_BYTES = 64 * 2**20


class TextMemo:
    """Outputs of text encoders, each with the state of the encoder and all that it was called with.

    Args:
        watch_of: the watch of a part of the pipeline, by its name.
    """

    def __init__(self, watch_of: Callable[[str], ModelWatch]) -> None:
        self._watch_of = watch_of
        self._known: OrderedDict[Hashable, tuple[ModelState, Any]] = OrderedDict()  # a state is held: its id is a key
        self._nbytes = 0

    def serve(self, pipe: Any, models: Mapping[str, ModelState], arguments: Mapping[str, Any]) -> None:
        """Let a copy of a pipeline ask here before its text encoders run.

        Args:
            pipe: of one call; it is changed.
            models: the states of its parts, which were just looked at.
            arguments: of the call. With a scale for LoRA the encoders are not those that were looked at, and all run.
        """
        if (arguments.get("cross_attention_kwargs") or {}).get("scale") is not None:
            return
        for name, state in models.items():
            encoder = getattr(pipe, name)
            if name.startswith("text_encoder") and not encoder.training:  # in training it drops values at random
                # Not by setattr, which would write the new class into the pipeline's config.
                vars(pipe)[name] = _TextRoute(self, name, encoder, state)

    def encode(self, name: str, encoder: nn.Module, state: ModelState, args: Any, kwargs: Any) -> Any:
        """The output of an encoder, in tensors of the caller's own.

        Args:
            name: of the part of the pipeline.
            encoder: the part.
            state: the one in which the call began. Another thread may have changed the encoder since.
            args, kwargs: of its call.
        """
        key = _key(name, state, args, kwargs)
        if key is None or self._watch_of(name).look(values=False) is not state:
            return encoder(*args, **kwargs)
        if key not in self._known:
            out = encoder(*args, **kwargs)
            if self._watch_of(name).look(values=False) is state:
                self._keep(key, state, owned(out))
            return out
        self._known.move_to_end(key)
        return owned(self._known[key][1])

    def _keep(self, key: Hashable, state: ModelState, out: Any) -> None:
        self._known[key] = state, out
        self._nbytes += _nbytes(out)
        while self._nbytes > MOST_BYTES:
            _, (_, oldest) = self._known.popitem(last=False)
            self._nbytes -= _nbytes(oldest)


class _TextRoute(nn.Module):
    """Stands for a text encoder in one call of a pipeline: has its attributes, and asks the memo first."""

    def __init__(self, memo: TextMemo, name: str, encoder: nn.Module, state: ModelState) -> None:
        super().__init__()
        self.encoder = encoder
        self.training = encoder.training
        self._encode = lambda args, kwargs: memo.encode(name, encoder, state, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("encoder"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the encoder returns."""
        return self._encode(args, kwargs)


def _key(name: str, state: ModelState, args: Any, kwargs: Any) -> Hashable | None:
    """What decides the output of an encoder; None where that cannot be told."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    words: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not leaf.is_floating_point():
            words += [tuple(leaf.shape), leaf.dtype, leaf.device, leaf.cpu().numpy().tobytes()]
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            words.append(leaf)
        else:
            return None
    return name, id(state), torch.is_inference_mode_enabled(), str(tree), tuple(words)


def _nbytes(out: Any) -> int:
    return sum(each.nbytes for each in pytree.tree_leaves(out) if isinstance(each, Tensor))
