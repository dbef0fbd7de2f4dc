"""What a user may choose, in one frozen dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

AttentionMode = Literal["full", "masked"]
BlockMode = Literal["pixel", "paper", "measured"]


@dataclass(frozen=True)
class SparsityConfig:
    """Options of :func:`fisedit_compile.sparsify` and :class:`fisedit_compile.Editor`.

    Args:
        attention: which keys an active token's self-attention sees. ``"full"``: every token, cached keys and values
            outside the mask; an unchanged input then reproduces the base. ``"masked"``: the active tokens of its own
            sample alone (paper A.3); less work and no cached keys.
        dense_below: at resolutions whose shorter side, in latent cells, is below this every pixel is computed, and
            group norms use their own statistics: the U-Net's deep levels stay dense (paper 3.1).
        dense_above: share of the latents above which the steps of an edit run the dense U-Net instead, as it was given,
            compiled or not, and restore the base outside the mask; a warning and the edit's report say so.
        blocks: ``"pixel"`` recomputes exactly the active pixels; ``"paper"`` the union of the APSC blocks that the
            printed objective chooses (paper A.1); ``"measured"`` whichever of these, of the paper's other blocks and of
            all pixels is predicted to take the least time, from a short measurement of the U-Net's layers on first use.
            The rows are read through a table and gain nothing from lying in blocks, so ``"pixel"``, which has the
            fewest, is the default; ``fisedit-compile blocks`` says whether another choice is faster on a device.
        dense_steps: denoising steps that an edit runs dense before its mask is known (the paper's k). An ``int``
            counts steps, a ``float`` in [0, 1) is a share of all steps, rounded up. With 0 an edit must bring a mask.
        cross_replace: share of all steps, from the first, in which the dense steps take the cross-attention maps of
            unchanged words from the base (Prompt-to-Prompt, paper 3.1). 0 turns the control off.
        compile: lower the graphs through ``torch.compile``; off, they run eagerly.
    """

    attention: AttentionMode = "full"
    dense_below: int = 16
    dense_above: float = 1.0
    blocks: BlockMode = "pixel"
    dense_steps: int | float = 0.2
    cross_replace: float = 0.8
    compile: bool = False

    def __post_init__(self) -> None:
        if self.attention not in ("full", "masked"):
            raise ValueError(f"attention={self.attention!r}: choose 'full' or 'masked'")
        if self.blocks not in ("pixel", "paper", "measured"):
            raise ValueError(f"blocks={self.blocks!r}: choose 'pixel', 'paper' or 'measured'")
        if not isinstance(self.compile, bool):
            raise ValueError(f"compile={self.compile!r}: True or False")
        if not _is_number(self.dense_below, int) or self.dense_below < 1:
            raise ValueError(f"dense_below={self.dense_below!r}: give a number of latent cells, at least 1")
        if not _is_number(self.dense_above, int | float) or not 0 < self.dense_above <= 1:
            raise ValueError(f"dense_above={self.dense_above!r}: a share of the latents in (0, 1]")
        if not _is_number(self.dense_steps, int | float):
            raise ValueError(f"dense_steps={self.dense_steps!r}: give a count (int) or a share of the steps (float)")
        if self.dense_steps < 0 or (isinstance(self.dense_steps, float) and not self.dense_steps < 1):
            raise ValueError(f"dense_steps={self.dense_steps!r}: an int >= 0, or a float in [0, 1)")
        if not _is_number(self.cross_replace, int | float) or not 0 <= self.cross_replace <= 1:
            raise ValueError(f"cross_replace={self.cross_replace!r}: a share of the steps in [0, 1]")

    @classmethod
    def of(cls, config: SparsityConfig | dict[str, Any] | None) -> SparsityConfig:
        """A config from a config, a dict of its fields, or nothing.

        Raises:
            ValueError: an unknown field, or a value that a field does not take.
        """
        if config is None:
            return cls()
        if isinstance(config, cls):
            return config
        if not isinstance(config, dict):
            raise ValueError(f"config is a {type(config).__name__}: give a SparsityConfig or a dict of its fields")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(config) - known):
            raise ValueError(f"unknown config field(s) {', '.join(unknown)}: known are {', '.join(sorted(known))}")
        return cls(**config)

    def is_whole(self, size: tuple[int, int]) -> bool:
        """Whether all pixels of a resolution (height, width) are computed, whatever the mask."""
        return min(size) < self.dense_below

    def count_dense_steps(self, steps: int) -> int:
        """How many of ``steps`` denoising steps run dense; at least one unless ``dense_steps`` is 0."""
        if isinstance(self.dense_steps, int):
            return min(self.dense_steps, steps)
        return min(-int(-self.dense_steps * steps // 1), steps)


def _is_number(value: object, kind: Any) -> bool:
    """Whether ``value`` is of ``kind``; True and False are no numbers here."""
    return isinstance(value, kind) and not isinstance(value, bool)
