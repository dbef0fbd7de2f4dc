"""A call of the U-Net with its arguments by name, and the signature that says which graph serves it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils import _pytree as pytree

from fisedit_compile.errors import CaptureError


@dataclass(frozen=True)
class Signature:
    """Says which calls an exported graph serves: those whose arguments have this structure and these shapes.

    Attributes:
        tree: how the arguments are nested, as text.
        leaves: one entry for each argument, nested ones included: ``(shape, dtype, device)`` of a tensor, anything else
            as it is.
    """

    tree: str
    leaves: tuple[Any, ...]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """``[B, C, H, W]`` of the noisy latents, the U-Net's first argument."""
        return self.leaves[0][0]


@dataclass(frozen=True)
class Call:
    """A call of the U-Net, in the same form however its arguments were given. Made by :func:`bind`.

    Attributes:
        tensors: all tensors among the arguments, in the order in which an exported graph takes them.
        signature: says which graph serves the call.
    """

    tensors: tuple[torch.Tensor, ...]
    signature: Signature
    _leaves: tuple[Any, ...]
    _tree: pytree.TreeSpec
    _positional: tuple[str, ...] = ()

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments by name, with new lists on each access: a U-Net empties the list that a T2I-Adapter gives."""
        named: dict[str, Any] = pytree.tree_unflatten(self._leaves, self._tree)
        return named

    def split(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that were given by position, as hooks of the U-Net are given them, and the others by name."""
        named = self.kwargs
        return tuple(named.pop(name) for name in self._positional), named


def bind(unet: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Name the arguments of a call of ``unet``, so that positional ones, keywords and defaults give equal calls.

    A timestep that is a number becomes a 0-dim tensor. ``return_dict`` is dropped: a graph always returns a tensor.

    Raises:
        CaptureError: ``sample`` is not a ``[B, C, H, W]`` floating-point tensor.
        TypeError: the arguments do not fit ``unet.forward``.
    """
    bound = _signature_of(unet.forward).bind(*args, **kwargs).arguments
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


#: Of the functions behind methods; to read one from its function takes longer than to launch a step on a GPU.
_signatures: WeakKeyDictionary[Callable[..., Any], inspect.Signature] = WeakKeyDictionary()


def _signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of a module's ``forward``, which is another method at each access: read once for its function."""
    if not isinstance(forward, MethodType) or not isinstance(forward.__func__, FunctionType):
        return inspect.signature(forward)
    if forward.__func__ not in _signatures:
        _signatures[forward.__func__] = inspect.signature(forward)
    return _signatures[forward.__func__]
