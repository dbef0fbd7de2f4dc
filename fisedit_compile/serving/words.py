"""Embeddings of prompts, to find similar ones by: what a text encoder makes of the words, on average."""

from __future__ import annotations

import hashlib
import threading
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fisedit_compile.runtime.model_watch import ModelWatch
from fisedit_compile.utils.single_thread import single_thread

#: Parameters up to which an encoder runs in one thread: its operations are so small that several threads are no faster,
#: and many times slower where other programs keep the processors busy.
_SMALL = 30_000_000


class WordEncoder:
    """The mean of a text encoder's outputs for the tokens of a prompt, scaled to length 1; threads may share it.

    Of the demo model's encoder this tells prompts that differ in one thing from others better than its pooled output or
    the mean of its token embeddings does (docs/decisions.md).

    Args:
        tokenizer: of transformers.
        encoder: a text encoder of transformers, whose ``last_hidden_state`` has an output for each token.

    Attributes:
        digest: a hexadecimal key of both, the same in every process.
    """

    def __init__(self, tokenizer: Any, encoder: torch.nn.Module) -> None:
        self._tokenizer, self._encoder, self._lock = tokenizer, encoder, threading.Lock()
        words = repr(sorted(tokenizer.get_vocab().items()))
        watch = ModelWatch(encoder)
        weights = watch.look().digest()
        self.digest = hashlib.sha256(f"{weights} {words}".encode()).hexdigest()[:32]
        small = sum(each.numel() for each in encoder.parameters()) <= _SMALL
        self._threads = single_thread if small else nullcontext
        self.encode = lru_cache(maxsize=4096)(self._encode)

    @classmethod
    def of_folder(cls, folder: Path) -> WordEncoder:
        """Of a diffusers pipeline, its first text encoder; or of any text model of transformers, in single precision.

        Raises:
            ValueError: a folder of neither.
            OSError: a file is missing.
        """
        import transformers

        parts = folder / "tokenizer", folder / "text_encoder"
        if not all(part.is_dir() for part in parts):
            parts = folder, folder
        if not (parts[1] / "config.json").is_file():
            raise ValueError(f"{folder} holds no text encoder: give the folder of a pipeline, or of a text model")
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(parts[0]), local_files_only=True)
        encoder = transformers.AutoModel.from_pretrained(str(parts[1]), local_files_only=True)
        return cls(tokenizer, getattr(encoder, "text_model", encoder).float().eval())

    @torch.inference_mode()
    def _encode(self, prompt: str) -> np.ndarray:
        """The embedding of a prompt, float32 ``[width]``; words that the tokenizer cuts off do not count."""
        with self._lock, self._threads():
            tokens = self._tokenizer(prompt, truncation=True, return_tensors="pt", return_special_tokens_mask=True)
            device = next(self._encoder.parameters()).device
            outputs = self._encoder(input_ids=tokens.input_ids.to(device)).last_hidden_state[0].float()
        words = tokens.special_tokens_mask[0] == 0
        mean = outputs[words.to(device) if bool(words.any()) else slice(None)].mean(dim=0)
        embedding: np.ndarray = torch.nn.functional.normalize(mean, dim=0).cpu().numpy()
        embedding.setflags(write=False)
        return embedding
