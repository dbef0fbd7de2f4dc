"""The editor: generate a picture, keep its base, edit it by new words (FISEdit, figure 2).

The pipeline runs its own loop; for the time of a call its U-Net is replaced by a :class:`SparseUNet` whose calls are
recorded or edited, and a step-end callback forces the latents outside the mask to the base's.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from fisedit_compile.config import SparsityConfig
from fisedit_compile.editing.base import Base
from fisedit_compile.editing.pipeline_runs import EditRun, PipelineRun, RecordRun
from fisedit_compile.editing.prompt_alignment import changed_words
from fisedit_compile.editing.result import Edit, EditReport, summarise_times
from fisedit_compile.errors import BaseMismatchError, CaptureError
from fisedit_compile.masks.user_mask import MaskLike, as_mask
from fisedit_compile.sparse_unet import SparseUNet, sparsify

Combine = Literal["replace", "and", "or"]


class Editor:
    """Edits pictures that it generated itself, with any pipeline of the StableDiffusionPipeline family.

    Args:
        pipe: a diffusers pipeline whose U-Net is a ``UNet2DConditionModel`` and whose call takes
            ``callback_on_step_end``. It is left as it is between calls.
        config: a :class:`SparsityConfig`, a dict of its fields, or None.

    Raises:
        CaptureError: a pipeline without such a U-Net or callback.
        ValueError: an unknown config field or value.
    """

    def __init__(self, pipe: Any, config: SparsityConfig | dict[str, Any] | None = None) -> None:
        if not hasattr(pipe, "unet") or not callable(pipe):
            raise CaptureError(f"Editor takes a diffusers pipeline with a U-Net, not a {type(pipe).__name__}")
        parameters = inspect.signature(type(pipe).__call__).parameters
        if missing := {"prompt", "callback_on_step_end", "num_inference_steps"} - set(parameters):
            raise CaptureError(
                f"{type(pipe).__name__} takes no {', '.join(sorted(missing))}: use a StableDiffusionPipeline or a "
                "pipeline of its family"
            )
        self.pipe = pipe
        self._parameters = parameters
        self.config = SparsityConfig.of(config)
        if config is None and isinstance(pipe.unet, SparseUNet):
            self.config = pipe.unet.sparsity
        self._unet: SparseUNet | None = None
        self._unet = self.unet

    @property
    def unet(self) -> SparseUNet:
        """The pipeline's U-Net as it is now, mask-aware."""
        unet = self.pipe.unet
        if not isinstance(unet, SparseUNet):
            if self._unet is None or self._unet.unet is not unet:
                self._unet = sparsify(unet, self.config)
            return self._unet
        if unet.sparsity != self.config:
            raise ValueError("pipe.unet was sparsified with another config: give that one, or none")
        return unet

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **arguments: Any,
    ) -> Base:
        """Generate with the pipeline, and keep what edits of the result need.

        Args:
            prompt: a prompt, or one a sample.
            num_inference_steps, guidance_scale: as the pipeline takes them.
            generator: random generator(s); None draws a seed from torch's default one.
            arguments: anything else the pipeline's call takes: ``height``, ``width``, ``negative_prompt``,
                ``num_images_per_prompt``, ``latents``, ``callback_on_step_end``, ...

        Returns:
            The base; it is never changed afterwards.

        Raises:
            ValueError: an argument that an editor cannot do with: no prompt, another kind of output, or perturbed-
                attention guidance, which adds a part to the batch.
        """
        prompts = _prompts(prompt)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: at least 1")
        reserved = {"output_type", "return_dict", "prompt_embeds"} & set(arguments)
        if reserved - {"output_type"} or arguments.get("output_type") == "latent":
            raise ValueError(f"{', '.join(sorted(reserved))}: an editor needs words, and returns pictures and latents")
        perturbed = self._parameters.get("pag_scale")
        if perturbed is not None and arguments.get("pag_scale", perturbed.default) > 0:
            raise ValueError("perturbed-attention guidance adds a third part to the batch: pass pag_scale=0")
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator or [_fresh_generator()])
        states = tuple((g.get_state(), g.device) for g in generators)
        kept = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **arguments}
        run = RecordRun(self.unet, self.pipe, self.config)
        start = time.perf_counter()
        with self.unet.looked_at() as model:
            images = self._call_pipeline(run, prompt, generators, kept)
        model.digest()  # while it can be read
        return Base(
            images=images,
            prompts=prompts,
            step_latents=tuple(run.latents),
            timesteps=run.timesteps,
            arguments=kept,
            generators=states,
            calls=tuple(run.calls),
            model=model,
            scheduler=self._scheduler(),
            config=self.config,
            seconds=time.perf_counter() - start,
            unet_ms=tuple(run.timer.milliseconds()["record"]),
        )

    def edit(
        self,
        base: Base,
        prompt: str | Sequence[str],
        mask: MaskLike | None = None,
        *,
        combine: Combine = "replace",
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    ) -> Edit:
        """Change the words of a base's prompt, and with them the part of the picture they describe.

        Args:
            base: from :meth:`generate` of an editor with this pipeline and config. Read only.
            prompt: the new prompt, or one a sample of the base.
            mask: where to edit, instead of finding out: an image, array or tensor of any size, soft in [0, 1] or hard,
                one for all samples or one each.
            combine: with a mask given: ``"replace"`` uses it alone, ``"and"`` / ``"or"`` cut or join it with the one
                that is found.
            callback_on_step_end: as the pipeline takes it; sees the latents before the background is restored.

        Raises:
            BaseMismatchError: a base of another model, scheduler or config.
            MaskError: a mask of no pixels, not finite, or for another number of samples; or none can be found.
            ValueError: a prompt that is the base's own, or another number of prompts than the base has.
        """
        if not isinstance(base, Base):
            raise ValueError(f"base is a {type(base).__name__}: pass what editor.generate(...) returned")
        prompts = _prompts(prompt)
        self._check_edit(base, prompts, mask, combine)
        samples, _, *size = base.latents.shape
        given = None
        if mask is not None:
            given = as_mask(mask, samples=samples, size=(size[0], size[1]), device=base.latents.device)
        run = EditRun(self.unet, self.pipe, base, prompts, given, combine)
        arguments = dict(base.arguments)
        if callback_on_step_end is not None:
            arguments["callback_on_step_end"] = callback_on_step_end
        start = time.perf_counter()
        with self.unet.looked_at():
            images = self._call_pipeline(run, prompt, base.rewound_generators(), arguments)
        seconds = time.perf_counter() - start
        final, edited = run.latents[-1], run.mask[:, None].expand_as(base.latents)
        times = run.timer.milliseconds()
        words = [changed_words(old, new) for old, new in zip(base.prompts, prompts, strict=True)]
        report = EditReport(
            mask_area=float(run.mask.float().mean()),
            mask_source="found" if given is None else "given" if combine == "replace" else f"found {combine} given",
            removed_words=tuple(tuple(removed) for removed, _ in words),
            added_words=tuple(tuple(added) for _, added in words),
            dense_steps=base.dense_steps,
            sparse_steps=base.num_inference_steps - base.dense_steps,
            unet_ms=summarise_times(times["dense"], times["sparse"]),
            plan_ms=run.plan_ms,
            seconds=seconds,
            ran_dense=run.ran_dense,
            background_identical=torch.equal(final[~edited], base.latents[~edited]),
            count_macs=run.macs,
        )
        return Edit(images=images, mask=run.mask, latents=final, report=report)

    def _call_pipeline(
        self,
        run: PipelineRun,
        prompt: str | Sequence[str],
        generators: list[torch.Generator],
        arguments: Mapping[str, Any],
    ) -> Any:
        """Run the pipeline with ``run`` in charge of its U-Net and of the end of each step."""
        arguments = dict(arguments)
        run.user_callback = arguments.pop("callback_on_step_end", None)
        tensors = list(dict.fromkeys(["latents", *arguments.pop("callback_on_step_end_tensor_inputs", [])]))
        unet, sparse = self.pipe.unet, self.unet
        object.__setattr__(self.pipe, "unet", sparse)  # not pipe.unet = ...: that would rewrite the pipeline's config
        try:
            with sparse.handled_by(run.unet_call):
                output = self.pipe(
                    prompt=prompt if isinstance(prompt, str) else list(prompt),
                    generator=generators[0] if len(generators) == 1 else generators,
                    callback_on_step_end=run.step_end,
                    callback_on_step_end_tensor_inputs=tensors,
                    **arguments,
                )
        finally:
            object.__setattr__(self.pipe, "unet", unet)
        run.finish()
        return output.images

    def _check_edit(self, base: Base, prompts: tuple[str, ...], mask: MaskLike | None, combine: str) -> None:
        if combine not in ("replace", "and", "or"):
            raise ValueError(f"combine={combine!r}: choose 'replace', 'and' or 'or'")
        if combine != "replace" and mask is None:
            raise ValueError(f"combine={combine!r} needs a mask to combine with the one that is found")
        if len(prompts) != len(base.prompts):
            raise ValueError(f"{len(prompts)} prompt(s) for a base of {len(base.prompts)}: give one for each")
        if same := [new for old, new in zip(base.prompts, prompts, strict=True) if old == new]:
            raise ValueError(f"the new prompt is the base's own ({same[0]!r}): change at least one word")
        if base.dense_steps == 0 and (mask is None or combine != "replace"):
            raise ValueError("with dense_steps=0 no mask can be found: give a mask, or run some dense steps")
        if base.dense_steps == base.num_inference_steps:
            raise ValueError(
                f"all {base.num_inference_steps} steps would run dense: lower dense_steps or take more steps"
            )
        base.check(self.unet.look(), self._scheduler(), self.config)
        device = next(self.unet.unet.parameters()).device
        if base.latents.device.type != device.type:
            raise BaseMismatchError(f"the base lies on {base.latents.device}, the U-Net on {device}: move the pipeline")

    def _scheduler(self) -> tuple[str, Mapping[str, Any]]:
        scheduler = self.pipe.scheduler
        return type(scheduler).__name__, {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}


def _prompts(prompt: str | Sequence[str]) -> tuple[str, ...]:
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    if not prompts or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"prompt={prompt!r}: give a string, or a list of strings")
    return prompts


def _fresh_generator() -> torch.Generator:
    """A generator on the CPU, where pipelines draw the same noise for every device."""
    return torch.Generator("cpu").manual_seed(int(torch.randint(2**62, ())))
