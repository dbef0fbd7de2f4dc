"""FISEdit: this project's editor edits a picture that it generated, by new words and with a given mask.

Source: Yu et al., "Accelerating Text-to-image Editing via Cache-enabled Sparse Diffusion Inference", ML for Systems at
NeurIPS 2023. Generating the base with its cache comes first and is no part of an edit's time or count. Masks are given,
so that all steps are sparse; to find one takes some dense steps more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers import StableDiffusionPipeline

from baselines.method import CallCount, Method
from baselines.models import GUIDANCE, SOURCE, TARGET, Kit
from fisedit_compile import Base, Editor, SparsityConfig, sparsify
from fisedit_compile.architectures import build_unet, unet_inputs
from fisedit_compile.bench.masks import MaskSet
from fisedit_compile.editing.pipeline_call import UNetRoute
from fisedit_compile.macs.counter import MacCounter


class FISEdit(Method):
    """A row for one set of masks; a run edits the same base once with each mask."""

    source = "Yu et al. 2023; this project"
    edits_part = True

    def __init__(self, kit: Kit, masks: MaskSet, config: SparsityConfig) -> None:
        super().__init__(kit)
        square = masks.source == "square"
        share = f"{masks.edit_size:.0%}" if square else f"{len(masks.masks)} real masks, {masks.edit_size:.0%}"
        self.title = f"FISEdit, {share}"
        self.images = len(masks.masks)
        self._masks, self._config = masks, config
        self._routed = RoutedCalls()

    @property
    def unet(self) -> torch.nn.Module:
        return self._routed

    def prepare(self, steps: int) -> None:
        """Make the base and edits that are not timed, because graphs are built, compiled and captured on first use."""
        self.steps = steps
        editor, base = self._base_for(steps)
        # Compiled code and CUDA graphs may be new for each number of active pixels.
        each = self._config.compile or self.kit.device.type == "cuda"
        for mask in self._masks.masks if each else self._masks.masks[:1]:
            editor.edit(base, TARGET, mask=mask)

    def warm_up(self, steps: int) -> None:
        """Do nothing: :meth:`prepare` has warmed up, and a run of fewer steps would need another base."""

    def kind(self, index: int) -> str:
        return "sparse"

    def make(self) -> Any:
        editor, base = self._base_for(self.steps)
        with self._routed.of_all_pipelines():
            return [editor.edit(base, TARGET, mask=mask).image for mask in self._masks.masks][-1]

    def _base_for(self, steps: int) -> tuple[Editor, Base]:
        """The editor and its base of ``steps`` steps, which all rows share."""
        shared = self.kit.shared
        if shared.get("base of") != (steps, self._config):
            editor = Editor(self.kit.pipeline(StableDiffusionPipeline, self.kit.unet()), self._config)
            base = editor.generate(
                SOURCE,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                generator=self.kit.task.drawn_from(),
                height=self.kit.size,
                width=self.kit.size,
            )
            shared.update({"base of": (steps, self._config), "base": (editor, base)})
        editor_and_base: tuple[Editor, Base] = shared["base"]
        return editor_and_base

    def count(self, steps: int) -> list[CallCount]:
        """The calls of a run, counted from the graphs that an edit runs; nothing is run."""
        counted = self._counted()
        sparse, text = zip(*(counted.of(mask) for mask in self._masks.masks), strict=True)
        counts = [
            CallCount("batch 2, sparse", steps, steps * sum(sparse) // self.images),
            CallCount("text's keys and values, once an edit", 0, sum(text) // self.images),
        ]
        return [CallCount(each.kind, self.images * each.calls, self.images * each.macs) for each in counts if each.macs]

    def _counted(self) -> _CountedGraphs:
        """The counts of the graphs, which all rows share."""
        shared = self.kit.shared
        if "counted" not in shared:
            shared["counted"] = _CountedGraphs(self.kit, self._config)
        counted: _CountedGraphs = shared["counted"]
        return counted


class RoutedCalls(torch.nn.Module):
    """Takes the U-Net calls of an editor's pipelines, so that hooks on it see them as those on a U-Net would."""

    def forward(self, *args: Any, handler: Callable[..., Any], **kwargs: Any) -> Any:
        """What ``handler`` returns for the other arguments."""
        return handler(*args, **kwargs)

    @contextmanager
    def of_all_pipelines(self) -> Iterator[None]:
        """Within the context, calls of every pipeline copy that an editor makes pass through this module."""
        own = UNetRoute.forward

        def forward(route: UNetRoute, *args: Any, **kwargs: Any) -> Any:
            return self(*args, handler=partial(own, route), **kwargs)

        with patch.object(UNetRoute, "forward", forward):
            yield


class _CountedGraphs:
    """Multiply-accumulates of the graphs that an editor makes of a U-Net, on the meta device."""

    def __init__(self, kit: Kit, config: SparsityConfig) -> None:
        unet = build_unet(kit.arch, device="meta")
        args, kwargs = unet_inputs(unet, batch=2, height=kit.size, width=kit.size)
        sparse = sparsify(unet, config)
        call = sparse.call(*args, **kwargs)
        # Unchecked, because fvcore's count takes long and the tests compare the two.
        self._counter = MacCounter(sparse.program(call).lowered, check=False)

    def of(self, mask: torch.Tensor) -> tuple[int, int]:
        """The multiply-accumulates of one sparse step, and those that an edit does once for its words."""
        return self._counter.step(self._counter.plan(mask)).total, self._counter.prompt.total
