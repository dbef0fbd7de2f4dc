"""U-Nets with random weights, their inputs and recorded bases, each made once a session."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast
from unittest.mock import patch

import torch

from fisedit_compile.architectures import ARCHITECTURES, build_unet, unet_inputs

#: A U-Net of two resolutions that captures in under a second; "tiny*" are those of ``architectures``, of three.
MICRO: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
}


_Method = TypeVar("_Method", bound=Callable[..., Any])


def once(method: _Method) -> _Method:
    """``method``, whose results are kept: the same arguments give the same object, in whatever way they are given."""
    signature = inspect.signature(method)

    @wraps(method)
    def kept(unets: UNets, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(unets, *args, **kwargs)
        given.apply_defaults()
        key = (method.__name__, *given.args[1:])
        if key not in unets.made:
            unets.made[key] = method(*given.args)
        return unets.made[key]

    return cast("_Method", kept)


@dataclass(frozen=True)
class Recorded:
    """One base call of a U-Net, its noise prediction and its cache; all tensors belong to the session: never write."""

    call: Any
    out: torch.Tensor
    cache: dict[Any, torch.Tensor]


class UNets:
    """Dense and sparse U-Nets with random weights, inputs and recorded bases, each made once a session.

    Sizes are those of the latents. The same arguments give the same object.
    """

    def __init__(self) -> None:
        self.made: dict[Any, Any] = {}

    @staticmethod
    def fresh(arch: str, dtype: torch.dtype = torch.float64) -> Any:
        """A U-Net of one's own, to change or break, with weights as :func:`build_unet` draws them."""
        if arch != "micro":
            return build_unet(arch, dtype=dtype)
        with patch.dict(ARCHITECTURES, micro=MICRO):
            return build_unet("micro", dtype=dtype)

    @once
    def dense(self, arch: str, dtype: torch.dtype = torch.float64) -> Any:
        return self.fresh(arch, dtype)

    @once
    def inputs(
        self, arch: str, batch: int, size: tuple[int, int], dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Arguments of one call, positional and by keyword; another seed is other latents and text at its timestep."""
        unet = self.dense(arch, dtype)
        args, kwargs = unet_inputs(unet, batch=batch, height=8 * size[0], width=8 * size[1], seed=seed)
        return (args[0], torch.tensor(500), args[2]), kwargs

    @once
    def sparse(
        self, arch: str, dtype: torch.dtype = torch.float64, attention: str = "full", dense_below: int = 4
    ) -> Any:
        from fisedit_compile.sparse_unet import sparsify

        config = {"attention": attention, "dense_below": dense_below, "dense_above": 1.0}  # sparse with full masks, too
        return sparsify(self.dense(arch, dtype), config)

    def call(self, sparse: Any, arch: str, batch: int, size: tuple[int, int], seed: int = 0) -> Any:
        """A call of ``sparse`` in the form that its methods take."""
        args, kwargs = self.inputs(arch, batch, size, sparse.unet.dtype, seed)
        return sparse.call(*args, **kwargs)

    @once
    def recorded(self, sparse: Any, arch: str, batch: int, size: tuple[int, int], seed: int = 0) -> Recorded:
        call = self.call(sparse, arch, batch, size, seed)
        out, kept = sparse.record(call)
        return Recorded(call, out, kept)
