"""Latents from which a diffusion model draws a given picture: DDIM inversion, run by the pipeline's own loop.

Source: Song, Meng and Ermon, "Denoising Diffusion Implicit Models", 2020, run backwards: the noise that the model sees
in a picture leads to the noisier picture that it would have come from. The noise has to be that of the noisier picture,
which is not known yet; asked again for what was found with it, the model gets closer to it (fixed-point iterations, as
in Pan et al., "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion", 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fisedit_compile.editing.arguments import call_parameters
from fisedit_compile.editing.own_tokenizers import OwnTokenizers
from fisedit_compile.editing.pipeline_run import PipelineRun
from fisedit_compile.errors import CaptureError
from fisedit_compile.ir.call import Call
from fisedit_compile.sparse_unet import SparseUNet

#: Schedulers whose latents are ``sqrt(a) * picture + sqrt(1 - a) * noise`` with ``a`` of ``alphas_cumprod``.
INVERTIBLE = (
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)

#: How often the noise of a step is asked for: once for the picture before it, then for what was found.
EVALUATIONS = 2


#: What the picture decides.
_DECIDED = ("latents", "output_type", "height", "width")


def check_inversion(pipe: Any, arguments: Mapping[str, Any], prompts: Sequence[str], photos: Sequence[Any]) -> None:
    """Hold an inversion to what can be run backwards.

    Raises:
        ValueError: a pipeline that starts from pictures itself; an argument that the picture decides; not one prompt
            for each picture; a scheduler of another form, or one that adds noise at each step.
    """
    parameters = call_parameters(pipe)
    if "latents" not in parameters or {"strength", "image_guidance_scale", "mask_image"} & set(parameters):
        raise ValueError(f"{type(pipe).__name__} starts from pictures itself: invert with a text-to-image pipeline")
    for name in _DECIDED:
        if arguments.get(name) is not None:
            raise ValueError(f"{name}: the picture decides it; leave it out")
    if arguments.get("num_images_per_prompt", 1) != 1:
        raise ValueError("num_images_per_prompt: an inverted picture is one; give the picture several times")
    if len(prompts) != len(photos):
        raise ValueError(f"{len(prompts)} prompt(s) for {len(photos)} picture(s): give one for each")
    scheduler, eta = pipe.scheduler, arguments.get("eta")
    name = type(scheduler).__name__
    if name not in INVERTIBLE:
        raise ValueError(f"{name} cannot be run backwards; set pipe.scheduler to one of {', '.join(INVERTIBLE)}")
    if eta or str(scheduler.config.get("algorithm_type", "")).startswith("sde"):
        raise ValueError(f"{name} adds noise at each step, which no picture tells: leave out eta, or take another one")
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"{name} with prediction_type={prediction!r}: inversion knows epsilon, v_prediction and sample"
        )


class InverseScheduler(SchedulerMixin, ConfigMixin):
    """Runs the timesteps of another scheduler from the picture to the noise.

    Args:
        forward: the other scheduler.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self) -> None:
        self.timesteps = torch.empty(0)

    @classmethod
    def of(cls, forward: Any) -> InverseScheduler:
        """The inverse of ``forward``, which it sets the timesteps of."""
        inverse = cls()
        inverse.inverted = forward
        return inverse

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Each timestep of the other scheduler, the last one first, as often as its noise is asked for."""
        self.inverted.set_timesteps(num_inference_steps, device=device)
        self.timesteps = self.inverted.timesteps.flip(0).repeat_interleave(EVALUATIONS)
        self._share, self._made = torch.tensor(1.0, dtype=torch.float64), 0  # of the picture in the latents

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """The latents at ``timestep``, by the noise that the model sees in ``sample`` there.

        Args:
            model_output: of the U-Net at ``timestep``, ``[n, c, h, w]``.
            timestep: the noisier one.
            sample: the latents that the U-Net was given.
        """
        if self._made % EVALUATIONS == 0:
            self._before = sample.double()
        share = self.inverted.alphas_cumprod[int(timestep)].double().cpu()
        picture, noise = (float(each.sqrt()) for each in (share, 1 - share))
        predicted, given = model_output.double(), sample.double()
        kind = self.inverted.config.prediction_type
        if kind == "v_prediction":
            seen = picture * predicted + noise * given
        elif kind == "sample":
            seen = (given - picture * predicted) / noise
        else:
            seen = predicted
        then, rest = (float(each.sqrt()) for each in (self._share, 1 - self._share))
        found = picture * (self._before - rest * seen) / then + noise * seen
        self._made += 1
        if self._made % EVALUATIONS == 0:
            self._share = share
        latents = found.to(sample.dtype)
        return SchedulerOutput(prev_sample=latents) if return_dict else (latents,)


class InvertRun(PipelineRun):
    """Runs a pipeline backwards, without guidance: from the latents of a picture to the noise of its first step.

    Attributes:
        trajectory: once it has run, the latents that the pipeline starts from and those after each of its steps, each
            ``[n, c, h, w]``; the last are those of the picture.
    """

    def __init__(self, unet: SparseUNet, pipe: Any, tokenizers: OwnTokenizers, picture: Tensor) -> None:
        super().__init__(unet, pipe, tokenizers, None)
        vars(self.pipe)["scheduler"] = InverseScheduler.of(self.pipe.scheduler)
        self._picture = picture
        self.trajectory: list[Tensor] = []

    def begin(self, call: Call) -> None:
        """Nothing has to be known before the first call."""

    @property
    def expected_steps(self) -> int:
        return len(self.schedule.timesteps)

    def predict(self, call: Call) -> Tensor:
        return self.timer.time("record", call.tensors[0].device, lambda: self.unet.dense(call))

    def finish_step(self, latents: Tensor) -> Tensor:
        return latents

    def finish(self) -> None:
        if len(self.latents) != self.expected_steps:
            raise CaptureError(
                f"{type(self.pipe).__name__} made {len(self.latents)} of {self.expected_steps} steps of an inversion"
            )
        found = self.latents[EVALUATIONS - 1 :: EVALUATIONS]
        self.trajectory = [*reversed(found), self._picture]
