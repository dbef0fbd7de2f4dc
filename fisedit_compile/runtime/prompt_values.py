"""The values of a stage ``prompt``, computed anew where the embedded text is another one."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fisedit_compile.runtime.constants import Constants
from fisedit_compile.runtime.stage import Stage


@dataclass
class PromptValues:
    """What a stage ``prompt`` gave last, and for which tensors and weights.

    Attributes:
        values: by request; another dict for another prompt.
    """

    values: dict[Any, Tensor] = field(default_factory=dict)
    _inputs: tuple[Tensor, ...] = ()
    _versions: tuple[int, ...] = ()

    def refresh(self, stage: Stage, inputs: Mapping[Any, Tensor], constants: Constants) -> dict[Any, Tensor]:
        """Run the stage where its inputs are other tensors than last time, or these or the weights were written to.

        Args:
            stage: the stage.
            inputs: of the U-Net, by name.
            constants: what the stage reads besides, which know whether the weights are the same.
        """
        given = tuple(inputs[name] for name in stage.names if name in inputs)
        written = (0 if tensor.is_inference() else tensor._version for tensor in given)
        versions = (constants.version, *written)
        same = len(given) == len(self._inputs) and all(map(operator.is_, given, self._inputs))
        if not same or versions != self._versions or not self.values:
            self.values = stage.values({**inputs, **constants.values})
            self._inputs, self._versions = given, versions
        return self.values
