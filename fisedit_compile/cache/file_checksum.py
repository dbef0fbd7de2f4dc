"""The checksum of a file, whose ranges several threads can read and hash at once.

It is the SHA-256 of the SHA-256 of each range. Processors of today have instructions for SHA-256, with which it takes
half of the time of BLAKE2b (docs/decisions.md, 2026-11-29).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

#: Bytes of a range; the last one of a file may be shorter. Between two of them a thread needs the interpreter's lock,
#: for which it may have to wait.
RANGE = 4 * 2**20


class FileChecksum:
    """The checksum of a file that is given from its beginning to its end, in pieces of any size."""

    def __init__(self) -> None:
        self._ranges: list[bytes] = []
        self._open, self._missing = hashlib.sha256(), RANGE

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Go on by some bytes."""
        rest = memoryview(data).cast("B")
        while rest:
            taken, rest = rest[: self._missing], rest[self._missing :]
            self._open.update(taken)
            self._missing -= len(taken)
            if not self._missing:
                self._ranges.append(self._open.digest())
                self._open, self._missing = hashlib.sha256(), RANGE

    def hexdigest(self) -> str:
        """The checksum of all bytes so far."""
        return joined([*self._ranges, self._open.digest()] if self._missing < RANGE else self._ranges)


def ranges(size: int) -> Iterator[tuple[int, int]]:
    """First byte of each range of a file of ``size`` bytes, and the one behind its last."""
    return ((start, min(start + RANGE, size)) for start in range(0, size, RANGE))


def of_range(memories: Iterable[memoryview]) -> bytes:
    """The checksum of a range that lies in some pieces of memory, one behind the other."""
    checksum = hashlib.sha256()
    for memory in memories:
        checksum.update(memory)
    return checksum.digest()


def joined(of_ranges: Iterable[bytes]) -> str:
    """The checksum of a file whose ranges have these."""
    return hashlib.sha256(b"".join(of_ranges)).hexdigest()


def checksum(data: bytes | bytearray) -> str:
    """The checksum of a file whose content is known."""
    of_file = FileChecksum()
    of_file.update(data)
    return of_file.hexdigest()
