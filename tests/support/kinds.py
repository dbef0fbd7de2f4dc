"""The kinds of pipelines that docs/support.md speaks of, each with a model as small as one can be and its arguments.

Weights are random. The noise prediction is a tenth of what it would be, so that a rounding stays one over several
steps, as with a trained model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from support.pipelines import tiny_pipeline
from support.pipelines_sdxl import tiny_sdxl, tiny_sdxl_unet
from support.unets import MICRO

#: The values of a picture, in [0, 1].
PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(1, 1, 32, 32)
MASK[:, :, 8:24, 8:24] = 1


@dataclass(frozen=True)
class Kind:
    """A pipeline with what is added to it.

    Attributes:
        model: ``"SD"`` or ``"SDXL"``.
        pipeline: name of the class of diffusers.
        added: what it has beside that, in words; empty for nothing.
        build: makes it.
        arguments: of its call, beside prompt, steps, guidance and generator, which they may replace.
        swap: makes other weights of its own between two edits, and the first ones again; None where nothing is swapped.
    """

    model: str
    pipeline: str
    added: str
    build: Callable[[], Any] = field(repr=False, compare=False)
    arguments: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)
    swap: tuple[Callable[[Any], None], Callable[[Any], None]] | None = field(repr=False, compare=False, default=None)

    def __str__(self) -> str:
        return f"{self.pipeline}{f' + {self.added}' if self.added else ''}"


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.conv_out.weight.data.mul_(0.1)
    return pipe


def _pipe(model: str, pipeline: str, *, channels: int = 4, **parts: Any) -> Any:
    """The pipeline of a class, of the small parts of Stable Diffusion or XL; ``channels`` go into its U-Net."""
    torch.manual_seed(0)
    if model == "SD":
        config = {**MICRO, "in_channels": channels}
        components = tiny_pipeline(unet=diffusers.UNet2DConditionModel(**config).eval()).components
    else:
        components = tiny_sdxl(unet=tiny_sdxl_unet(in_channels=channels)).components
    for name, part in parts.items():
        components[name] = part if part is None or isinstance(part, torch.nn.Module) else part(components["unet"])
    kind = getattr(diffusers, pipeline)
    names = inspect.signature(kind.__init__).parameters
    return quiet(kind(**{name: part for name, part in components.items() if name in names}))


def _controlnet(unet: Any) -> Any:
    made = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32))
    for parameter in made.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)  # a new one adds nothing
    return made.eval()


def _controlnets(unet: Any) -> Any:
    return [_controlnet(unet), _controlnet(unet)]


def _union(unet: Any) -> Any:
    names = inspect.signature(diffusers.ControlNetUnionModel.__init__).parameters
    config = {name: value for name, value in unet.config.items() if name in names}
    own = {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    made = diffusers.ControlNetUnionModel(**{**config, **own, "conditioning_embedding_out_channels": (16, 32)})
    for parameter in made.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    return made.eval()


def _adapter(unet: Any) -> Any:
    xl = unet.config.addition_embed_type is not None
    return diffusers.T2IAdapter(
        channels=[16, 32],
        num_res_blocks=1,
        downscale_factor=4 if xl else 2,
        adapter_type="full_adapter_xl" if xl else "full_adapter",
    ).eval()


def _adapters(unet: Any) -> Any:
    return diffusers.MultiAdapter([_adapter(unet), _adapter(unet)]).eval()


def _with_loras(pipe: Any, weights: dict[str, float]) -> Any:
    from peft import LoraConfig

    torch.manual_seed(1)
    for name in weights:
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        pipe.unet.add_adapter(config, adapter_name=name)
    pipe.unet.set_adapters(list(weights), list(weights.values()))
    return pipe


def _to_second_lora(pipe: Any) -> None:
    pipe.unet.set_adapters(["one", "two"], [0.0, 1.0])


def _to_first_lora(pipe: Any) -> None:
    pipe.unet.set_adapters(["one", "two"], [1.0, 0.0])


def _with_ip_adapter(pipe: Any) -> Any:
    """One whose weights are random, for four tokens of image embeddings of 8 numbers."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor
    from diffusers.models.embeddings import ImageProjection

    torch.manual_seed(1)
    words, layers, number = pipe.unet.config.cross_attention_dim, {}, 1
    for name in pipe.unet.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        block = name.split(".")
        channels = pipe.unet.config.block_out_channels
        hidden = channels[-1]
        if block[0] == "down_blocks":
            hidden = channels[int(block[1])]
        elif block[0] == "up_blocks":
            hidden = channels[::-1][int(block[1])]
        state = IPAdapterAttnProcessor(hidden_size=hidden, cross_attention_dim=words, num_tokens=[4]).state_dict()
        layers[f"{number}.to_k_ip.weight"] = state["to_k_ip.0.weight"]
        layers[f"{number}.to_v_ip.weight"] = state["to_v_ip.0.weight"]
        number += 2
    projection = ImageProjection(cross_attention_dim=words, image_embed_dim=8, num_image_text_embeds=4).state_dict()
    image = {
        "proj.weight": projection["image_embeds.weight"],
        "proj.bias": projection["image_embeds.bias"],
        "norm.weight": projection["norm.weight"],
        "norm.bias": projection["norm.bias"],
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": layers}])
    return pipe


def _with_freeu(pipe: Any) -> Any:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return pipe


def _with_tiny_vae(model: str, pipeline: str) -> Any:
    from support.vaes import small_vae

    return _pipe(model, pipeline, vae=small_vae("tiny"))


def _lcm(pipeline: str) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**{**MICRO, "time_cond_proj_dim": 8}).eval()
    components = tiny_pipeline(unet=unet, scheduler=diffusers.LCMScheduler()).components
    return quiet(getattr(diffusers, pipeline)(**components))


