"""Predicts the time of all layers of a resolution from its rows: the cost that ``blocks="measured"`` minimises."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from fisedit_compile.compiler.lowered import Lowered
from fisedit_compile.cost_model.calibration import Calibration, calibrate
from fisedit_compile.cost_model.row_layers import LayerShape, RowLayer, row_layers
from fisedit_compile.ir.layout import Size


@dataclass(frozen=True)
class RowCosts:
    """Predicts the time of each resolution of a sparse step; a :data:`~fisedit_compile.planning.apsc.CostModel`.

    Attributes:
        layers: the layers of the sparse step.
        calibration: predicts the time of one layer, on the device that the U-Net runs on.
    """

    layers: tuple[RowLayer, ...]
    calibration: Calibration

    @classmethod
    def of(cls, lowered: Lowered) -> RowCosts:
        """The costs of a U-Net on the device of its weights; layers that were not timed there yet are timed now.

        Raises:
            ValueError: the U-Net is on the meta device.
        """
        layers = tuple(row_layers(lowered))
        sample = lowered.dense.graph.find_nodes(op="placeholder")[0].meta["val"]
        return cls(layers, calibrate(layers, sample.device, sample.dtype))

    @cached_property
    def sizes(self) -> list[Size]:
        """The resolutions that have layers, the largest first."""
        return sorted({layer.size for layer in self.layers}, reverse=True)

    def __call__(self, size: Size, rows: int, halo: int) -> float:
        """The predicted microseconds of all layers of a resolution together.

        Args:
            size: the resolution (height, width).
            rows: the number of rows computed there, all samples together.
            halo: the number of halo rows that each convolution reads of it.
        """
        shapes, channels = self.work(size)
        computed = sum(n * self.calibration.microseconds(shape, rows) for shape, n in shapes.items())
        return computed + self.calibration.fetch_microseconds(channels, halo)

    def work(self, size: Size) -> tuple[Counter[LayerShape], int]:
        """How many layers of each shape compute rows of a resolution, and how many channels its halo has.

        The channels are summed over all convolutions that read halo rows of this resolution.
        """
        return self._work.get(size, (Counter(), 0))

    @cached_property
    def _work(self) -> dict[Size, tuple[Counter[LayerShape], int]]:
        halos: Counter[Size] = Counter()
        for layer in self.layers:
            if layer.halo is not None:
                halos[layer.halo] += layer.shape.channels
        shapes = {size: Counter(layer.shape for layer in self.layers if layer.size == size) for size in self.sizes}
        return {size: (shapes[size], halos[size]) for size in self.sizes}
