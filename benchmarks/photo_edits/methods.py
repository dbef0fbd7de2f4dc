"""Methods that edit a photo by words, each with the models of one pipeline.

Sources: DDIM inversion (Song, Meng and Ermon 2020) with Prompt-to-Prompt (Hertz et al. 2023), SDEdit (Meng et al. 2022)
and DIFFEdit (Couairon et al. 2023), at the settings of ``benchmarks/baselines``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from baselines.diffedit import NOISES
from baselines.diffedit import STRENGTH as DIFFEDIT_STRENGTH
from baselines.prompt_to_prompt import CROSS_SHARE, SELF_SHARE, Processor
from baselines.sdedit import STRENGTH as SDEDIT_STRENGTH
from PIL import Image

from fisedit_compile import Editor
from fisedit_compile.editing.photo import encode
from fisedit_compile.editing.prompt_alignment import align_batch
from fisedit_compile.errors import MaskError


@dataclass(frozen=True)
class Settings:
    """Of all methods: denoising steps and guidance scale."""

    steps: int
    guidance: float


class FisEdit:
    """This project: inversion, a mask from the words, sparse steps."""

    title = "FISEdit"

    def __init__(self, pipe: Any, settings: Settings) -> None:
        self._editor = Editor(pipe)
        self._arguments = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance}

    def edit(self, photo: Image.Image, prompt: str, words: str) -> Image.Image:
        """The photo, changed by the words; the photo itself where no mask can be found."""
        return self._edited(self._editor.invert(photo, prompt, **self._arguments), words)

    def edit_generated(self, prompt: str, words: str, seed: int) -> tuple[Image.Image, Image.Image]:
        """The same of a picture that the model draws: before and after."""
        generator = torch.Generator("cpu").manual_seed(seed)
        base = self._editor.generate(prompt, generator=generator, **self._arguments)
        return base.image, self._edited(base, words)

    def _edited(self, base: Any, words: str) -> Image.Image:
        try:
            picture: Image.Image = self._editor.edit(base, words).image
        except MaskError:
            picture = base.image
        return picture


class InvertedPromptToPrompt:
    """DDIM inversion without guidance, then Prompt-to-Prompt from the noise that it found."""

    title = "DDIM inversion + Prompt-to-Prompt"

    def __init__(self, pipe: Any, settings: Settings) -> None:
        self._settings, self.steps, self.done = settings, settings.steps, 0
        self._pipe = _pipeline(diffusers.StableDiffusionPipeline, pipe, unet=copy.deepcopy(pipe.unet))
        inverse = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config)
        self._backwards = _pipeline(diffusers.StableDiffusionPipeline, pipe, scheduler=inverse)
        unet = self._pipe.unet
        unet.set_attn_processor({name: Processor(self, cross="attn2" in name) for name in unet.attn_processors})

    def takes_over(self, cross: bool, done: int) -> bool:
        """Whether a step takes over cross- or self-attention, for the processors."""
        return done < (CROSS_SHARE if cross else SELF_SHARE) * self.steps

    def edit(self, photo: Image.Image, prompt: str, words: str) -> Image.Image:
        """The photo, drawn again beside its edit."""
        noise = self._backwards(
            prompt,
            latents=encode(self._backwards, [photo], self._pipe.unet.dtype),
            num_inference_steps=self.steps,
            guidance_scale=1.0,
            output_type="latent",
        ).images
        device, self.done = self._pipe.unet.device, 0
        self.mapper, self.keep = align_batch(self._pipe.tokenizer, [prompt], [words], device=device)
        picture: Image.Image = self._pipe(
            [prompt, words],
            latents=noise.repeat(2, 1, 1, 1),
            num_inference_steps=self.steps,
            guidance_scale=self._settings.guidance,
            callback_on_step_end=self._step_end,
        ).images[1]
        return picture

    def _step_end(self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        self.done = index + 1
        return {}


class SDEdit:
    """Noise is added to the photo, and the new words guide it back."""

    title = f"SDEdit, strength {SDEDIT_STRENGTH}"

    def __init__(self, pipe: Any, settings: Settings) -> None:
        self._pipe, self._settings = _pipeline(diffusers.StableDiffusionImg2ImgPipeline, pipe), settings

    def edit(self, photo: Image.Image, prompt: str, words: str) -> Image.Image:
        """The photo, changed by the words; the old ones are not read."""
        picture: Image.Image = self._pipe(
            words,
            image=photo,
            strength=SDEDIT_STRENGTH,
            num_inference_steps=self._settings.steps,
            guidance_scale=self._settings.guidance,
            generator=torch.Generator("cpu").manual_seed(0),
        ).images[0]
        return picture


class DiffEdit:
    """A mask from where the predictions for both prompts differ, inversion, then masked denoising."""

    title = f"DIFFEdit, strength {DIFFEDIT_STRENGTH}"

    def __init__(self, pipe: Any, settings: Settings) -> None:
        inverse = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config)
        self._pipe = _pipeline(diffusers.StableDiffusionDiffEditPipeline, pipe, inverse_scheduler=inverse)
        self._settings = settings

    def edit(self, photo: Image.Image, prompt: str, words: str) -> Image.Image:
        """The photo, changed by the words within the mask that is found."""
        common = {
            "num_inference_steps": self._settings.steps,
            "guidance_scale": self._settings.guidance,
            "generator": torch.Generator("cpu").manual_seed(0),
        }
        mask = self._pipe.generate_mask(
            photo, source_prompt=prompt, target_prompt=words, num_maps_per_mask=NOISES, **common
        )
        inverted = self._pipe.invert(prompt, image=photo, inpaint_strength=DIFFEDIT_STRENGTH, **common).latents
        picture: Image.Image = self._pipe(
            words, mask_image=mask, image_latents=inverted, inpaint_strength=DIFFEDIT_STRENGTH, **common
        ).images[0]
        return picture


#: Name on the command line -> method.
METHODS: dict[str, Callable[[Any, Settings], Any]] = {
    "fisedit": FisEdit,
    "p2p": InvertedPromptToPrompt,
    "sdedit": SDEdit,
    "diffedit": DiffEdit,
}


def _pipeline(kind: Any, pipe: Any, **parts: Any) -> Any:
    """A silent pipeline of another class with the same models, and a scheduler of its own."""
    own = {"scheduler": diffusers.DDIMScheduler.from_config(pipe.scheduler.config)}
    components = {**pipe.components, **own, "safety_checker": None, "feature_extractor": None, **parts}
    known = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor", *parts)
    made = kind(**{name: components[name] for name in known}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made
