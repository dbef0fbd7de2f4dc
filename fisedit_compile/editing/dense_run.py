"""An edit whose steps all run the dense U-Net: the reference that sparse edits are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.editing.base import Base
from fisedit_compile.editing.edit_run import EditRun
from fisedit_compile.editing.own_tokenizers import OwnTokenizers
from fisedit_compile.editing.step_callback import StepCallback
from fisedit_compile.editing.step_macs import StepMacs
from fisedit_compile.editing.word_weights import Weights
from fisedit_compile.ir.call import Call
from fisedit_compile.sparse_unet import SparseUNet


class DenseRun(EditRun):
    """Edits a base by dense steps alone, the first ``controlled`` of them under Prompt-to-Prompt control.

    With ``controlled`` None as many are as in a sparse edit.

    Without a mask the whole picture is free. With one, the latents outside it are the base's behind every step, as in a
    sparse edit with this mask, so that the two differ in what the sparse U-Net leaves out and in nothing else.
    """

    def __init__(
        self,
        unet: SparseUNet,
        pipe: Any,
        tokenizers: OwnTokenizers,
        callback: StepCallback | None,
        base: Base,
        prompts: tuple[str, ...],
        changes: Mapping[str, Any],
        weights: Sequence[Weights],
        given: Tensor | None,
        controlled: int | None,
    ) -> None:
        samples, _, *size = base.latents.shape
        mask = torch.ones(samples, *size, dtype=torch.bool) if given is None else given
        super().__init__(unet, pipe, tokenizers, callback, base, prompts, changes, weights, mask, "replace", 1.0)
        if controlled is not None:
            self._controlled = [controlled] * samples
        self._macs: StepMacs | None = None

    def begin(self, call: Call) -> None:
        super().begin(call)
        self._macs = StepMacs(self.unet.program(call).lowered, self.host_mask, dense=True)

    def predict(self, call: Call) -> Tensor:
        cache, device = self._cache(call), call.tensors[0].device
        control = self._control(call)
        return self.timer.time("dense", device, lambda: self._dense(call, cache, control))

    @property
    def steps(self) -> tuple[int, int]:
        return len(self._base.visits), 0

    @property
    def ran_dense(self) -> bool:
        return True

    def step_macs(self) -> StepMacs:
        assert self._macs is not None
        return self._macs
