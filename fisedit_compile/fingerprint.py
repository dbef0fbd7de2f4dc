"""Whether a model's weights are the ones that something was made with: a digest to keep, and a watch for changes."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from enum import Enum

import torch
from torch import Tensor

#: Values of each parameter that are compared, evenly spaced. A fine-tune, a LoRA or another seed changes nearly all
#: weights, so a few tell it; reading every byte of a large U-Net would take seconds an edit.
_VALUES = 16


def fingerprint(model: torch.nn.Module) -> str:
    """A hexadecimal digest of the names, shapes, dtypes and sampled values of ``model`` and of its ``config``."""
    digest = hashlib.sha256()
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    named = sorted(model.named_parameters())
    digest.update(" ".join(f"{name} {tuple(each.shape)} {each.dtype}" for name, each in named).encode())
    for values in _sampled([view for _, each in named for view in _in_order(each.detach())]):
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
        self._views: list[Tensor] = []
        self._values: list[Tensor] = []

    def look(self) -> Weights:
        """What happened since the last look; the first finds them moved."""
        addresses = [each.data_ptr() for each in self._parameters]
        moved = addresses != self._addresses
        if moved:
            self._addresses, self._views = addresses, _views(self._parameters)
        values = _sampled(self._views)
        written = moved or not all(map(torch.equal, values, self._values))
        self._values = values
        return Weights.MOVED if moved else Weights.WRITTEN if written else Weights.SAME


def _in_order(tensor: Tensor) -> list[Tensor]:
    """Samples in the order of the dimensions: the same values whatever the memory format."""
    if tensor.is_contiguous():
        return _views([tensor])
    positions = range(tensor.numel())[:: max(1, tensor.numel() // _VALUES)][:_VALUES]
    return [tensor[_coordinates(position, tensor.shape)].view(1) for position in positions]


def _coordinates(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    coordinates: list[int] = []
    for side in reversed(shape):
        position, rest = divmod(position, side)
        coordinates.insert(0, rest)
    return tuple(coordinates)


def _views(parameters: Iterable[Tensor]) -> list[Tensor]:
    flat = [
        each.detach().as_strided((each.numel(),), (1,)) if _is_dense(each) else each.detach().reshape(-1)
        for each in parameters
    ]
    return [each[:: max(1, each.numel() // _VALUES)][:_VALUES] for each in flat]


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order, so that they can be sampled without a copy."""
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _sampled(views: list[Tensor]) -> list[Tensor]:
    """The sampled values, joined for each dtype and device: one launch and one comparison for all of them."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for view in views:
        groups[view.dtype, view.device].append(view)
    return [torch.cat(group) for group in groups.values()]
