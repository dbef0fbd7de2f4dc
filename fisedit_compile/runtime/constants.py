"""The weights of a U-Net, and what its graphs compute from these alone, once a model; graphs share it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.ir.requests import Weight
from fisedit_compile.runtime.model_state import Live
from fisedit_compile.runtime.stage import Stage


class Constants:
    """The weights of a U-Net, and the values of the stages ``constant`` of several graphs.

    Args:
        weights: what the graphs read of the U-Net, where it lies.

    Attributes:
        values: by request. CUDA graphs read them where they lie.
        version: another number whenever the weights are others.
    """

    def __init__(self, weights: Mapping[Weight, Tensor]) -> None:
        self.values: dict[Any, Tensor] = dict(weights)
        self.version = 0
        self._stages: list[Stage] = []
        self._weights = weights
        self._live: Live | None = None  # how they were when the values were computed

    def add(self, stage: Stage) -> None:
        """Take in the stage of one more graph; what other graphs have computed is not kept twice."""
        self._stages.append(stage)
        if self._live is not None:
            self.values = self._with(stage, self.values)

    def follow(self, live: Live) -> bool:
        """Compute the values anew where the weights are others than before, in the same memory where these lie still.

        Returns:
            Whether weights or values lie elsewhere than before, so that CUDA graphs have to be captured anew.
        """
        before, self._live = self._live, live
        if before is live:
            return False
        moved = before is None or before.addresses != live.addresses
        if before is not None and not moved and before.stamps == live.stamps:
            return False
        self.version += 1
        values: dict[Any, Tensor] = dict(self._weights)
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

    def _with(self, stage: Stage, values: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """``values`` and those of a stage that are not among them, which can be written to in whatever mode is next."""
        if values.keys() >= set(stage.outputs):
            return values
        with torch.inference_mode(False):
            return {**stage.values(self._weights), **values}
