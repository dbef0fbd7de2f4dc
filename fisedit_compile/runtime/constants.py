"""What the graphs of a U-Net compute from its weights alone, once a model; graphs share what they compute alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisedit_compile.runtime.model_state import Live
from fisedit_compile.runtime.stage import Stage


class Constants:
    """The values of the stages ``constant`` of several graphs.

    Attributes:
        values: by request. CUDA graphs read them where they lie.
        version: another number whenever the weights are others.
    """

    def __init__(self) -> None:
        self.values: dict[Any, Tensor] = {}
        self.version = 0
        self._stages: list[Stage] = []
        self._weights: Live | None = None  # as they were when the values were computed

    def add(self, stage: Stage) -> None:
        """Take in the stage of one more graph; what other graphs have computed is not kept twice."""
        self._stages.append(stage)
        if self._weights is not None:
            self.values = self._with(stage, self.values)

    def follow(self, weights: Live) -> bool:
        """Compute the values anew where the weights are others than before, in the same memory where these lie still.

        Returns:
            Whether weights or values lie elsewhere than before, so that CUDA graphs have to be captured anew.
        """
        before, self._weights = self._weights, weights
        if before is weights:
            return False
        moved = before is None or before.addresses != weights.addresses
        if before is not None and not moved and before.stamps == weights.stamps:
            return False
        self.version += 1
        values: dict[Any, Tensor] = {}
        for stage in self._stages:
            values = self._with(stage, values)
        if moved:
            self.values.clear()
            self.values.update(values)
            return before is not None
        for request, old in self.values.items():
            if old.data_ptr() != values[request].data_ptr():  # else it is the weight itself
                old.copy_(values[request])
        return False

    @staticmethod
    def _with(stage: Stage, values: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """``values`` and those of a stage that are not among them, which can be written to in whatever mode is next."""
        if values.keys() >= set(stage.outputs):
            return values
        with torch.inference_mode(False):
            return {**stage.values({}), **values}
