"""The options of ``fisedit-compile bench unet``: what it measures and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: What ``--baseline`` takes: the dense U-Net as it is (eager), and under torch.compile in each of these modes.
BASELINES = ("eager", "compile", "reduce-overhead", "max-autotune-no-cudagraphs")

#: The edit sizes of ``--curve``, as shares of the picture: from almost nothing to everything.
CURVE = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Settings:
    """Options of the benchmark.

    Attributes:
        arch: a name in :data:`fisedit_compile.architectures.ARCHITECTURES`.
        size: side of the square image, in pixels.
        batch: samples of the U-Net's batch for one edit; one picture under guidance takes 2.
        baselines: the dense calls to compare with, from :data:`BASELINES`.
        attentions: the modes of self-attention to measure, ``"full"`` and ``"masked"``.
        compile_sparse: whether the sparse graphs are lowered through torch.compile.
        edits: how many edits share one batch in a further measurement; fewer than 2 skips it.
        repeats: how many samples are taken of each time.
        mask_repeats: how many samples are taken with each mask of a file, which may have many masks.
        warmup: how many rounds come before the samples.
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
