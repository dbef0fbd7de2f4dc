"""Times the sparse decodes of edits by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fisedit_compile.bench.edit.timer import Timer
from fisedit_compile.bench.masks import MaskSet
from fisedit_compile.bench.progress import say
from fisedit_compile.editing.background import PixelBackground
from fisedit_compile.editing.base import Base
from fisedit_compile.errors import CaptureError
from fisedit_compile.masks.grown import grown
from fisedit_compile.runtime.model_watch import ModelWatch
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.vae.sparse_decoder import SparseDecoder


class Decodes:
    """Times sparse decodes by themselves, of noise under masks in the latents of a base.

    Args:
        pipe: the pipeline that the base is of.
        base: keeps what a sparse decode reads.
        timer: of the benchmark.
    """

    def __init__(self, pipe: Any, base: Base, timer: Timer) -> None:
        self._decoder, self._watch = SparseDecoder(pipe.vae), ModelWatch(pipe.vae)
        self._cells = PixelBackground.of(pipe, base.pictures, base.latents, base.arguments).cells(base.latents)
        self._base, self._timer = base.decoded, timer

    def milliseconds(self, masks: MaskSet) -> dict[str, float | None]:
        """From latents to pictures: ``decode_ms``, and ``planned_decode_ms`` where the region was planned before.

        An edit plans it while the device computes its last steps. Both are None where it would decode all pixels.
        """
        none: dict[str, float | None] = {"decode_ms": None, "planned_decode_ms": None}
        if self._base is None:
            return none
        then = self._base.latents
        changed = [(torch.where(mask.to(then.device), torch.randn_like(then), then), mask) for mask in masks.masks]
        try:
            whole = [partial(self._decode, *each) for each in changed]
            planned = [partial(self._planned, latents, self._plan(latents, mask)) for latents, mask in changed]
            return {
                "decode_ms": self._mean("the sparse decoder", whole),
                "planned_decode_ms": self._mean("the sparse decoder behind its plan", planned),
            }
        except CaptureError as error:
            say(f"not sparse: {error}")
            return none

    def _mean(self, label: str, runs: Sequence[Callable[[], object]]) -> float:
        return self._timer.milliseconds(label, lambda: [run() for run in runs]) / len(runs)

    def _decode(self, latents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self._planned(latents, self._plan(latents, mask))

    def _plan(self, latents: torch.Tensor, mask: torch.Tensor) -> Prepared:
        assert self._base is not None
        region = grown(mask.expand(len(latents), *mask.shape[-2:]), self._cells)
        return self._decoder.prepare(latents, self._base, self._watch.look(values=False), region)

    def _planned(self, latents: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        assert self._base is not None
        return self._decoder.decode(latents, self._base, prepared)
