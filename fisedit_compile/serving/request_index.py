"""Finds among the pictures of a library the one whose words are most like those of a request."""

from __future__ import annotations

import threading

import numpy as np

from fisedit_compile.serving.library import Library
from fisedit_compile.serving.picture import BasePlace
from fisedit_compile.serving.requests import Similar
from fisedit_compile.serving.search import Embeddings


class RequestIndex:
    """Embeddings of the pictures whose bases are there, by key; threads may share it.

    It follows the library, whichever process changes that, and holds nothing that could not be read from it again.

    Args:
        library: the pictures.
        encoder: digest of what embeds the words; embeddings of others cannot be compared.
    """

    def __init__(self, library: Library, encoder: str) -> None:
        self._library, self._encoder, self._lock = library, encoder, threading.Lock()
        self._by_key: dict[str, Embeddings] = {}
        self._keys: dict[str, str] = {}  # name of a picture -> its key
        self._seen = 0

    def nearest(self, key: str, embedding: np.ndarray, seed: int | None, enough: float) -> Similar | None:
        """The most similar picture of a key; one whose base is there, before edits whose bases are to be recorded.

        Args:
            key: of settings and pipeline.
            embedding: of the words, of length 1.
            seed: that its noise has to be of; None takes any.
            enough: cosine from which on a picture is similar enough; where none is, the answer is any of the others.
        """
        with self._lock:
            self._follow()
            found = self._by_key[key].nearest(embedding, seed, enough) if key in self._by_key else None
        return None if found is None else Similar(*found)

    def __len__(self) -> int:
        with self._lock:
            self._follow()
            return len(self._keys)

    def _follow(self) -> None:
        self._seen, changed = self._library.changes_since(self._seen)
        if not changed:
            return
        for name in changed & self._keys.keys():
            self._by_key[self._keys.pop(name)].drop(name)
        for name, key, encoder, seed, embedding, place in self._library.searchable(changed):
            if encoder == self._encoder:
                quick = place is not BasePlace.EDIT
                self._by_key.setdefault(key, Embeddings(len(embedding))).put(name, seed, embedding, quick=quick)
                self._keys[name] = key
