"""FID of two sets of pictures whose features are known: how far apart two normal distributions fitted to them lie.

Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017. Theirs
are features of Inception; with others the figure compares with itself alone. Few pictures give a larger one, so only
sets of equal sizes compare.
"""

from __future__ import annotations

from torch import Tensor, nn


class _Features(nn.Identity):
    """Stands where torchmetrics has a network: what it is given are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width


def frechet_distance(first: Tensor, second: Tensor) -> float | None:
    """The distance of two sets of features ``[n, d]`` and ``[m, d]``; None for fewer than two of either."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(first), len(second)) < 2:
        return None
    metric = FrechetInceptionDistance(_Features(first.shape[1]))
    metric.update(first.double(), real=True)
    metric.update(second.double(), real=False)
    return float(metric.compute())
