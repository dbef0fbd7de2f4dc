"""Multiply-accumulates of an edit's steps, counted when somebody asks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fisedit_compile.compiler.lowered import Lowered
from fisedit_compile.cost_model.row_costs import RowCosts
from fisedit_compile.errors import FiseditError


class StepMacs:
    """What is needed to count the steps of one edit. It keeps no weight and no cache alive, and pickles its result.

    Args:
        lowered: the graphs that the edit ran.
        mask: what was recomputed of the edit's samples, bool ``[n, h, w]``.
        dense: the steps behind the mask ran the dense U-Net.
        share: of the edit's samples in the batch that the graphs are for.

    Attributes:
        counted: the result of :meth:`count`; None before.
    """

    def __init__(self, lowered: Lowered, mask: Tensor, *, dense: bool, share: float = 1.0) -> None:
        self.counted: dict[str, float] | None = None
        self._lowered: Lowered | None = lowered
        self._mask, self._dense, self._share = mask.cpu(), dense, share

    def count(self) -> dict[str, float]:
        """Of a dense and a sparse call (``"dense_step"``, ``"sparse_step"``), and their ratio.

        Raises:
            FiseditError: it was pickled or copied before.
        """
        if self.counted is None:
            lowered = self._lowered
            if lowered is None:
                raise FiseditError(
                    "the multiply-accumulates of this edit were not counted before its report was pickled or copied: "
                    "read report.macs before"
                )
            from fisedit_compile.macs.counter import MacCounter  # takes fvcore, which an edit has no use for

            costs = RowCosts.of(lowered) if lowered.config.blocks == "measured" else None
            counter = MacCounter(lowered, check=False)
            dense = counter.dense.total * self._share
            # A batch of samples that are all edited like these; one by one, where it is no multiple of them.
            masks = self._mask.split(1) if lowered.batch % len(self._mask) else [self._mask]
            steps = [] if self._dense else [counter.step(lowered.plan(mask, costs=costs)).total for mask in masks]
            sparse = self._share * sum(steps) / len(steps) if steps else dense
            self.counted = {"dense_step": dense, "sparse_step": sparse, "ratio": dense / max(sparse, 1)}
        return self.counted

    def __getstate__(self) -> dict[str, Any]:
        return {"counted": self.counted, "_lowered": None}
