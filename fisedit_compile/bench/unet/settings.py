"""What ``fisedit-compile bench unet`` measures and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Choices of ``--baseline``: the dense U-Net as it is, and under torch.compile in each of its modes.
BASELINES = ("eager", "compile", "reduce-overhead", "max-autotune-no-cudagraphs")

#: Shares of the picture from almost nothing to everything.
CURVE = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Settings:
    """Options of the benchmark.

    Attributes:
        arch: a name in :data:`fisedit_compile.architectures.ARCHITECTURES`.
        size: of the square image, in pixels.
        batch: of the U-Net for one edit; 2 is one picture with guidance.
        baselines: of :data:`BASELINES`.
        attentions: modes of self-attention.
        compile_sparse: lower the sparse graphs through torch.compile.
        edits: how many edits share one batch; fewer than 2 leaves that out.
        repeats: samples of each time.
        mask_repeats: of each time of a mask from a file, of which there may be many.
        warmup: rounds before them.
    """

    arch: str
    size: int
    batch: int
    baselines: Sequence[str]
    attentions: Sequence[str]
    compile_sparse: bool
    edits: int
    repeats: int
    mask_repeats: int
    warmup: int
