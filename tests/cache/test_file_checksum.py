"""The checksum of a file does not depend on the pieces in which it is written, or read."""

from __future__ import annotations

import hashlib

import pytest

from fisedit_compile.cache import file_checksum
from fisedit_compile.cache.file_checksum import FileChecksum, checksum, joined, of_range, ranges

#: Bytes of a range in these tests.
FEW = 64


@pytest.fixture(autouse=True)
def short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_checksum, "RANGE", FEW)


@pytest.mark.parametrize("size", [0, 1, FEW - 1, FEW, FEW + 1, 5 * FEW, 5 * FEW + 7])
class TestOneChecksum:
    def test_it_is_that_of_the_ranges_checksums(self, size: int) -> None:
        data = bytes(i % 251 for i in range(size))
        each = [hashlib.sha256(data[start : start + FEW]).digest() for start in range(0, size, FEW)]
        assert checksum(data) == hashlib.sha256(b"".join(each)).hexdigest()

    @pytest.mark.parametrize("piece", [1, 7, FEW, FEW + 3, 1000])
    def test_in_whatever_pieces_a_file_is_written(self, size: int, piece: int) -> None:
        data = bytes(i % 251 for i in range(size))
        written = FileChecksum()
        for start in range(0, size, piece):
            written.update(data[start : start + piece])
        assert written.hexdigest() == checksum(data)

    def test_in_whatever_pieces_of_memory_a_range_lies(self, size: int) -> None:
        data = bytes(i % 251 for i in range(size))
        read = []
        for start, end in ranges(size):
            middle = (start + end) // 2
            read.append(of_range([memoryview(data)[start:middle], memoryview(data)[middle:end]]))
        assert joined(read) == checksum(data)

    def test_every_byte_counts(self, size: int) -> None:
        data = bytearray(i % 251 for i in range(size))
        seen = {checksum(data)}
        for i in range(size):
            data[i] ^= 1
            seen.add(checksum(data))
            data[i] ^= 1
        seen.add(checksum(data + b"\0"))
        assert len(seen) == size + 2
