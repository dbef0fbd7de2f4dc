"""The most similar of many embeddings, in one or two passes over all of them.

A product of all rows reads 300 MB for 100,000 embeddings of 768 numbers. So the first pass reads what they have in the
few directions in which they differ most, which says for each how similar it can be at most, and the second one reads
those rows that can be similar enough: what it finds is what a product of all rows finds.
"""

from __future__ import annotations

import numpy as np

#: Directions of the first pass, and how few embeddings one pass is quick enough for.
_DIRECTIONS, _FEW = 64, 4096

#: Embeddings from which the directions are found.
_SAMPLE = 4096

#: Rows that are read first in the second pass, the likeliest ones: others have to be at least as similar as these.
_BEST = 64

#: What the sums of the first pass may be off by rounding.
_ROUNDING = 1e-5


class Embeddings:
    """Named embeddings of one width, each with a seed; not for several threads at once.

    Args:
        width: numbers of an embedding.
    """

    def __init__(self, width: int) -> None:
        self._matrix = np.zeros((64, width), np.float32)  # rows from len(self) on are free
        self._seeds, self._quick = np.zeros(64, np.int64), np.zeros(64, bool)
        self._names: list[str] = []
        self._places: dict[str, int] = {}
        self._of_seed: dict[int, set[str]] = {}
        self._heads: _Heads | None = None

    def __len__(self) -> int:
        return len(self._names)

    def put(self, name: str, seed: int, embedding: np.ndarray, *, quick: bool = True) -> None:
        """Add an embedding ``[width]`` of length 1, or exchange the one of that name; ``quick`` ones are preferred."""
        place = self._places.get(name)
        if place is None:
            place = self._places[name] = len(self._names)
            self._names.append(name)
            if place == len(self._matrix):
                self._matrix, self._seeds, self._quick = (
                    _doubled(self._matrix),
                    _doubled(self._seeds),
                    _doubled(self._quick),
                )
                self._heads = None
        else:
            self._forget_seed(name, place)
        self._matrix[place], self._seeds[place], self._quick[place] = embedding, seed, quick
        self._of_seed.setdefault(seed, set()).add(name)
        if self._heads is not None:
            self._heads.write(place, self._matrix[place])

    def drop(self, name: str) -> None:
        """Remove an embedding, if there is one of that name."""
        if (place := self._places.pop(name, None)) is None:
            return
        self._forget_seed(name, place)
        last = self._names.pop()
        if last != name:
            self._names[place], self._places[last] = last, place
            for rows in (self._matrix, self._seeds, self._quick):
                rows[place] = rows[len(self)]
            if self._heads is not None:
                self._heads.write(place, self._matrix[place])

    def nearest(self, embedding: np.ndarray, seed: int | None, enough: float) -> tuple[str, float] | None:
        """Name and cosine of the most similar one, of those with that seed; None where there is none.

        Where a quick one is similar enough it is the most similar of those. Where none at all is, it is any of them.

        Args:
            embedding: ``[width]``, of length 1.
            seed: None takes any.
            enough: cosine from which on an embedding is similar enough.
        """
        count = len(self)
        if seed is not None:
            places = np.array(sorted(self._places[name] for name in self._of_seed.get(seed, ())), np.int64)
            quick, most = places[self._quick[places]], None
        else:
            places, quick, most = np.arange(count), np.flatnonzero(self._quick[:count]), self._most(embedding)
        if not len(places):
            return None
        found = self._best(quick, embedding, most, enough)
        if found is None or found[1] < enough:
            found = self._best(places, embedding, most, enough)
        if found is None:
            assert most is not None  # and says that none is similar enough
            place = int(most.argmax())
            found = place, float(self._matrix[place] @ embedding)
        return self._names[found[0]], found[1]

    def _most(self, embedding: np.ndarray) -> np.ndarray | None:
        """The cosine of each at most; None where they are so few, or so short, that one pass is quick enough."""
        count, width = len(self), self._matrix.shape[1]
        if count <= _FEW or width <= 2 * _DIRECTIONS:
            return None
        if self._heads is None:
            self._heads = _Heads(self._matrix, count)
        return self._heads.most(embedding, count)

    def _best(
        self, places: np.ndarray, embedding: np.ndarray, most: np.ndarray | None, enough: float
    ) -> tuple[int, float] | None:
        """Place and cosine of the most similar one, of those at some places.

        Args:
            places: int ``[m]``, ascending.
            embedding: see :meth:`nearest`.
            most: cosine of each of all rows, at most; None where nothing is known.
            enough: smaller cosines are of no interest, and None is returned where ``most`` has no others.
        """
        if most is not None:
            places = places[most[places] >= enough]
            if len(places) > _BEST:
                likely = places[np.argpartition(most[places], -_BEST)[-_BEST:]]
                places = places[most[places] >= (self._matrix[likely] @ embedding).max()]
        if not len(places):
            return None
        count = len(self)
        cosines = (self._matrix[:count] if len(places) == count else self._matrix[places]) @ embedding
        best = int(cosines.argmax())
        return int(places[best]), float(cosines[best])

    def _forget_seed(self, name: str, place: int) -> None:
        of_seed = self._of_seed[seed := int(self._seeds[place])]
        of_seed.remove(name)
        if not of_seed:
            del self._of_seed[seed]


class _Heads:
    """What rows of length 1 have in those directions in which some of them are largest, and the length of the rest.

    Args:
        matrix: ``[n, width]``, of which ``count`` rows are used.
    """

    def __init__(self, matrix: np.ndarray, count: int) -> None:
        sample = matrix[:count][:: max(1, count // _SAMPLE)]
        _, vectors = np.linalg.eigh(sample.T @ sample)  # ascending
        self._directions = np.ascontiguousarray(vectors[:, -_DIRECTIONS:])
        self._heads = matrix @ self._directions
        self._rests = self._length_of_rest(self._heads)

    def write(self, place: int, row: np.ndarray) -> None:
        """Follow a row that has changed."""
        self._heads[place] = row @ self._directions
        self._rests[place] = self._length_of_rest(self._heads[place])

    def most(self, embedding: np.ndarray, count: int) -> np.ndarray:
        """The cosine of each of the first rows with an embedding, at most."""
        head = embedding @ self._directions
        rest = self._length_of_rest(head) + _ROUNDING
        most: np.ndarray = self._heads[:count] @ head
        most += self._rests[:count] * rest
        return most + _ROUNDING

    @staticmethod
    def _length_of_rest(heads: np.ndarray) -> np.ndarray:
        lengths: np.ndarray = np.sqrt(np.maximum(1 - np.square(heads).sum(axis=-1), 0) + _ROUNDING)
        return lengths


def _doubled(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows, np.zeros_like(rows)])
