"""Whether dicts, lists, sets, cells and names still hold the very objects that they held.

A large U-Net has some ten thousand of them. They are compared by identity, in a few calls that run at the speed of C:
one to three milliseconds, where describing them again takes sixty to two hundred.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from itertools import chain
from types import CellType
from typing import Any


class Containers:
    """Containers that are collected once, remembered, and compared with what they hold later."""

    def __init__(self) -> None:
        self._attributes: dict[tuple[str, ...], list[dict[str, Any]]] = {}  # those of the same names together
        self._dicts: list[dict[Any, Any]] = []
        self._empty: list[dict[Any, Any]] = []
        self._lists: list[list[Any]] = []
        self._sets: list[set[Any]] = []
        self._cells: list[CellType] = []
        self._names: list[tuple[Mapping[str, Any], str, Any]] = []

    def add_attributes(self, attributes: dict[str, Any], names: tuple[str, ...]) -> None:
        """Watch the values of ``names`` in the ``__dict__`` of an object, and that no other attribute appears."""
        self._attributes.setdefault(names, []).append(attributes)

    def add_dict(self, mapping: dict[Any, Any]) -> None:
        (self._dicts if mapping else self._empty).append(mapping)

    def add_list(self, values: list[Any]) -> None:
        self._lists.append(values)

    def add_set(self, values: set[Any]) -> None:
        self._sets.append(values)

    def add_cell(self, cell: CellType) -> None:
        """Watch a variable that a function closes over."""
        self._cells.append(cell)

    def add_name(self, names: Mapping[str, Any], name: str) -> None:
        """Watch one name of a module or class."""
        self._names.append((names, name, names[name]))

    def remember(self) -> None:
        """Keep what all of them hold now."""
        self._getters = [(operator.itemgetter(*names), alike) for names, alike in self._attributes.items()]
        self._sizes = list(map(len, chain.from_iterable(self._attributes.values())))
        self._values = [list(map(get, alike)) for get, alike in self._getters]
        self._dict_sizes = list(map(len, self._dicts))
        self._dict_keys = list(chain.from_iterable(self._dicts))
        self._dict_values = list(chain.from_iterable(map(dict.values, self._dicts)))
        self._list_sizes = list(map(len, self._lists))
        self._items = list(chain.from_iterable(self._lists))
        self._elements = [frozenset(each) for each in self._sets]
        self._contents = [each.cell_contents for each in self._cells]

    def are_unchanged(self) -> bool:
        """Whether they hold the same objects as when they were remembered; attributes may hold equal ones.

        A tuple of attributes is equal by the identity of its items where these are the same, which is twice as fast as
        to ask for the identity of each. An equal container in the place of another is compared with that at each look.
        """
        try:
            return (
                not any(self._empty)
                and list(map(len, chain.from_iterable(self._attributes.values()))) == self._sizes
                and all(
                    all(map(operator.eq, map(get, alike), values))
                    for (get, alike), values in zip(self._getters, self._values, strict=True)
                )
                and list(map(len, self._dicts)) == self._dict_sizes
                and list(chain.from_iterable(self._dicts)) == self._dict_keys
                and _are(chain.from_iterable(map(dict.values, self._dicts)), self._dict_values)
                and list(map(len, self._lists)) == self._list_sizes
                and _are(chain.from_iterable(self._lists), self._items)
                and self._sets == self._elements
                and _are([each.cell_contents for each in self._cells], self._contents)
                and all(names.get(name) is value for names, name, value in self._names)
            )
        except (KeyError, RuntimeError, TypeError, ValueError):  # an attribute or a variable is gone; other tensors
            return False

    def restore(self) -> None:
        """Make all but the names hold again what was remembered."""
        sizes = iter(self._sizes)
        for (names, alike), values in zip(self._attributes.items(), self._values, strict=True):
            for attributes, old in zip(alike, values, strict=True):
                for name in list(attributes)[next(sizes) :]:  # attributes lie in the order in which they were set
                    del attributes[name]
                attributes.update(zip(names, old, strict=True))
        keys, held, items = iter(self._dict_keys), iter(self._dict_values), iter(self._items)
        for mapping in self._empty:
            mapping.clear()
        for mapping, size in zip(self._dicts, self._dict_sizes, strict=True):
            old = [(next(keys), next(held)) for _ in range(size)]
            mapping.clear()
            mapping.update(old)
        for sequence, size in zip(self._lists, self._list_sizes, strict=True):
            sequence[:] = [next(items) for _ in range(size)]
        for elements, saved in zip(self._sets, self._elements, strict=True):
            elements.clear()
            elements.update(saved)
        for cell, content in zip(self._cells, self._contents, strict=True):
            cell.cell_contents = content


def _are(found: Iterable[Any], known: Iterable[Any]) -> bool:
    """Whether both give the same objects; they have the same length."""
    return all(map(operator.is_, found, known))
