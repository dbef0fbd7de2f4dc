"""The most similar of many embeddings, by one product of a matrix.

100,000 embeddings of the demo model (192 numbers) take 1.4 ms on two cores and 2.9 ms on one, of 768 numbers 9.8 and
19 ms: a store has room for some hundreds or thousands of bases, so that no index beyond this is worth its errors.
"""

from __future__ import annotations

import numpy as np


class Embeddings:
    """Named embeddings of one width, each with a seed; not for several threads at once.

    Args:
        width: numbers of an embedding.
    """

    def __init__(self, width: int) -> None:
        self._matrix = np.zeros((64, width), np.float32)  # rows from len(self) on are free
        self._seeds = np.zeros(64, np.int64)
        self._names: list[str] = []
        self._places: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._names)

    def put(self, name: str, seed: int, embedding: np.ndarray) -> None:
        """Add an embedding ``[width]`` of length 1, or exchange the one of that name."""
        place = self._places.get(name)
        if place is None:
            place = self._places[name] = len(self._names)
            self._names.append(name)
            if place == len(self._matrix):
                self._matrix = np.concatenate([self._matrix, np.zeros_like(self._matrix)])
                self._seeds = np.concatenate([self._seeds, np.zeros_like(self._seeds)])
        self._matrix[place], self._seeds[place] = embedding, seed

    def drop(self, name: str) -> None:
        """Remove an embedding, if there is one of that name."""
        if (place := self._places.pop(name, None)) is None:
            return
        last = self._names.pop()
        if last != name:
            self._names[place], self._places[last] = last, place
            self._matrix[place], self._seeds[place] = self._matrix[len(self)], self._seeds[len(self)]

    def nearest(self, embedding: np.ndarray, seed: int | None) -> tuple[str, float] | None:
        """Name and cosine of the most similar one, of those with that seed; None where there is none.

        Args:
            embedding: ``[width]``, of length 1.
            seed: None takes any.
        """
        count = len(self)
        if not count:
            return None
        cosines = self._matrix[:count] @ embedding
        if seed is not None:
            cosines[self._seeds[:count] != seed] = -np.inf
        place = int(cosines.argmax())
        return None if cosines[place] == -np.inf else (self._names[place], float(cosines[place]))
