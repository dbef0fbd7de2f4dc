"""Latents from which a diffusion model draws a given picture: DDIM inversion, run by the pipeline's own loop.

It takes the steps that edits of the picture visit, backwards: what lies between them nobody reads.

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

from fisedit_compile.config import SparsityConfig
from fisedit_compile.editing.arguments import call_parameters
from fisedit_compile.editing.own_tokenizers import OwnTokenizers
from fisedit_compile.editing.photo_frame import PhotoFrame
from fisedit_compile.editing.pipeline_run import PipelineRun
from fisedit_compile.editing.pipeline_state import PipelineState
from fisedit_compile.editing.rounds import Trajectory
from fisedit_compile.editing.schedule import Schedule
from fisedit_compile.editing.stride import Stride, visits_of
from fisedit_compile.errors import CaptureError
from fisedit_compile.ir.call import Call
from fisedit_compile.sparse_unet import SparseUNet
from fisedit_compile.utils.frozen_mapping import FrozenMapping

#: Schedulers whose latents are ``sqrt(a) * picture + sqrt(1 - a) * noise`` with ``a`` of ``alphas_cumprod``.
INVERTIBLE = (
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)

#: How often the noise of a step is asked for: once for the picture before it, then for what was found. Where steps are
#: left out the others are longer, and need one more (docs/decisions.md, 2026-11-28).
EVALUATIONS, OF_LONG_STEPS = 2, 3


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
    """Runs timesteps of another scheduler from the picture to the noise; made by :meth:`of`.

    Attributes:
        visits: the steps that it runs, as positions among those of the other scheduler; this and the next are known
            once timesteps are set.
        evaluations: how often the noise of each is asked for.
    """

    visits: tuple[int, ...]
    evaluations: int

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self) -> None:
        self.timesteps = torch.empty(0)

    @classmethod
    def of(cls, forward: Any, stride: Stride, arguments: Mapping[str, Any]) -> InverseScheduler:
        """The inverse of ``forward``, which it sets the timesteps of, at the steps that edits visit.

        Args:
            stride: of the config.
            arguments: of the pipeline's call.
        """
        inverse = cls()
        inverse.inverted, inverse._stride, inverse._arguments = forward, stride, arguments
        return inverse

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Each visited timestep of the other scheduler, the last one first, as often as its noise is asked for."""
        self.inverted.set_timesteps(num_inference_steps, device=device)
        timesteps = self.inverted.timesteps
        self.visits = visits_of(self.inverted, self._stride, len(timesteps), self._arguments)
        self.evaluations = EVALUATIONS if len(self.visits) == len(timesteps) else OF_LONG_STEPS
        self.timesteps = timesteps[list(self.visits)].flip(0).repeat_interleave(self.evaluations)
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
        if self._made % self.evaluations == 0:
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
        if self._made % self.evaluations == 0:
            self._share = share
        latents = found.to(sample.dtype)
        return SchedulerOutput(prev_sample=latents) if return_dict else (latents,)


class InvertRun(PipelineRun):
    """Runs a pipeline backwards, without guidance: from the latents of a picture to the noise of its first step.

    Args:
        unet, pipe, tokenizers: see :class:`~fisedit_compile.editing.pipeline_run.PipelineRun`.
        picture: its latents, ``[n, c, h, w]``.
        stride: of the config.
        arguments: of the pipeline's call.

    Attributes:
        noise: once it has run, the latents that the pipeline starts from, ``[n, c, h, w]``.
        found: and those behind each visited step, each ``[n, c, h, w]``; the last are those of the picture.
    """

    def __init__(
        self,
        unet: SparseUNet,
        pipe: Any,
        tokenizers: OwnTokenizers,
        picture: Tensor,
        stride: Stride,
        arguments: Mapping[str, Any],
    ) -> None:
        super().__init__(unet, pipe, tokenizers, None)
        self._inverse = InverseScheduler.of(self.pipe.scheduler, stride, arguments)
        vars(self.pipe)["scheduler"] = self._inverse
        self._picture = picture
        self.noise, self.found = picture, tuple[Tensor, ...]()

    def begin(self, call: Call) -> None:
        self._forward = Schedule.of(self._inverse.inverted)  # with all of its timesteps

    def trajectory(
        self,
        prompts: tuple[str, ...],
        arguments: Mapping[str, Any],
        generators: Sequence[torch.Generator],
        pipeline: PipelineState,
        config: SparsityConfig,
        frame: PhotoFrame,
    ) -> Trajectory:
        """What a base of the picture goes through: that of an edit would be the same, if the model had drawn it.

        Args:
            prompts: what the picture shows.
            arguments: of the pipeline's call, as edits repeat them, but for the latents.
            generators: of which nothing is drawn.
            pipeline, config: of the editor.
            frame: where the model's pictures lie in the photos.
        """
        return Trajectory(
            prompts=prompts,
            arguments=FrozenMapping({**arguments, "latents": self.noise}),
            generators=tuple((each.get_state(), each.device) for each in generators),
            pipeline=pipeline,
            schedule=self._forward,
            steps=len(self._forward.timesteps),
            visits=self._inverse.visits,
            latents=self.found,
            config=config,
            callback="",
            frame=None if frame.is_whole else frame,
        )

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
        found = self.latents[self._inverse.evaluations - 1 :: self._inverse.evaluations]
        self.noise, *behind = *reversed(found), self._picture
        self.found = tuple(behind)
