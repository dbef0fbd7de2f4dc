"""A call of the U-Net in one form, and the signature that a graph is valid for."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fisedit_compile.errors import CaptureError


@dataclass(frozen=True)
class Signature:
    """What one captured graph is valid for: the tree of the call's arguments and each tensor's shape, dtype, device."""

    tree: str
    leaves: tuple[Any, ...]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """``[B, C, H, W]`` of the noisy latents, the U-Net's first argument."""
        return self.leaves[0][0]


@dataclass(frozen=True)
class Call:
    """A call of the U-Net in one form: its tensors in order, and the signature."""

    tensors: tuple[torch.Tensor, ...]
    signature: Signature
    _leaves: tuple[Any, ...]
    _tree: pytree.TreeSpec
    _positional: tuple[str, ...] = ()

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments by name. Lists in them are new ones each time: a U-Net empties that of a T2I-Adapter."""
        named: dict[str, Any] = pytree.tree_unflatten(self._leaves, self._tree)
        return named

    def split(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that were given by position, as hooks of the U-Net are given them, and the others by name."""
        named = self.kwargs
        return tuple(named.pop(name) for name in self._positional), named


def bind(unet: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Bring a call of ``unet`` into one form, whether its arguments were positional, keywords or defaults.

    A number given as timestep becomes a 0-dim tensor. ``return_dict`` is no part of the call: a graph returns a tensor.

    Raises:
        CaptureError: ``sample`` is not a ``[B, C, H, W]`` floating-point tensor.
        TypeError: the arguments do not fit ``unet.forward``.
    """
    bound = inspect.signature(unet.forward).bind(*args, **kwargs).arguments
    positional = list(bound)[: len(args)]
    bound.update(bound.pop("kwargs", {}))
    named = {name: value for name, value in bound.items() if value is not None and name != "return_dict"}
    sample = named.get("sample")
    if not isinstance(sample, torch.Tensor) or sample.ndim != 4 or not sample.is_floating_point():
        found = getattr(sample, "shape", type(sample).__name__)
        raise CaptureError(f"sample is {found}: the U-Net's first argument has to be latents [batch, channels, h, w]")
    if "timestep" in named and not isinstance(named["timestep"], torch.Tensor):
        dtype = torch.int64 if isinstance(named["timestep"], int) else torch.float32
        named["timestep"] = torch.tensor(named["timestep"], dtype=dtype, device=sample.device)
    leaves, tree = pytree.tree_flatten(named)
    key = tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
    )
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    before_none = itertools.takewhile(named.__contains__, positional)  # a None is left out, so what follows has a name
    return Call(tensors, Signature(str(tree), key), tuple(leaves), tree, tuple(before_none))
