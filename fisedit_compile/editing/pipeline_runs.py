"""What happens at each U-Net call and at the end of each step while a pipeline records a base or makes an edit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.memory import require_room
from fisedit_compile.config import SparsityConfig
from fisedit_compile.editing.arguments import call_parameters
from fisedit_compile.editing.base import Base, RecordedCall
from fisedit_compile.editing.own_tokenizers import OwnTokenizers
from fisedit_compile.editing.pipeline_call import PipelineCall
from fisedit_compile.editing.prompt_alignment import align_prompts
from fisedit_compile.editing.prompt_tokens import check_text_length
from fisedit_compile.editing.schedule import Schedule, refuse_noise_of_its_own
from fisedit_compile.editing.step_callback import StepCallback
from fisedit_compile.editing.step_macs import StepMacs
from fisedit_compile.editing.stride import (
    SolverStep,
    StrideError,
    choose_stride,
    visit,
    visited_steps,
    watch_steps,
    why_not,
)
from fisedit_compile.errors import BaseMismatchError, CaptureError, MaskError
from fisedit_compile.ir.call import Call, Signature
from fisedit_compile.masks.difference_mask import difference_mask
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.runtime.timer import UNetTimer
from fisedit_compile.sparse_unet import SparseUNet

#: t1 and t2 of the difference formula: the steps whose latents are compared (paper 3.1: within [1, 10]).
DIFFERENCE_STEPS = (1, 10)


class PipelineRun:
    """The part that recording and editing share: it counts steps and U-Net calls and keeps the latents.

    Args:
        unet: the U-Net of the pipeline.
        pipe: the pipeline, which is left alone.
        tokenizers: of the editor.
        callback: the user's own, to be run before ours; None without one.

    Attributes:
        schedule: the scheduler, its timesteps set; known at the first U-Net call.
        latents: after each step so far.
    """

    schedule: Schedule

    def __init__(self, unet: SparseUNet, pipe: Any, tokenizers: OwnTokenizers, callback: StepCallback | None) -> None:
        self.unet, self.callback = unet, callback
        self.call = PipelineCall(pipe, self._unet_call, tokenizers)
        self._parameters = call_parameters(pipe)
        self.timer = UNetTimer()
        self.latents: list[Tensor] = []
        self.calls_made = 0

    @property
    def pipe(self) -> Any:
        """The pipeline that runs."""
        return self.call.pipe

    @property
    def step(self) -> int:
        """The denoising step that is being computed."""
        return len(self.latents)

    def run(self, **arguments: Any) -> Any:
        """What the pipeline returns for ``arguments``.

        Raises:
            PipelineInterruptedError: ``_interrupt`` was set before the last step had ended.
        """
        names = ["latents", *(self.callback.tensor_inputs if self.callback else ())]
        output = self.call(
            **arguments,
            callback_on_step_end=self._step_end,
            callback_on_step_end_tensor_inputs=list(dict.fromkeys(names)),
        )
        self.finish()
        return output

    def begin(self, call: Call) -> None:
        """Called at the first U-Net call, before anything is computed for it."""
        raise NotImplementedError

    def predict(self, call: Call) -> Tensor:
        """The noise prediction of a U-Net call."""
        raise NotImplementedError

    def finish_step(self, latents: Tensor) -> Tensor:
        """The latents that the next step starts from."""
        raise NotImplementedError

    def finish(self) -> None:
        """Called when the pipeline has returned."""
        raise NotImplementedError

    def parts(self, call: Call) -> tuple[int, int]:
        """How many pictures are in the batch, which guidance makes several parts of, and which part is conditional.

        Raises:
            CaptureError: the batch does not consist of as many parts.
        """
        batch = call.signature.sample_shape[0]
        if not getattr(self.pipe, "do_classifier_free_guidance", False):
            parts, conditional = 1, -1
        elif "image_guidance_scale" in self._parameters:  # InstructPix2Pix: text and image, image alone, neither
            parts, conditional = 3, 0
        else:
            parts, conditional = 2, -1
        if batch % parts:
            raise CaptureError(
                f"{type(self.pipe).__name__} calls its U-Net with a batch of {batch}, which is not the {parts} parts "
                "of its guidance: an editor knows no other guidance"
            )
        return batch // parts, conditional

    def _unet_call(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the U-Net's ``forward``."""
        self.call.raise_if_interrupted()
        call = self.unet.call(*args, **kwargs)
        if not self.calls_made:
            self.schedule = Schedule.of(self.pipe.scheduler)
            self.begin(call)
        out = self.predict(call)
        self.calls_made += 1
        if kwargs.get("return_dict", True):
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            return UNet2DConditionOutput(sample=out)
        return (out,)

    def _step_end(self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's ``callback_on_step_end``: the user's own first, then ours."""
        changed = {}
        if self.callback:
            changed = self.callback(self.call, index, timestep, values)
            try:
                self.unet.look_again()
            except BaseMismatchError as error:
                raise BaseMismatchError(f"after {self.callback.name}: {error}") from error
        self.call.raise_if_interrupted()
        latents = self.finish_step(changed.get("latents", values["latents"]))
        self.latents.append(latents.clone())
        return {**changed, "latents": latents}


class RecordRun(PipelineRun):
    """Generates a base: every call dense, with what edits read kept from it."""

    def __init__(
        self,
        unet: SparseUNet,
        pipe: Any,
        tokenizers: OwnTokenizers,
        callback: StepCallback | None,
        config: SparsityConfig,
        arguments: Mapping[str, Any],
    ) -> None:
        super().__init__(unet, pipe, tokenizers, callback)
        self.calls: list[RecordedCall] = []
        self.visits: tuple[int, ...] = ()
        self._config, self._arguments = config, arguments
        self._steps = self._dense_visits = self._controlled_visits = 0
        self._solver_steps: list[SolverStep] = []

    def begin(self, call: Call) -> None:
        scheduler = self.pipe.scheduler
        # Of the loop itself: Heun's scheduler makes two steps of one, a picture to start from saves some.
        self._steps = getattr(self.pipe, "num_timesteps", None) or len(self.schedule.timesteps)
        reason = why_not(scheduler, loop_steps=self._steps, arguments=self._arguments)
        if self.callback and self.callback.official:
            reason = reason or f"{self.callback.name} may change the loop at a step that an edit would not visit"
        stride = choose_stride(self._config.stride, self._steps, reason)
        self.visits = visited_steps(self._steps, stride)
        self._dense_visits = self._config.count_dense_steps(len(self.visits))
        self._controlled_visits = min(self._dense_visits, round(self._config.cross_replace * len(self.visits)))
        if self._controlled_visits:
            check_text_length(self.pipe, call.kwargs["encoder_hidden_states"].shape[1])
        self._require_room(call, can_stride=not reason)
        if stride > 1 and self._dense_visits:
            self._solver_steps = watch_steps(scheduler)
        refuse_noise_of_its_own(scheduler)

    @property
    def solver_steps(self) -> tuple[SolverStep, ...]:
        """What the scheduler was given at the visited dense steps; empty where edits visit all steps."""
        visited = self.visits[: self._dense_visits] if self._solver_steps else ()
        return tuple(self._solver_steps[step] for step in visited)

    def predict(self, call: Call) -> Tensor:
        visit = self.visits.index(self.step) if self.step in self.visits else None

        samples, part = self.parts(call)

        def record() -> Tensor:
            if visit is None:
                return self.unet.dense(call)
            sparse, controlled = visit >= self._dense_visits, visit < self._controlled_visits
            out, kept = self.unet.record(call, samples=samples, part=part, activations=sparse, attention=controlled)
            self.calls.append(RecordedCall(self.step, kept))
            return out

        return self.timer.time("record", call.tensors[0].device, record)

    def finish_step(self, latents: Tensor) -> Tensor:
        if self.callback_changes and len(self.visits) < self._steps:
            raise ValueError(
                f"the callback {self.callback_changes}, runs at all {self._steps} steps here and at the "
                f"{len(self.visits)} that an edit visits there, which is not the same: Editor(pipe, {{'stride': 1}})"
            )
        return latents

    def finish(self) -> None:
        if len(self.latents) != self._steps:
            raise CaptureError(
                f"{type(self.pipe).__name__} made {len(self.latents)} of {self._steps} steps: a base needs all of them"
            )

    @property
    def callback_changes(self) -> str:
        """The name of the user's callback and what it changed; empty if nothing."""
        if self.callback is None or not self.callback.changed:
            return ""
        return f"{self.callback.name}, which changed {', '.join(sorted(self.callback.changed))}"

    def _require_room(self, call: Call, *, can_stride: bool) -> None:
        """Hold the memory of the base to what is free."""
        lowered, (samples, _) = self.unet.program(call).lowered, self.parts(call)
        activations = lowered.record_nbytes(samples=samples, activations=True, attention=False)
        maps = lowered.record_nbytes(samples=samples, activations=False, attention=True)
        latents = call.tensors[0].nbytes * samples // call.signature.sample_shape[0]
        sparse_visits = len(self.visits) - self._dense_visits
        options = [f"fewer than {self._steps} steps", "a smaller height and width"]
        options += [f"fewer than {samples} pictures at a time"] if samples > 1 else []
        options += ["half precision (torch_dtype)"] if call.tensors[0].dtype.itemsize > 2 else []
        options += ["Editor(pipe, {'attention': 'masked'})"] if self._config.attention == "full" else []
        options += ["a lower cross_replace"] if self._controlled_visits else []
        options += ["a stride above 1"] if can_stride and len(self.visits) == self._steps else []
        require_room(
            sparse_visits * activations + self._controlled_visits * maps + self._steps * latents,
            call.tensors[0].device,
            f"A base of {self._steps} steps",
            options,
        )


class EditRun(PipelineRun):
    """Edits a base: k dense steps under Prompt-to-Prompt control, the mask, then sparse steps."""

    mask: Tensor  # bool [n, h, w], known after the dense steps

    def __init__(
        self,
        unet: SparseUNet,
        pipe: Any,
        tokenizers: OwnTokenizers,
        callback: StepCallback | None,
        base: Base,
        prompts: tuple[str, ...],
        given: Tensor | None,
        combine: str,
    ) -> None:
        super().__init__(unet, pipe, tokenizers, callback)
        self._base, self._given, self._combine = base, given, combine
        self._prepared: dict[Signature, Prepared] = {}  # a callback may take a part of the batch away in the loop
        self.plan_ms = 0.0
        mapper, keep = align_prompts(
            self.pipe, base.prompts, prompts, arguments=base.arguments, device=base.latents.device
        )
        copies = len(base.latents) // len(prompts)  # num_images_per_prompt: the pipeline repeats each prompt
        self._mapper, self._keep = mapper.repeat_interleave(copies, 0), keep.repeat_interleave(copies, 0)
        if base.dense_steps == 0:
            assert given is not None
            self.mask = given
        self._stride_error: StrideError | None = None
        if not base.visits_all:
            visit(self.pipe.scheduler, base.num_inference_steps, base.visits, self._check_schedule)

    def begin(self, call: Call) -> None:
        if self._base.visits_all:
            self._check_schedule()
        elif self._base.solver_steps:
            self._stride_error = StrideError(self.pipe.scheduler)
        then, now = self._base.latents.device, call.tensors[0].device
        if then != now:
            raise BaseMismatchError(f"the base lies on {then}, the U-Net runs on {now}: move the pipeline back")

    def _check_schedule(self) -> None:
        self._base.check_schedule(Schedule.of(self.pipe.scheduler))

    def predict(self, call: Call) -> Tensor:
        recorded = self._recorded_call(call)
        device = call.tensors[0].device
        if self.step >= self._base.dense_steps:
            prepared = self._prepare(call)
            return self.timer.time("sparse", device, lambda: self.unet.step(call, recorded.cache, prepared))
        if recorded.cache:
            control = (recorded.cache, self._mapper, self._keep, self.parts(call)[1])
            return self.timer.time("dense", device, lambda: self.unet.controlled(call, *control))
        return self.timer.time("dense", device, lambda: self.unet.dense(call))

    def finish_step(self, latents: Tensor) -> Tensor:
        step, dense, after = self.step, self._base.dense_steps, self._base.latents_after(self.step)
        if step < dense and self._stride_error is not None:
            latents = (latents + self._stride_error.of(self._base.solver_steps[step], after)).to(latents.dtype)
        if step == dense - 1:
            self.mask = self._decide_mask([*self.latents, latents])
        if step < dense - 1:
            return latents
        # Outside the mask the picture is the base's, bit for bit, whatever the scheduler remembers of other steps.
        return torch.where(self.mask[:, None], latents, after)

    def finish(self) -> None:
        if len(self.latents) != len(self._base.visits):
            raise BaseMismatchError(
                f"the pipeline made {len(self.latents)} steps, and an edit of this base makes {len(self._base.visits)}"
            )

    @property
    def ran_dense(self) -> bool:
        """Whether the mask was so large that the steps behind it ran dense."""
        return self._first_prepared.dense

    def step_macs(self) -> StepMacs:
        """What counts the multiply-accumulates of this edit's steps."""
        return StepMacs(self._first_prepared.lowered, self.mask, dense=self.ran_dense)

    @property
    def _first_prepared(self) -> Prepared:
        return next(iter(self._prepared.values()))

    def _recorded_call(self, call: Call) -> RecordedCall:
        """The base's call that this one repeats.

        Raises:
            BaseMismatchError: the pipeline's loop runs otherwise than for the base.
        """
        calls = self._base.calls
        if self.calls_made >= len(calls):
            raise BaseMismatchError("the pipeline calls its U-Net more often than for the base: use the same arguments")
        recorded = calls[self.calls_made]
        then, now = recorded.cache.signature.sample_shape, call.signature.sample_shape
        if then != now:
            who = [f"the edit has the callback {self.callback.name}"] if self.callback else []
            who += [f"the base had {self._base.callback}"] if self._base.callback else []
            raise BaseMismatchError(
                f"at step {self.step} the U-Net is called with latents {list(now)}, and was with {list(then)} for the "
                f"base: give both the same callback_on_step_end ({'; '.join(who) or 'neither has one that changed it'})"
            )
        return recorded

    def _prepare(self, call: Call) -> Prepared:
        if call.signature not in self._prepared:
            start = time.perf_counter()
            self._prepared[call.signature] = self.unet.prepare(call, self.mask)
            self.plan_ms += (time.perf_counter() - start) * 1e3
        return self._prepared[call.signature]

    def _decide_mask(self, latents: list[Tensor]) -> Tensor:
        if self._given is not None and self._combine == "replace":
            return self._given
        first, last = DIFFERENCE_STEPS[0] - 1, min(DIFFERENCE_STEPS[1], len(latents))
        after = [self._base.latents_after(visit) for visit in range(last)]
        base, edit = (torch.stack(each[first:last]) for each in (after, latents))
        found = difference_mask(base, edit)
        if self._given is None:
            return found
        mask = found & self._given if self._combine == "and" else found | self._given
        if not mask.flatten(1).any(dim=1).all():
            raise MaskError("the mask that was found and the one given do not meet: give a larger one, or combine='or'")
        return mask
