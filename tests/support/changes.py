"""What users change of a U-Net between two pictures: one table, for each of the ways in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import peft
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from support.unets import MICRO


def add_ip_adapter(unet: Any) -> None:
    """An IP-Adapter of four tokens, without files."""
    text = MICRO["cross_attention_dim"]
    projection = ImageProjection(image_embed_dim=10, cross_attention_dim=text, num_image_text_embeds=4)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        image = IPAdapterAttnProcessor2_0(hidden_size=width, cross_attention_dim=text, num_tokens=(4,))
        processors[name] = AttnProcessor2_0() if "attn1" in name else image
    unet.set_attn_processor(processors)


class Weaker(AttnProcessor):
    """An attention processor of a user's."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(*args, **kwargs) * self.share


def adapters(unet: Any, *names: str) -> None:
    for name in names:
        lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        unet.add_adapter(lora, adapter_name=name)
    if names:
        unet.set_adapters([names[0]], [0.5])


def as_it_is(unet: Any) -> None:
    """Prepares nothing."""


def with_snow(unet: Any) -> None:
    adapters(unet, "snow")


def with_snow_and_rain(unet: Any) -> None:
    adapters(unet, "snow", "rain")


@dataclass(frozen=True)
class Change:
    """What is done to a U-Net and taken back, the words of the difference, and what is prepared before the base.

    Changes that are prepared alike and do not round are made to one U-Net, one after another.
    """

    do: Callable[[Any], object]
    undo: Callable[[Any], object]
    words: str
    prepare: Callable[[Any], object] = as_it_is
    arguments: dict[str, Any] = field(default_factory=dict)
    rounds: bool = False  # taking it back leaves other last bits


def weights(unet: Any, factor: float) -> None:
    unet.load_state_dict({name: each * factor for name, each in unet.state_dict().items()})


def scale_in_place(unet: Any, factor: float) -> None:
    for each in unet.mid_block.parameters():
        each.data *= factor  # version counters stay as they are


HOOKS: list[Any] = []


def hooked(unet: Any) -> None:
    HOOKS[:] = [unet.conv_in.register_forward_hook(lambda module, args, out: out * 0.5)]


def exchange(unet: Any, add: float) -> None:
    for module in unet.mid_block.modules():
        for name, each in list(module._parameters.items()):
            if each is not None:
                setattr(module, name, torch.nn.Parameter(each.detach() + add, requires_grad=False))


def ip_adapter_scale(unet: Any, scale: float) -> None:
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]


CHANGES = {
    "FreeU": Change(
        lambda unet: unet.enable_freeu(0.9, 0.2, 1.3, 1.4), lambda unet: unet.disable_freeu(), "FreeU: off -> on"
    ),
    "FreeU off": Change(
        lambda unet: unet.disable_freeu(),
        lambda unet: unet.enable_freeu(0.9, 0.2, 1.3, 1.4),
        "FreeU: on -> off",
        prepare=lambda unet: unet.enable_freeu(0.9, 0.2, 1.3, 1.4),
    ),
    "LoRA weight": Change(
        lambda unet: unet.set_adapters(["snow"], [1.0]),
        lambda unet: unet.set_adapters(["snow"], [0.5]),
        "LoRA adapter 'snow': weight 0.5 -> 1.0",
        prepare=with_snow,
    ),
    "LoRA switched": Change(
        lambda unet: unet.set_adapters(["rain"], [0.5]),
        lambda unet: unet.set_adapters(["snow"], [0.5]),
        "active LoRA adapters: 'snow' -> 'rain'",
        prepare=with_snow_and_rain,
    ),
    "LoRAs joined": Change(
        lambda unet: unet.set_adapters(["snow", "rain"], [0.5, 0.5]),
        lambda unet: unet.set_adapters(["snow"], [0.5]),
        "active LoRA adapters: 'snow' -> 'snow', 'rain'",
        prepare=with_snow_and_rain,
    ),
    "LoRA disabled": Change(
        lambda unet: unet.disable_adapters(),
        lambda unet: unet.enable_adapters(),
        "LoRA adapters: on -> off",
        prepare=with_snow,
    ),
    "LoRA fused": Change(
        lambda unet: unet.fuse_lora(),
        lambda unet: unet.unfuse_lora(),
        "LoRA adapter 'snow': fused; weights of .*",
        prepare=with_snow,
        rounds=True,
    ),
    "LoRA fused and disabled": Change(
        lambda unet: unet.disable_adapters(),
        lambda unet: (unet.enable_adapters(), unet.fuse_lora()),
        "LoRA adapters: on -> off; LoRA adapter 'snow': no longer fused; weights of .*",
        prepare=lambda unet: (adapters(unet, "snow"), unet.fuse_lora()),
        rounds=True,
    ),
    "LoRA added": Change(
        lambda unet: adapters(unet, "snow"),
        lambda unet: unet.unload_lora(),
        "LoRA adapter 'snow': added",
    ),
    "processor": Change(
        lambda unet: unet.set_attn_processor(Weaker(0.5)),
        lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
        "attention processor of .* and 7 more: AttnProcessor2_0 -> Weaker",
    ),
    "value of a processor": Change(
        lambda unet: unet.set_attn_processor(Weaker(0.3)),
        lambda unet: unet.set_attn_processor(Weaker(0.5)),
        "attention processor of .* and 7 more: share: 0.5 -> 0.3",
        prepare=lambda unet: unet.set_attn_processor(Weaker(0.5)),
    ),
    "IP-Adapter scale": Change(
        lambda unet: ip_adapter_scale(unet, 0.2),
        lambda unet: ip_adapter_scale(unet, 1.0),
        r"IP-Adapter scale: \(1.0,\) -> \(0.2,\)",
        prepare=add_ip_adapter,
        arguments={"added_cond_kwargs": {"image_embeds": [torch.ones(2, 1, 10)]}},
    ),
    "hook": Change(hooked, lambda unet: HOOKS.pop().remove(), "hook .*hooked.* of conv_in: added"),
    "load_state_dict": Change(
        lambda unet: weights(unet, 0.5), lambda unet: weights(unet, 2.0), "weights of conv_in and .* more"
    ),
    "weights in place": Change(
        lambda unet: scale_in_place(unet, 0.5), lambda unet: scale_in_place(unet, 2.0), "weights of mid_block.*"
    ),
    "other parameters": Change(
        lambda unet: exchange(unet, 0.5), lambda unet: exchange(unet, -0.5), "weights of mid_block.*", rounds=True
    ),
}


#: For what follows all of them by the same means, and takes seconds for each.
ONE_OF_EACH_KIND = (
    "FreeU",
    "LoRA switched",
    "LoRA fused",
    "value of a processor",
    "IP-Adapter scale",
    "hook",
    "load_state_dict",
    "weights in place",
    "other parameters",
)


def small_unet() -> Any:
    """A U-Net to change. It has one resolution, as changes are of layers: most are traced anew behind each change."""
    torch.manual_seed(0)
    one = {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    unet = diffusers.UNet2DConditionModel(**{**MICRO, **one})
    return unet.eval().requires_grad_(False)
