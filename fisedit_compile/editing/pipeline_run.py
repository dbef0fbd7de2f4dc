"""The part that recording a base and editing it share: a pipeline's loop whose U-Net calls and steps are ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.editing.arguments import call_parameters
from fisedit_compile.editing.decoding import Decoding
from fisedit_compile.editing.host_timesteps import on_device
from fisedit_compile.editing.own_tokenizers import OwnTokenizers
from fisedit_compile.editing.pipeline_call import PipelineCall
from fisedit_compile.editing.schedule import Schedule
from fisedit_compile.editing.step_callback import StepCallback
from fisedit_compile.editing.step_ends import end_steps
from fisedit_compile.errors import BaseMismatchError, CaptureError
from fisedit_compile.ir.call import Call
from fisedit_compile.runtime.timer import UNetTimer
from fisedit_compile.sparse_unet import SparseUNet
from fisedit_compile.utils.weak_method import weakly


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
        decoding: what the final latents are decoded by.
    """

    schedule: Schedule

    def __init__(self, unet: SparseUNet, pipe: Any, tokenizers: OwnTokenizers, callback: StepCallback | None) -> None:
        self.unet, self.callback = unet, callback
        self.call = PipelineCall(pipe, weakly(self._unet_call), weakly(self._decode_call), tokenizers)
        self.decoding = Decoding("the pipeline's own")
        self._parameters = call_parameters(pipe)
        self.timer = UNetTimer()
        self.latents: list[Tensor] = []
        self.calls_made = 0
        self._guided = False

    @property
    def pipe(self) -> Any:
        """The pipeline that runs."""
        return self.call.pipe

    @property
    def step(self) -> int:
        """The denoising step that is being computed."""
        return len(self.latents)

    @property
    def callback_changes(self) -> str:
        """The name of the user's callback and what it changed; empty if nothing."""
        if self.callback is None or not self.callback.changed:
            return ""
        return f"{self.callback.name}, which changed {', '.join(sorted(self.callback.changed))}"

    def run(self, **arguments: Any) -> Any:
        """What the pipeline returns for ``arguments``.

        Raises:
            PipelineInterruptedError: ``_interrupt`` was set before the last step had ended.
        """
        self._guided = self._is_guided(arguments)
        if "callback_on_step_end" in self._parameters:
            names = ["latents", *(self.callback.tensor_inputs if self.callback else ())]
            arguments["callback_on_step_end"] = self._step_end
            arguments["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys(names))
        else:
            end_steps(self.pipe.scheduler, self._scheduler_step_end)
        output = self.call(**arguments)
        self.finish()
        return output

    def draw(
        self, prompts: Sequence[str], generators: Sequence[torch.Generator], arguments: Mapping[str, Any]
    ) -> tuple[Any, tuple[bool, ...] | None]:
        """The pictures of a run, and the safety checker's flags, None without a checker; see :meth:`run`."""
        generator = generators[0] if len(generators) == 1 else list(generators)
        words: dict[str, Any] = {"prompt": list(prompts)}
        if arguments.get("prompt_embeds") is not None:  # pipelines take one of both
            words = {"prompt": None, **({"prompt_2": None} if "prompt_2" in arguments else {})}
        output = self.run(**{**arguments, **words, "generator": generator})
        flags = getattr(output, "nsfw_content_detected", None)
        return output.images, None if flags is None else tuple(bool(flag) for flag in flags)

    def begin(self, call: Call) -> None:
        """Called at the first U-Net call, before anything is computed for it."""
        raise NotImplementedError

    def predict(self, call: Call) -> Tensor:
        """The noise prediction of a U-Net call."""
        raise NotImplementedError

    def finish_step(self, latents: Tensor) -> Tensor:
        """The latents that the next step starts from."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor | None:
        """The pictures of the final latents, as ``vae.decode`` takes them; None leaves them to the VAE."""
        return self.decoding(latents)

    @property
    def expected_steps(self) -> int:
        """How many denoising steps the run makes; known from the first U-Net call on."""
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
        if not getattr(self.pipe, "do_classifier_free_guidance", self._guided):
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

    def _is_guided(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a pipeline that does not say it makes several parts of its batch, by the arguments of its call."""
        scales = ("guidance_scale", "image_guidance_scale")
        text, image = (arguments.get(name, getattr(self._parameters.get(name), "default", 1)) for name in scales)
        return bool(text > 1 and image >= 1)

    def _unet_call(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the U-Net's ``forward``."""
        self.call.raise_if_interrupted()
        call = self.unet.call(sample, on_device(timestep, sample.device), *args, **kwargs)
        if not self.calls_made:
            self.schedule = Schedule.of(self.pipe.scheduler)
            self.begin(call)
        out = self.predict(call)
        self.calls_made += 1
        if kwargs.get("return_dict", True):
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            return UNet2DConditionOutput(sample=out)
        return (out,)

    def _decode_call(self, latents: Tensor) -> Tensor | None:
        """Stands in for the VAE's ``decode``; what a callback decodes on the way is left to the VAE."""
        over = self.calls_made > 0 and len(self.latents) == self.expected_steps
        return self.decode(latents) if over else None

    def _step_end(self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's ``callback_on_step_end``: the user's own first, then ours."""
        changed = {}
        if self.callback:
            changed = self.callback(self.call, index, on_device(timestep, values["latents"].device), values)
            try:
                self.unet.look_again()
            except BaseMismatchError as error:
                raise BaseMismatchError(f"after {self.callback.name}: {error}") from error
        self.call.raise_if_interrupted()
        latents = self.finish_step(changed.get("latents", values["latents"]))
        self.latents.append(latents.clone())
        return {**changed, "latents": latents}

    def _scheduler_step_end(self, index: int, timestep: Any, latents: Tensor) -> Tensor:
        ended: Tensor = self._step_end(self.pipe, index, timestep, {"latents": latents})["latents"]
        return ended
