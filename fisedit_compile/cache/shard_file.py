"""The file of a shard: safetensors whose tensors begin at a page, and where in it each of them lies.

Files are read by parts rather than by the library's own functions. These take a file's whole content and copy each
tensor out of it with the interpreter's lock held, so that threads read one shard after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fisedit_compile.cache.base_manifest import LENGTH

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
    """The file of a shard in pieces: safetensors, whose tensors begin at a multiple of :data:`ALIGNMENT`."""
    on_host: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        on_host[name] = dense.clone() if dense.data_ptr() in seen else dense  # safetensors refuses shared memory
        seen.add(on_host[name].data_ptr())
    data = memoryview(safetensors.torch.save(on_host))
    header = int.from_bytes(data[:LENGTH], "little")
    padding = -(LENGTH + header) % ALIGNMENT  # spaces behind the header's JSON are part of the format
    yield (header + padding).to_bytes(LENGTH, "little")
    yield data[LENGTH : LENGTH + header]
    yield b" " * padding
    yield data[LENGTH + header :]


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
