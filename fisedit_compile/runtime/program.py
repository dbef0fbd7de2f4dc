"""A lowered U-Net with its weights on a device, and how its graphs run: record, control, sparse step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.step_cache import CacheDescription, Recorded, StepCache
from fisedit_compile.compiler.lowered import Lowered
from fisedit_compile.cost_model.row_costs import RowCosts
from fisedit_compile.ir.call import Call, Signature
from fisedit_compile.ir.layout import inverse_permutation
from fisedit_compile.ir.requests import Weight
from fisedit_compile.planning.buckets import Bucket
from fisedit_compile.planning.edit_plan import EditPlan, follows
from fisedit_compile.runtime.constants import Constants
from fisedit_compile.runtime.control import Control, control_values
from fisedit_compile.runtime.dense_graphs import DenseGraphs
from fisedit_compile.runtime.model_state import Live, ModelState
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.runtime.stage import Stage
from fisedit_compile.runtime.static_step import Shared, StaticStep
from fisedit_compile.runtime.unpacked import unpacked
from fisedit_compile.runtime.whole_steps import WholeSteps, faster_as_rows

logger = logging.getLogger(__name__)

#: Dynamo compiles sizes of 0 and 1 apart from all others.
_FEWEST = 2


class Program:
    """A lowered U-Net with its weights on a device: it records bases, runs controlled dense calls, and sparse steps.

    On a CPU a sparse step has the sizes of its mask. On a GPU it has those of a bucket and is one CUDA graph, see
    :mod:`fisedit_compile.runtime.static_step`; in fp64, which Triton does not take, it runs as on a CPU.

    Args:
        lowered: the graphs, which programs of several U-Nets may share.
        weights: what the graphs read of the U-Net: its own parameters and buffers, which are read where they are.
        sample: a tensor of the dtype of the latents, on the device where the program runs.
        plan_on_device: make the plan of a mask where the program runs. By default it is made on the host, which needs
            the row counts anyway; a plan of a picture's pixels is too large for that.
    """

    def __init__(
        self, lowered: Lowered, weights: Mapping[Weight, Tensor], sample: Tensor, *, plan_on_device: bool = False
    ) -> None:
        self._id = object()
        self.lowered = lowered
        self.config = lowered.config
        self.signature: Signature = lowered.signature
        self.cache = CacheDescription(lowered.kept.stored_specs)
        self._device = sample.device
        self._plan_on = self._device if plan_on_device else torch.device("cpu")
        self._stages = {
            # The fetch is a list of gathers with nothing to fuse, and its sizes differ from mask to mask.
            name: Stage(graph, compiled=self.config.compile and name != "fetch")
            for name, graph in lowered.stages.items()
        }
        self._like = sample.new_empty(0)
        self.fixed_sizes = self._device.type == "cuda" and sample.dtype is not torch.float64
        self.dense_as_rows = faster_as_rows(sample)
        self.weights = weights
        self._live: Live | None = None  # how the weights lie now
        self._constants = Constants(weights)
        self._constants.add(self._stages["constant"])
        self._refreshed_by: Program | None = None  # the one that the constants belong to, where that is another one
        self._static: dict[Bucket, StaticStep] = {}

    @cached_property
    def row_costs(self) -> RowCosts:
        """What rows are predicted to take on this device; measured on first use, once a process.

        Raises:
            ValueError: the U-Net is on the meta device.
        """
        return RowCosts.of(self.lowered)

    @property
    def captures(self) -> int:
        """How many CUDA graphs were captured: one for each bucket that a mask has met."""
        following = self.__dict__.get("_following")
        return self._shared.captures + (0 if following is None else following.captures)

    def owns(self, prepared: Prepared) -> bool:
        """Whether an edit was prepared by this program."""
        following = self.__dict__.get("_following")
        return prepared.program is self._id or (following is not None and following.owns(prepared))

    def follow(self, state: ModelState) -> None:
        """Run with the weights as they lie now; ``state`` is the one that the graphs were made for, or equals it."""
        assert state.live is not None
        if self._live is not None and self._live.addresses != state.live.addresses:
            self._dense.forget()
        self._live = state.live

    def record(
        self,
        call: Call,
        *,
        samples: int,
        activations: bool,
        attention: bool,
        part: int = -1,
        tokens: int | None = None,
    ) -> tuple[Tensor, Recorded]:
        """The dense U-Net's output, and what a base keeps of the call.

        Args:
            samples: pictures in the batch, which guidance makes parts of ``samples`` each of.
            activations: keep what sparse steps read.
            attention: keep the cross-attention maps.
            part: place of the conditional part in the U-Net's batch; -1 is the last.
            tokens: of how many tokens of the text these maps are, the first ones; None is all.
        """
        entries = (self.lowered.kept.cache_entries if activations else []) + (
            self.lowered.kept.attention_entries if attention else []
        )
        out, kept, piece = self._dense_calls().record(self._user_values(call), entries, samples, part, tokens)
        timesteps = tuple(None if each is None else each.clone() for each in self._known_timesteps(call))
        return out, Recorded(self.signature, timesteps, kept, piece)

    def controlled(self, call: Call, cache: StepCache, control: Control) -> Tensor:
        """The U-Net's output with the base's cross-attention maps of unchanged words."""
        return self._dense_calls().controlled(self._user_values(call), cache, control)

    def dense(self, call: Call) -> Tensor:
        """The U-Net's output by operations on rows; only where :attr:`dense_as_rows`."""
        self._refresh_constants()
        return self._whole.dense(self._user_values(call))

    def plan(self, mask: Tensor) -> EditPlan:
        """The plan of a mask, see :meth:`~fisedit_compile.compiler.lowered.Lowered.plan`."""
        costs = self.row_costs if self.config.blocks == "measured" else None
        return self.lowered.plan(mask.to(self._plan_on) if isinstance(mask, Tensor) else mask, costs=costs)

    def prepare(self, mask: Tensor) -> Prepared:
        """Plan an edit and bring what does not change from step to step into place.

        Args:
            mask: what to recompute, bool ``[n, h, w]`` at latent resolution; n divides the U-Net's batch.

        Raises:
            MaskError: not bool, not ``[n, h, w]``, another resolution than the latents, or n does not divide the batch.
        """
        with torch.inference_mode(False), torch.no_grad():  # what is made here is written to in later calls
            if isinstance(mask, Tensor) and mask.ndim == 3 and mask.numel() and self._is_followed(mask):
                assert self._following is not None
                return self._following._prepare(self._following.plan(mask))
            return self._prepare(self.plan(mask))

    def _is_followed(self, mask: Tensor) -> bool:
        """Whether statistics follow the edit of any of some masks."""
        known = self.lowered.follows and bool(follows(mask.to(self._plan_on)).any())
        return known and self._following is not None

    @cached_property
    def _following(self) -> Program | None:
        """The program of edits whose statistics follow them; it shares what depends on the weights alone."""
        if self.lowered.following is None:
            return None
        program = Program(self.lowered.following, self.weights, self._like)
        self._constants.add(program._stages["constant"])
        program._constants, program._refreshed_by = self._constants, self
        program.fixed_sizes = self.fixed_sizes
        if program.cache.shapes == self.cache.shapes:  # what is found to fit one of them fits both
            program.cache = self.cache
        return program

    def _prepare(self, plan: EditPlan) -> Prepared:
        share = float(plan.mask.float().mean()) if self.config.dense_above < 1 else 0.0  # may wait for a device
        if share > self.config.dense_above:
            logger.warning(
                "a mask of %.0f %% is over dense_above=%s: its steps run the dense U-Net",
                100 * share,
                self.config.dense_above,
            )
            return Prepared(self._id, self.lowered, plan.to(self._device), dense=True)
        self._refresh_constants()
        if self.fixed_sizes:
            bucket = self.lowered.buckets.choose(plan)
            return Prepared(self._id, self.lowered, plan, bucket=bucket, packed=self._static_step(bucket).pack(plan))
        plan = plan.to(self._device)
        values: dict[Any, Tensor] = {request: plan.tensor(request) for request in self.lowered.plan_requests}
        for request, halo in values.items():
            if request.kind == "halo" and len(halo) < _FEWEST:  # rows that no table refers to
                values[request] = torch.nn.functional.pad(halo, (0, _FEWEST - len(halo)))
        return Prepared(self._id, self.lowered, plan, values=values)

    def step(self, call: Call, cache: StepCache, prepared: Prepared, control: Control | None = None) -> Tensor:
        """One sparse step: the base's output with the active pixels computed anew, ``[B, C, H, W]``.

        Raises:
            BaseMismatchError: the cache is not of this U-Net, config, size or timestep, or has no attention maps for
                control.
        """
        if prepared.program is not self._id:
            assert self._following is not None
            return self._following.step(call, cache, prepared, control)
        self.cache.check(cache, self.signature, self._known_timesteps(call))
        inputs = self._user_values(call)
        prompt = prepared.prompt.refresh(self._stages["prompt"], inputs, self._constants)
        if static := self.static_step(prepared):
            assert prepared.packed is not None
            return static.run(inputs, cache, prepared.packed, prompt, control)
        entries, specs = self.lowered.kept.controlled_entries, self.lowered.control_specs
        controls = control_values(control, cache, entries, specs, self.lowered.batch)
        values = {**inputs, **self._constants.values, **prompt, **prepared.values, **cache, **controls}
        few = min(prepared.plan.counts.values()) < _FEWEST
        if self.lowered.kept.formats:
            values.update(unpacked(self.lowered, self._stages["step"].names, values))
        else:
            values.update(self._stages["fetch"].values(values))
        return self._stages["step"](values, eagerly=few)

    def static_step(self, prepared: Prepared) -> StaticStep | None:
        """What runs the steps of an edit at fixed sizes; None where they have the mask's own."""
        if prepared.program is not self._id:
            assert self._following is not None
            return self._following.static_step(prepared)
        return None if prepared.bucket is None else self._static_step(prepared.bucket)

    def restore_base(self, out: Tensor, cache: StepCache, prepared: Prepared) -> Tensor:
        """A dense call's output with the base's values outside the mask: what :meth:`step` returns, by other means."""
        if self.lowered.output is None:
            return out  # every sparse step computes the last operation anew for all pixels, too
        entry, layout = self.lowered.output
        self.cache.check(cache, self.signature, ())
        shape = [out.shape[dim] for dim in layout.order]
        base = cache[entry].view(shape).permute(inverse_permutation(layout.order))
        return torch.where(prepared.plan.active(layout.size)[:, None], out, base)

    def _refresh_constants(self) -> None:
        """Fold what depends on the weights alone; again when a weight was written to or moved."""
        if self._refreshed_by is not None:
            self._refreshed_by._refresh_constants()
            return
        assert self._live is not None
        if self._constants.follow(self._live):
            self._static.clear()
            self._dense.forget()
            if (following := self.__dict__.get("_following")) is not None:
                following._static.clear()

    def _dense_calls(self) -> WholeSteps | DenseGraphs:
        """What runs recorded and controlled calls; with constants as the weights are, where it reads any."""
        if self.dense_as_rows:
            self._refresh_constants()
        return self._dense

    @cached_property
    def _whole(self) -> WholeSteps:
        return WholeSteps(self.lowered, self._constants, self._shared)

    @cached_property
    def _dense(self) -> WholeSteps | DenseGraphs:
        return self._whole if self.dense_as_rows else DenseGraphs(self.lowered, self.weights, self._device)

    @cached_property
    def _shared(self) -> Shared:
        return Shared(self.lowered, self._device)

    def _static_step(self, bucket: Bucket) -> StaticStep:
        if bucket not in self._static:
            step = self._stages["step"]
            self._static[bucket] = StaticStep(step, self.lowered, bucket, self._constants.values, self._shared)
        return self._static[bucket]

    def _known_timesteps(self, call: Call) -> tuple[Tensor | None, ...]:
        """The call's timesteps, None where reading one would wait for a device."""
        timesteps = (call.tensors[i] for i in self.lowered.timesteps)
        return tuple(each if each.device.type == "cpu" else None for each in timesteps)

    def _user_values(self, call: Call) -> dict[Any, Tensor]:
        return dict(zip(self.lowered.inputs, call.tensors, strict=True))
