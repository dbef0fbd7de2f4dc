"""A U-Net call of a batch of several edits: whose its rows are, and whether it is that of their bases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.ir.call import Call, Signature
from fisedit_compile.sparse_unet import SparseUNet


def rows_of(spans: Sequence[tuple[int, int]], samples: int, parts: int, device: torch.device) -> Tensor:
    """The rows of some samples in a batch that consists of ``parts`` of all ``samples`` each, int64 on ``device``.

    Args:
        spans: first sample, and the one behind the last.
    """
    rows = [part * samples + sample for part in range(parts) for span in spans for sample in range(*span)]
    return torch.tensor(rows).to(device, non_blocking=True)


def call_of_rows(unet: SparseUNet, call: Call, rows: Tensor) -> Call:
    """The call of some rows of the batch, by arguments as those of ``call`` were given."""
    batch = call.signature.sample_shape[0]

    def taken(value: Any) -> Any:
        per_sample = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
        return value.index_select(0, rows.to(value.device)) if per_sample else value

    args, kwargs = pytree.tree_map(taken, call.split())
    return unet.call(*args, **kwargs)


def check_call(now: Signature, then: Signature, index: int) -> None:
    """Hold a call of a batch to a recorded one of some of its samples: the same, but for the size of the batch.

    Args:
        now: of the batch.
        then: of the base.
        index: of the edit, for the message.

    Raises:
        BaseMismatchError: another argument, size, dtype or device; or an argument that has a row for each sample of the
            base, and not for each of the batch.
    """
    if now.tree == then.tree and len(now.leaves) == len(then.leaves):
        batches = then.sample_shape[0], now.sample_shape[0]
        if all(_fits(old, new, *batches) for old, new in zip(then.leaves, now.leaves, strict=True)):
            return
    raise BaseMismatchError(
        f"edit {index}: beside the others the U-Net is called with {_shapes(now)}, which is not {_shapes(then)} of its "
        "base for more samples: make it alone"
    )


def _fits(then: Any, now: Any, then_batch: int, now_batch: int) -> bool:
    if not _is_tensor(then) or not _is_tensor(now):
        return bool(then == now)
    (old, *old_kind), (new, *new_kind) = then, now
    if old_kind != new_kind:
        return False
    if old[:1] == (then_batch,) and old != (1,):  # a single number is the timestep of all
        return bool(new == (now_batch, *old[1:]))
    return bool(new == old)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and len(leaf) == 3 and isinstance(leaf[1], torch.dtype)


def _shapes(signature: Signature) -> str:
    return ", ".join(str(list(leaf[0])) if _is_tensor(leaf) else repr(leaf) for leaf in signature.leaves)