def _kinds() -> list[Kind]:
    embeds = {"ip_adapter_image_embeds": [torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))]}
    picture, holes = {"image": PICTURE, "strength": 0.8}, {"image": PICTURE, "mask_image": MASK, "strength": 1.0}
    control, controls = {"image": PICTURE}, {"image": [PICTURE, 1 - PICTURE]}
    made = []

    def add(
        model: str,
        pipeline: str,
        added: str,
        arguments: dict[str, Any],
        build: Any = None,
        swap: Any = None,
        **parts: Any,
    ) -> None:
        make = build or (lambda: _pipe(model, pipeline, **parts))
        made.append(Kind(model, pipeline, added, make, arguments, swap))

    for model, prefix in (("SD", "StableDiffusion"), ("SDXL", "StableDiffusionXL")):
        plain = f"{prefix}Pipeline"

        def of_plain(change: Any, model: str = model, plain: str = plain) -> Callable[[], Any]:
            return lambda: change(_pipe(model, plain))

        add(model, plain, "", {})
        add(model, f"{prefix}Img2ImgPipeline", "", picture)
        add(model, f"{prefix}InpaintPipeline", "4 channels", holes)
        add(model, f"{prefix}InpaintPipeline", "9 channels", holes, channels=9)
        add(model, f"{prefix}ControlNetPipeline", "", control, controlnet=_controlnet)
        add(model, f"{prefix}ControlNetPipeline", "two ControlNets", controls, controlnet=_controlnets)
        add(
            model,
            f"{prefix}ControlNetImg2ImgPipeline",
            "",
            {**picture, "control_image": PICTURE},
            controlnet=_controlnet,
        )
        add(
            model, f"{prefix}ControlNetInpaintPipeline", "", {**holes, "control_image": PICTURE}, controlnet=_controlnet
        )
        add(model, f"{prefix}AdapterPipeline", "T2I-Adapter", control, adapter=_adapter)
        scaled = {**controls, "adapter_conditioning_scale": [0.7, 0.5]}
        add(model, f"{prefix}AdapterPipeline", "two T2I-Adapters", scaled, adapter=_adapters)
        guided = {"image": PICTURE, "image_guidance_scale": 1.5}
        add(model, f"{prefix}InstructPix2PixPipeline", "", guided, channels=8)
        add(model, plain, "IP-Adapter", embeds, of_plain(_with_ip_adapter))
        add(model, plain, "LoRA", {}, of_plain(lambda pipe: _with_loras(pipe, {"one": 1.0})))
        add(
            model, plain, "two LoRAs, weighted", {}, of_plain(lambda pipe: _with_loras(pipe, {"one": 0.7, "two": -0.4}))
        )
        swapped = of_plain(lambda pipe: _with_loras(pipe, {"one": 1.0, "two": 0.0}))
        add(model, plain, "LoRAs, swapped between edits", {}, swapped, (_to_second_lora, _to_first_lora))
        add(model, plain, "FreeU", {}, of_plain(_with_freeu))
        add(model, plain, "tiny VAE", {}, lambda model=model, plain=plain: _with_tiny_vae(model, plain))
        add(model, plain, "no guidance", {"guidance_scale": 1.0})
        add(model, plain, "guidance rescaled, two pictures", {"guidance_rescale": 0.7, "num_images_per_prompt": 2})
        add(model, f"{prefix}PAGPipeline", "perturbed attention off", {"pag_scale": 0.0})
        add(model, f"{prefix}PAGPipeline", "perturbed attention", {"pag_scale": 3.0})
    union = {"control_image": [PICTURE], "control_mode": [0]}
    add("SDXL", "StableDiffusionXLControlNetUnionPipeline", "", union, controlnet=_union)
    depth = {"image": PICTURE, "depth_map": torch.rand(1, 32, 32), "strength": 0.8}
    add("SD", "StableDiffusionDepth2ImgPipeline", "", depth, channels=5, depth_estimator=None)
    add("SDXL", "StableDiffusionXLPipeline", "denoising_end=0.8", {"denoising_end": 0.8, "num_inference_steps": 8})
    refined = {"image": torch.randn(1, 4, 16, 16), "denoising_start": 0.5, "num_inference_steps": 8}
    add("SDXL", "StableDiffusionXLImg2ImgPipeline", "refiner, denoising_start=0.5", refined)
    few = {"num_inference_steps": 4, "guidance_scale": 8.0}
    add("SD", "LatentConsistencyModelPipeline", "", few, lambda: _lcm("LatentConsistencyModelPipeline"))
    add(
        "SD",
        "LatentConsistencyModelImg2ImgPipeline",
        "",
        {**few, **picture},
        lambda: _lcm("LatentConsistencyModelImg2ImgPipeline"),
    )
    return made


KINDS = {f"{kind.model} {kind}": kind for kind in _kinds()}
