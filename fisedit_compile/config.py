"""The options of a user: what is made sparse and how, and how an edit runs."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

AttentionMode = Literal["full", "masked"]
BlockMode = Literal["pixel", "paper", "measured"]
CacheMode = Literal["auto", "exact", "balanced", "small"]
Tier = Literal["auto", "device", "host"]


#: A value of ``dense_below`` with which every resolution is computed whole: the dense U-Net, by operations on rows.
EVERY_RESOLUTION = sys.maxsize

#: What an edit does to the words of its base: it only adds some, only takes some away, or does both.
WordChange = Literal["adds", "replaces", "removes"]

#: Share of the steps under control with ``cross_replace="auto"`` (docs/measurements/quality.md).
CONTROLLED: dict[WordChange, float] = {"adds": 0.2, "replaces": 0.5, "removes": 0.8}


def is_whole(size: tuple[int, int], dense_below: int) -> bool:
    """Whether every pixel of a resolution (height, width) is computed, whatever the mask: see ``SparsityConfig``."""
    return min(size) < dense_below


@dataclass(frozen=True)
class Packing:
    """How a base keeps maps in few bits a value; see :mod:`fisedit_compile.kernels.indexing.row_format`.

    Attributes:
        map_bits: of maps of which a step reads rows around the mask.
        key_bits: of keys and values, which it reads whole.
        tiles: keep the mean of two by two keys, and of two by two values.
    """

    map_bits: int
    key_bits: int
    tiles: bool


@dataclass(frozen=True)
class SparsityConfig:
    """Options of :func:`fisedit_compile.sparsify` and :class:`fisedit_compile.Editor`.

    Args:
        attention: which keys an active token's self-attention sees. With ``"full"`` those of every token, outside the
            mask the base's cached keys and values; an unchanged input then reproduces the base. With ``"masked"`` only
            those of the active tokens of its own sample (paper A.3), which is less work and caches no keys.
        dense_below: the shorter side, in latent cells, below which a resolution is computed whole: there every pixel is
            computed and group norms use their own statistics. So the U-Net's deep levels stay dense (paper 3.1).
        dense_above: share of the latents, in (0, 1]. An edit whose mask covers more runs its steps through the dense
            U-Net as it was given, compiled or not, and restores the base outside the mask; a warning and the edit's
            report say so. Sparse steps would save little, and read values of the base that are another picture's where
            most of it changes (docs/measurements/quality.md). 1 is always sparse.
        blocks: which pixels around a mask are recomputed with it. ``"pixel"``: none, the active pixels alone.
            ``"paper"``: the union of the APSC blocks that the printed objective chooses (paper A.1). ``"measured"``:
            whichever of these two, the paper's other blocks and the whole map is predicted to take the least time; the
            prediction comes from timing the U-Net's layers for a moment on first use. Rows are read through a table and
            gain nothing from lying in blocks, so ``"pixel"``, which has the fewest, is the default;
            ``fisedit-compile blocks`` says whether another choice is faster on a device.
        dense_steps: how many denoising steps an edit runs dense before its mask is known (the paper's k). An ``int``
            counts steps, a ``float`` in [0, 1) is a share of all steps, rounded up. An edit that brings a mask runs
            none; with 0 every edit must bring one.
        cross_replace: share of all denoising steps, counted from the first, that take the cross-attention maps of
            unchanged words from the base (Prompt-to-Prompt, paper 3.1), dense and sparse alike; 0 turns that off.
            ``"auto"`` is 0.8 where words are removed, 0.5 where they are replaced, and 0.2 where words are only added,
            which longer control keeps out of the picture (docs/measurements/quality.md).
        stride: an edit visits every ``stride``-th step of its base and lets the scheduler make longer ones, which
            divides its time and the base's memory by about as much; 1 visits all. ``"auto"`` takes 3 from 45 steps on
            and 2 from 30 on where the scheduler can make longer steps, else 1. Dense and controlled steps are counted
            among those visited.
        cache: how a base keeps activations of the U-Net. ``"exact"`` as they are; ``"balanced"`` in four bits a value,
            which takes 0.28 of the memory in half precision; ``"small"`` in two bits, keys and values by the mean of
            two by two pixels in four, which takes 0.12. docs/measurements/cache.md says what that changes in pictures.
            ``"auto"`` is ``"balanced"`` on a GPU in half precision and ``"exact"`` elsewhere.
        tier: where bases lie. ``"device"``: where the U-Net runs. ``"host"``: in host memory, from which what a step
            reads comes back while the step before it runs. ``"auto"``: on the device, or in host memory if there is no
            room.
        compile: whether the graphs are lowered through ``torch.compile``; otherwise they run eagerly.
    """

    attention: AttentionMode = "full"
    dense_below: int = 16
    dense_above: float = 0.5
    blocks: BlockMode = "pixel"
    dense_steps: int | float = 0.1
    cross_replace: float | Literal["auto"] = "auto"
    stride: int | Literal["auto"] = "auto"
    cache: CacheMode = "auto"
    tier: Tier = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.attention not in ("full", "masked"):
            raise ValueError(f"attention={self.attention!r}: choose 'full' or 'masked'")
        if self.blocks not in ("pixel", "paper", "measured"):
            raise ValueError(f"blocks={self.blocks!r}: choose 'pixel', 'paper' or 'measured'")
        if self.cache not in ("auto", "exact", "balanced", "small"):
            raise ValueError(f"cache={self.cache!r}: choose 'auto', 'exact', 'balanced' or 'small'")
        if self.tier not in ("auto", "device", "host"):
            raise ValueError(f"tier={self.tier!r}: choose 'auto', 'device' or 'host'")
        if self.stride != "auto" and (not _is_number(self.stride, int) or self.stride < 1):
            raise ValueError(f"stride={self.stride!r}: 'auto', or a number of steps, at least 1")
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
        if self.cross_replace != "auto" and (
            not _is_number(self.cross_replace, int | float) or not 0 <= self.cross_replace <= 1
        ):
            raise ValueError(f"cross_replace={self.cross_replace!r}: 'auto', or a share of the steps in [0, 1]")

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
            nearest = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(
                f"unknown config field(s) {', '.join(unknown)}: known are {', '.join(sorted(known))}{hint}"
            )
        return cls(**config)

    def is_whole(self, size: tuple[int, int]) -> bool:
        """Whether every pixel of a resolution (height, width) is computed, whatever the mask."""
        return is_whole(size, self.dense_below)

    def count_dense_steps(self, steps: int) -> int:
        """How many of ``steps`` denoising steps run dense; at least one unless ``dense_steps`` is 0."""
        if isinstance(self.dense_steps, int):
            return min(self.dense_steps, steps)
        return min(-int(-self.dense_steps * steps // 1), steps)

    def count_controlled_steps(self, steps: int, change: WordChange | None = None) -> int:
        """How many of ``steps`` denoising steps run under Prompt-to-Prompt control.

        Args:
            steps: all that an edit makes.
            change: what the edit does to the words; None: whatever that is, at most.
        """
        if self.cross_replace != "auto":
            return round(self.cross_replace * steps)
        return round((max(CONTROLLED.values()) if change is None else CONTROLLED[change]) * steps)

    def packing(self, device: torch.device, dtype: torch.dtype) -> Packing | None:
        """How bases of a U-Net on ``device`` keep activations of ``dtype``; None: as they are."""
        mode = self.cache
        if mode == "auto":
            mode = "balanced" if device.type == "cuda" and dtype.itemsize == 2 else "exact"
        return {"exact": None, "balanced": Packing(4, 4, tiles=False), "small": Packing(2, 4, tiles=True)}[mode]


def _is_number(value: object, kind: Any) -> bool:
    """Whether ``value`` is an instance of ``kind``; True and False do not count as numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)
