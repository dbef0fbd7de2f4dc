"""What a base keeps of its decoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fisedit_compile.cache.step_cache import Recorded


@dataclass(frozen=True, eq=False)
class Decoded:
    """A dense decode: what its latents were, and what sparse decodes of others read.

    Attributes:
        latents: as the decoder was given them, ``[n, c, h, w]``.
        cache: the statistics of the group norms behind the first upsampling, and the picture, a row a pixel.
    """

    latents: Tensor
    cache: Recorded

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.latents.nbytes + sum(tensor.nbytes for tensor in self.cache.values())
