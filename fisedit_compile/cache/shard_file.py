"""The file of a shard: safetensors whose tensors begin at a page, and where in it each of them lies.

Files are read and written by parts rather than by the library's own functions. These take and make a file's whole
content, and copy each tensor with the interpreter's lock held: threads would read one shard after the other, and who
draws while a base is written would wait for most of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.base_manifest import LENGTH
from fisedit_compile.cache.host_tier import brought_to_host
from fisedit_compile.cache.tensors_in_memory import Place

#: Where the tensors of a shard begin, in bytes: pages of the file system, which direct reads need.
ALIGNMENT = 4096

#: What the format calls the dtypes that a shard can hold.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

#: Bytes that are brought to the host, checked and written at once, and bytes of memory that tensors are read into
#: together.
PIECE = 16 * 2**20


@dataclass(frozen=True)
class Part:
    """A tensor of a shard; parts lie one behind another.

    Attributes:
        name: of the tensor in the shard.
        dtype, shape: of the tensor, its dimensions as they lie in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shard_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The file of a shard in pieces: safetensors, whose tensors begin at a multiple of :data:`ALIGNMENT`.

    A piece is of use until the next one is asked for. Tensors of a GPU are read at once, so that their values have to
    be there.
    """
    # As the library orders them: the widest elements first, so that each tensor lies at a multiple of its elements.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    parts = [Part(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in order]
    header, end = {}, 0
    for part in parts:
        offsets = [end, end + part.nbytes]
        header[part.name] = {"dtype": _NAMES[part.dtype], "shape": part.shape, "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH + len(text)) % ALIGNMENT)  # spaces behind the header's JSON are part of the format
    yield len(text).to_bytes(LENGTH, "little") + text
    for some in _in_pieces(parts):
        places, size = [], 0
        for part in some:
            places.append(Place(size, part.dtype, part.shape))
            size += part.nbytes
        yield brought_to_host([tensors[part.name] for part in some], places, size).numpy().data


def _in_pieces(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Tensors that lie one behind another, some :data:`PIECE` bytes of them at a time."""
    some: list[Part] = []
    nbytes = 0
    for part in parts:
        some.append(part)
        nbytes += part.nbytes
        if nbytes >= PIECE:
            yield some
            some, nbytes = [], 0
    if some:
        yield some


def parts_of(header: bytes | bytearray, nbytes: int) -> list[Part]:
    """The tensors of a shard in the order in which they lie in the file.

    Args:
        header: the JSON in front of them.
        nbytes: of the file behind it.

    Raises:
        ValueError: no header of such a file.
    """
    try:
        values: dict[str, Any] = json.loads(header)
        values.pop("__metadata__", None)
        parts, end = [], 0
        for name, value in sorted(values.items(), key=lambda each: each[1]["data_offsets"]):
            part = Part(name, _DTYPES[value["dtype"]], tuple(value["shape"]))
            start, behind = value["data_offsets"]
            whole = all(type(size) is int and size >= 0 for size in part.shape)
            if not whole or (start, behind) != (end, end + part.nbytes):
                raise ValueError(f"{name!r} does not lie behind the tensor before it")
            parts.append(part)
            end = behind
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"no safetensors: {error}") from None
    if end != nbytes:
        raise ValueError(f"no safetensors: {end} bytes of tensors in {nbytes}")
    return parts


def is_storable(dtype: torch.dtype) -> bool:
    """Whether a shard can hold tensors of a dtype."""
    return dtype in _DTYPES.values()
