"""Tokenizers for one editor alone: encoding a prompt writes into a fast tokenizer, so two threads must not share one.

``tokenizer(prompt, padding=..., truncation=...)`` first stores both in the tokenizer and then encodes by them. Another
thread in between gets padding that it did not ask for, or "Already borrowed".
"""

from __future__ import annotations

import copy
from typing import Any


class OwnTokenizers:
    """Copies of tokenizers, each made once and again after a change: a copy of CLIP's takes 0.4 s."""

    def __init__(self) -> None:
        self._copies: dict[str, tuple[Any, Any, Any]] = {}  # name -> the original, how it was, its copy

    def of(self, name: str, tokenizer: Any) -> Any:
        """A tokenizer that encodes as ``tokenizer`` does now; one that is not a fast one is returned as it is.

        Args:
            name: of the part of the pipeline; one copy is kept for each.
            tokenizer: of transformers, or None.
        """
        if not getattr(tokenizer, "is_fast", False):
            return tokenizer
        original, before, own = self._copies.get(name, (None, None, None))
        now = _settings(tokenizer)
        if original is not tokenizer or before != now:
            own = copy.deepcopy(tokenizer)
            self._copies[name] = (tokenizer, now, own)
        return own

    def within(self, pipe: Any) -> Any:
        """A copy of ``pipe`` with the same parts, but for its tokenizers, which are these."""
        twin = copy.copy(pipe)
        # Not by setattr, which would write the parts' classes into the pipeline's config.
        state = vars(twin)
        state.update({name: self.of(name, part) for name, part in state.items() if name.startswith("tokenizer")})
        return twin


def _settings(tokenizer: Any) -> Any:
    """What decides how a fast tokenizer encodes, but for its vocabulary, which only grows, by added tokens."""
    backend = tokenizer.backend_tokenizer
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
    plain = {name: value for name, value in vars(tokenizer).items() if isinstance(value, (str, int, float, type(None)))}
    return (
        plain,
        repr(tokenizer.special_tokens_map),
        repr(tokenizer.added_tokens_decoder),
        [part.__getstate__() if part is not None else None for part in parts],
    )
