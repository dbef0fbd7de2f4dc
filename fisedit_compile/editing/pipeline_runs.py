"""What happens at each U-Net call and at the end of each step while a pipeline records a base or makes an edit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.config import SparsityConfig
from fisedit_compile.editing.base import Base, RecordedCall
from fisedit_compile.editing.prompt_alignment import align_prompts
from fisedit_compile.errors import BaseMismatchError, CaptureError, MaskError
from fisedit_compile.ir.call import Call
from fisedit_compile.masks.difference_mask import difference_mask
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.runtime.timer import UNetTimer
from fisedit_compile.sparse_unet import SparseUNet

#: t1 and t2 of the difference formula: the steps whose latents are compared (paper 3.1: within [1, 10]).
DIFFERENCE_STEPS = (1, 10)


class PipelineRun:
    """The part that recording and editing share: it counts steps and U-Net calls and keeps the latents."""

    def __init__(self, unet: SparseUNet, pipe: Any) -> None:
        self.unet, self.pipe = unet, pipe
        self.timer = UNetTimer()
        self.latents: list[Tensor] = []
        self.user_callback: Callable[..., dict[str, Any]] | None = None
        self.calls_made = 0

    @property
    def step(self) -> int:
        """The denoising step that is being computed."""
        return len(self.latents)

    def unet_call(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the U-Net's ``forward``."""
        out = self.predict(self.unet.call(*args, **kwargs))
        self.calls_made += 1
        if kwargs.get("return_dict", True):
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            return UNet2DConditionOutput(sample=out)
        return (out,)

    def step_end(self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's ``callback_on_step_end``: the user's own first, then ours."""
        changed = (self.user_callback(pipe, index, timestep, values) if self.user_callback else None) or {}
        latents = self.finish_step(changed.get("latents", values["latents"]))
        self.latents.append(latents.clone())
        return {**changed, "latents": latents}

    def predict(self, call: Call) -> Tensor:
        raise NotImplementedError

    def finish_step(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def finish(self) -> None:
        """Called when the pipeline has returned."""

    def samples(self, call: Call) -> int:
        """Pictures in the batch: half of the U-Net's under classifier-free guidance."""
        batch = call.signature.sample_shape[0]
        return batch // 2 if self.pipe.do_classifier_free_guidance else batch


class RecordRun(PipelineRun):
    """Generates a base: every call dense, with what edits read kept from it."""

    def __init__(self, unet: SparseUNet, pipe: Any, config: SparsityConfig) -> None:
        super().__init__(unet, pipe)
        self.calls: list[RecordedCall] = []
        self._config = config
        self._steps = self._dense_steps = self._controlled_steps = 0
        self.timesteps = torch.empty(0)

    def predict(self, call: Call) -> Tensor:
        if not self.calls:
            # Of the loop itself: Heun's scheduler makes two steps of one, a picture to start from saves some.
            self._steps = getattr(self.pipe, "num_timesteps", None) or len(self.pipe.scheduler.timesteps)
            self._dense_steps = self._config.count_dense_steps(self._steps)
            self._controlled_steps = min(self._dense_steps, round(self._config.cross_replace * self._steps))
        sparse, controlled = self.step >= self._dense_steps, self.step < self._controlled_steps
        kept: dict[Any, Tensor] = {}

        def record() -> Tensor:
            nonlocal kept
            out, kept = self.unet.record(  # type: ignore[assignment]
                call, samples=self.samples(call), activations=sparse, attention=controlled
            )
            return out

        out = self.timer.time("record", call.tensors[0].device, record)
        self.calls.append(RecordedCall(self.step, kept))
        return out

    def finish_step(self, latents: Tensor) -> Tensor:
        return latents

    def finish(self) -> None:
        if len(self.latents) != self._steps:
            raise CaptureError(
                f"{type(self.pipe).__name__} made {len(self.latents)} of {self._steps} steps: a base needs all of them"
            )
        self.timesteps = self.pipe.scheduler.timesteps.clone()


class EditRun(PipelineRun):
    """Edits a base: k dense steps under Prompt-to-Prompt control, the mask, then sparse steps."""

    mask: Tensor  # bool [n, h, w], known after the dense steps

    def __init__(
        self, unet: SparseUNet, pipe: Any, base: Base, prompts: tuple[str, ...], given: Tensor | None, combine: str
    ) -> None:
        super().__init__(unet, pipe)
        self._base, self._given, self._combine = base, given, combine
        self._prepared: Prepared | None = None
        self._first_call: Call | None = None
        self.plan_ms = 0.0
        mapper, keep = align_prompts(pipe, base.prompts, prompts, arguments=base.arguments, device=base.latents.device)
        copies = len(base.latents) // len(prompts)  # num_images_per_prompt: the pipeline repeats each prompt
        self._mapper, self._keep = mapper.repeat_interleave(copies, 0), keep.repeat_interleave(copies, 0)
        if base.dense_steps == 0:
            assert given is not None
            self.mask = given

    def predict(self, call: Call) -> Tensor:
        if self._first_call is None:
            self._check_schedule()
            self._first_call = call
        if self.calls_made >= len(self._base.calls):
            raise BaseMismatchError("the pipeline calls its U-Net more often than for the base: use the same arguments")
        recorded = self._base.calls[self.calls_made]
        device = call.tensors[0].device
        if self.step >= self._base.dense_steps:
            if self._prepared is None:
                start = time.perf_counter()
                self._prepared = self.unet.plan(call, self.mask)
                self.plan_ms = (time.perf_counter() - start) * 1e3
            prepared = self._prepared
            return self.timer.time("sparse", device, lambda: self.unet.step(call, recorded.cache, prepared))
        if recorded.cache:
            controlled = self.unet.controlled
            return self.timer.time("dense", device, lambda: controlled(call, recorded.cache, self._mapper, self._keep))
        return self.timer.time("dense", device, lambda: self.unet.dense(call))

    def finish_step(self, latents: Tensor) -> Tensor:
        step, dense = self.step, self._base.dense_steps
        if step == dense - 1:
            self.mask = self._decide_mask([*self.latents, latents])
        if step < dense - 1:
            return latents
        # Outside the mask the picture is the base's, bit for bit, whatever the scheduler remembers of other steps.
        return torch.where(self.mask[:, None], latents, self._base.step_latents[step])

    @property
    def ran_dense(self) -> bool:
        """Whether the mask was so large that the steps behind it ran dense."""
        return self._prepared is not None and self._prepared.dense

    def macs(self) -> dict[str, float]:
        """Multiply-accumulates of a dense and a sparse call of this edit, and their ratio."""
        assert self._first_call is not None
        assert self._prepared is not None
        from fisedit_compile.macs.counter import MacCounter  # takes fvcore and diffusers, which an edit has no use for

        counter = MacCounter(self.unet.program(self._first_call).lowered, check=False)
        dense = counter.dense.total
        sparse = dense if self.ran_dense else counter.step(self._prepared.plan).total
        return {"dense_step": dense, "sparse_step": sparse, "ratio": dense / max(sparse, 1)}

    def _decide_mask(self, latents: list[Tensor]) -> Tensor:
        if self._given is not None and self._combine == "replace":
            return self._given
        first, last = DIFFERENCE_STEPS[0] - 1, min(DIFFERENCE_STEPS[1], len(latents))
        base, edit = (torch.stack(list(each[first:last])) for each in (self._base.step_latents, latents))
        found = difference_mask(base, edit)
        if self._given is None:
            return found
        mask = found & self._given if self._combine == "and" else found | self._given
        if not mask.flatten(1).any(dim=1).all():
            raise MaskError("the mask that was found and the one given do not meet: give a larger one, or combine='or'")
        return mask

    def _check_schedule(self) -> None:
        timesteps = self.pipe.scheduler.timesteps
        if timesteps.shape != self._base.timesteps.shape or not torch.equal(timesteps, self._base.timesteps):
            raise BaseMismatchError(
                f"the scheduler's {len(timesteps)} timesteps are not the base's {len(self._base.timesteps)}: "
                "generate the base again with this scheduler"
            )
