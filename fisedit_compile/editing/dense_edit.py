"""An edit whose steps all run the dense U-Net: the reference that sparse edits are held against."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fisedit_compile.compiler.lowered import Lowered
from fisedit_compile.editing.edit_request import CheckedEdit
from fisedit_compile.editing.running_edit import RunningEdit
from fisedit_compile.editing.step_macs import StepMacs


class DenseEdit(RunningEdit):
    """Edits a base by dense steps alone, the first ones under Prompt-to-Prompt control.

    Without a mask the whole picture is free. With one, the latents outside it are the base's behind every step, as in a
    sparse edit with this mask, so that the two differ in what the sparse U-Net leaves out and in nothing else.

    Args:
        pipe, asked: see :class:`~fisedit_compile.editing.running_edit.RunningEdit`.
    """

    lowered: Lowered  # the graphs of the U-Net's calls, known at the first one

    def __init__(self, pipe: Any, asked: CheckedEdit) -> None:
        samples, _, *size = asked.base.latents.shape
        mask = torch.ones(samples, *size, dtype=torch.bool) if asked.given is None else asked.given
        super().__init__(pipe, replace(asked, given=mask, combine="replace"))
        self.asked = asked
        self.dense_steps = len(asked.base.visits)

    @property
    def ran_dense(self) -> bool:
        return True

    @property
    def _is_found_alone(self) -> bool:
        return False  # without a mask the whole picture is free, which is more than what changes

    def step_macs(self) -> StepMacs:
        return StepMacs(self.lowered, self.host_mask, dense=True)
