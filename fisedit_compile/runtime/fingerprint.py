"""Whether a model's weights are the ones that something was made with: a digest to keep, and a watch for changes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor

from fisedit_compile.kernels.indexing.copy_rows import RowCopies

#: Values of each parameter that are compared, evenly spaced. A fine-tune, a LoRA or another seed changes nearly all
#: weights, so a few tell it; reading every byte of a large U-Net would take seconds an edit.
_VALUES = 16

_SLOT = _VALUES * 16  # bytes for the values of one parameter, of the widest dtype


def fingerprint(model: torch.nn.Module) -> str:
    """A hexadecimal digest of the names, shapes, dtypes and sampled values of ``model`` and of its ``config``."""
    digest = hashlib.sha256()
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    named = sorted(model.named_parameters())
    digest.update(" ".join(f"{name} {tuple(each.shape)} {each.dtype}" for name, each in named).encode())
    for values in _sampled([each for _, each in named]):
        digest.update(values.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


class Weights(Enum):
    """What became of a model's weights since the last look."""

    SAME = "same"
    WRITTEN = "written"  # other values at the same addresses
    MOVED = "moved"  # other memory


class WeightWatch:
    """Tells whether a model's weights were written to or moved to other memory.

    By value, not by version counters: a LoRA is fused by ``weight.data += ...``, which leaves those as they are.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._addresses: list[int] = []
        self._samples: list[_Samples] = []

    def look(self) -> Weights:
        """What happened since the last look; the first finds them moved."""
        addresses = [each.data_ptr() for each in self._parameters]
        moved = addresses != self._addresses
        if moved:
            self._addresses = addresses
            devices = {each.device for each in self._parameters}
            self._samples = [_Samples([p for p in self._parameters if p.device == device]) for device in devices]
        written = [not samples.are_the_same() for samples in self._samples]  # of every device: each look renews them
        return Weights.MOVED if moved else Weights.WRITTEN if any(written) else Weights.SAME


class _Samples:
    """Values of parameters on one device, taken again at each look, on a GPU by one launch."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        device = parameters[0].device
        where = [_places(each.shape, each.stride()) for each in parameters]
        index = torch.cat(where).to(device).split([len(each) for each in where])
        counts = torch.tensor([len(each) for each in where], dtype=torch.int32, device=device)
        # Bytes, so that one comparison does for all dtypes, and a value that is not a number equals itself.
        self._now = torch.zeros(len(parameters) * _SLOT, dtype=torch.uint8, device=device)
        self._before = torch.zeros_like(self._now)
        slots = [
            slot[: len(places) * each.element_size()].view(each.dtype)[:, None]
            for slot, places, each in zip(self._now.split(_SLOT), where, parameters, strict=True)
        ]
        self._copies = RowCopies(slots, index, counts)
        self._parameters = self._copies.addresses([_memory(each)[:, None] for each in parameters])

    def are_the_same(self) -> bool:
        """Whether they are what they were at the last call."""
        self._copies.run(self._parameters)
        same = torch.equal(self._now, self._before)
        if not same:
            self._before.copy_(self._now)
        return same


@lru_cache(maxsize=1024)  # the parameters of a U-Net have a hundred shapes
def _places(shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """int64 ``[<= _VALUES]``: where sampled elements lie in memory; the same elements whatever the memory format."""
    count = math.prod(shape)
    positions = torch.arange(0, count, max(1, count // _VALUES))[:_VALUES]
    along = zip(torch.unravel_index(positions, shape), strides, strict=True)
    return sum((coordinate * stride for coordinate, stride in along), torch.zeros_like(positions))


def _memory(tensor: Tensor) -> Tensor:
    """All the memory from a tensor's first element to its last, as one dimension."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((reach + 1 if tensor.numel() else 0,), (1,))


def _sampled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sampled values, joined for each dtype and device, of the order in which these are met first."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return [torch.cat([_values(each) for each in group]) for group in groups.values()]


def _values(tensor: Tensor) -> Tensor:
    """The elements at :func:`_places`; a view where a stride says them all, which nothing has to be uploaded for."""
    if tensor.is_contiguous():
        return _memory(tensor)[:: max(1, tensor.numel() // _VALUES)][:_VALUES]
    return _memory(tensor)[_places(tensor.shape, tensor.stride()).to(tensor.device)]
