"""A base on its way to disk: what JSON holds, and tensors in shards, each of which is a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.plain_form import Keep
from fisedit_compile.cache.shard_file import ALIGNMENT, is_storable
from fisedit_compile.errors import SavedBaseError

#: At most what the header of a shard says of a tensor beside its name, and what a file takes beside its content.
_TENSOR_OVERHEAD, _FILE_OVERHEAD = 256, 2 * ALIGNMENT


@dataclass
class PackedBase:
    """What is written of a base; it shares the base's tensors.

    Attributes:
        summary: what people and programs want to know without reading the rest; plain values.
        content: everything but the tensors, in a form that JSON holds.
        shards: name of a file -> its tensors by name.
    """

    summary: dict[str, Any] = field(default_factory=dict)
    content: Any = None
    shards: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def keep_in(self, shard: str) -> Keep:
        """What puts tensors into the shard of this name, for :func:`~fisedit_compile.cache.plain_form.to_plain`."""

        def keep(tensor: Tensor, path: str) -> dict[str, Any]:
            if tensor.layout is not torch.strided or tensor.is_meta or not is_storable(tensor.dtype):
                raise SavedBaseError(
                    f"{path} is a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}, which a saved base "
                    "cannot hold: use a dense one of a common dtype"
                )
            plain = tensor.is_contiguous()
            order = list(range(tensor.ndim)) if plain else memory_order(tensor)
            name = path if path not in self.shards.setdefault(shard, {}) else f"{path} {len(self.shards[shard])}"
            self.shards[shard][name] = tensor.detach() if plain else tensor.detach().permute(order)
            return {"shard": shard, "name": name, "order": order, "device": str(tensor.device)}

        return keep

    @cached_property
    def content_json(self) -> bytes:
        """:attr:`content` as it is written."""
        return json.dumps(self.content).encode()

    @cached_property
    def nbytes(self) -> int:
        """The most that it takes on disk, in bytes; of a base that is packed."""
        tensors = sum(
            tensor.nbytes + len(name.encode()) + _TENSOR_OVERHEAD
            for shard in self.shards.values()
            for name, tensor in shard.items()
        )
        written = len(self.content_json) + len(json.dumps(self.summary))
        return tensors + written + _FILE_OVERHEAD * (len(self.shards) + 2)


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions in the order in which they lie in memory, the slowest first; of one with gaps as they are.

    So a tensor in ``channels_last`` is in ``channels_last`` again when it is read.
    """
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
    return order if tensor.permute(order).is_contiguous() else list(range(tensor.ndim))


def place(tensor: Tensor, reference: Mapping[str, Any], device: torch.device) -> Tensor:
    """A tensor of a shard on ``device``, its dimensions in memory as they were."""
    order, as_it_is = reference["order"], list(range(tensor.ndim))
    here = tensor if tensor.device == device else tensor.to(device)
    return here if order == as_it_is else here.permute([order.index(dim) for dim in as_it_is])
