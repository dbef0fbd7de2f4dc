"""An edit with a given mask reads nothing of what a device computes until its picture is there, and then one value.

A CPU waits for nobody, so what comes from the U-Net is followed through all operations, and reads of it are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.pipelines import EDIT, generate, left_half, tiny_pipeline
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fisedit_compile import Editor, SparseUNet
from fisedit_compile.editing.edit_run import EditRun

_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}

pytestmark = pytest.mark.usefixtures("one_thread")


class Reads(TorchDispatchMode):
    """Counts the operations that read values of ``computed``, or of what was made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._computed: dict[int, Tensor] = {}  # held, so that no id is given twice

    def follow(self, tensor: Tensor) -> Tensor:
        self._computed[id(tensor)] = tensor
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = pytree.tree_leaves((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if any(id(each) in self._computed for each in given if isinstance(each, Tensor)):
            by_mask = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and any(
                isinstance(each, Tensor) and each.dtype is torch.bool for each in pytree.tree_leaves(args[1])
            )
            self.count += func in _READS or by_mask
            for each in pytree.tree_leaves(out):
                if isinstance(each, Tensor):
                    self.follow(each)
        return out


def unseen(method: Callable[..., Tensor], reads: Reads) -> Callable[..., Tensor]:
    """A call of the U-Net of which only the result is looked at."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        with _disable_current_modes():
            out = method(*args, **kwargs)
        return reads.follow(out)

    return call


@pytest.mark.parametrize("stride", [1, 2])
def test_an_edit_with_a_mask_waits_once_behind_its_picture(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Editor(
        tiny_pipeline(sparse_decoder=True),
        {"dense_steps": 2, "cross_replace": 0.25, "dense_above": 1.0, "stride": stride},
    )
    base = generate(editor, num_inference_steps=8)
    editor.edit(base, EDIT, left_half())
    reads, seen = Reads(), []  # seen: reads before and behind the decoder
    for name in ("dense", "controlled", "step"):
        monkeypatch.setattr(SparseUNet, name, unseen(getattr(SparseUNet, name), reads))
    decode = EditRun.decode

    def decode_and_note(run: EditRun, latents: Tensor) -> Tensor | None:
        seen.append(reads.count)
        out = decode(run, latents)
        seen.append(reads.count)
        return out

    monkeypatch.setattr(EditRun, "decode", decode_and_note)
    with reads:
        edit = editor.edit(base, EDIT, left_half())
    assert edit.report.background_identical
    before, behind = seen
    assert before == behind == 0
    assert reads.count == 1
