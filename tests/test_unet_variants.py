"""The invariants for what diffusers builds and hooks into a U-Net beyond the three architectures, fp64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from support.changes import add_ip_adapter
from support.unets import MICRO

from fisedit_compile import sparsify
from fisedit_compile.testing import assert_close

BATCH, TOKENS, SIDE = 2, 7, 16
TEXT = MICRO["cross_attention_dim"]
DTYPE = torch.float64

SIMPLE_BLOCKS = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE)


def no_arguments() -> dict[str, Any]:
    return {}


def unchanged(unet: UNet2DConditionModel) -> None:
    """Nothing is hooked into the U-Net."""


@dataclass(frozen=True)
class Variant:
    """``config`` beside that of the micro U-Net, ``arguments`` of a call, ``change`` what is done to the U-Net."""

    config: dict[str, Any] = field(default_factory=dict)
    arguments: Callable[[], dict[str, Any]] = no_arguments
    change: Callable[[UNet2DConditionModel], object] = unchanged


def residuals() -> dict[str, Any]:
    """What a ControlNet adds to the skip connections and to the middle."""
    shapes = ((16, 16), (16, 16), (16, 8), (32, 8))
    return {
        "down_block_additional_residuals": tuple(normal(BATCH, c, side, side) for c, side in shapes),
        "mid_block_additional_residual": normal(BATCH, 32, 8, 8),
    }


def boxes() -> dict[str, Any]:
    """GLIGEN's grounding."""
    boxes, real = torch.rand(BATCH, 3, 4, dtype=DTYPE), torch.ones(BATCH, 3, dtype=DTYPE)
    phrases = normal(BATCH, 3, TEXT)
    return {"cross_attention_kwargs": {"gligen": {"boxes": boxes, "positive_embeddings": phrases, "masks": real}}}


VARIANTS = {
    "class labels": Variant({"num_class_embeds": 5}, lambda: {"class_labels": torch.tensor([1, 3])}),
    "class labels beside the time embedding": Variant(
        {"num_class_embeds": 5, "class_embeddings_concat": True}, lambda: {"class_labels": torch.tensor([1, 3])}
    ),
    "noise level as class": Variant({"class_embed_type": "timestep"}, lambda: {"class_labels": torch.tensor([10, 30])}),
    "image embedding as class": Variant(
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
        lambda: {"class_labels": normal(BATCH, 12)},
    ),
    "images beside the text": Variant(
        {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj", "encoder_hid_dim": TEXT},
        lambda: {"added_cond_kwargs": {"image_embeds": normal(BATCH, TEXT), "text_embeds": normal(BATCH, TEXT)}},
    ),
    "guidance as part of the time embedding": Variant(
        {"time_cond_proj_dim": 12}, lambda: {"timestep_cond": normal(BATCH, 12)}
    ),
    "Fourier features of the time": Variant({"time_embedding_type": "fourier", "time_embedding_dim": 32}),
    "scale and shift by the time": Variant({"resnet_time_scale_shift": "scale_shift"}),
    "blocks of DeepFloyd and Kandinsky": Variant({**SIMPLE_BLOCKS, "resnet_time_scale_shift": "scale_shift"}),
    "attention without text": Variant(
        {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
    ),
    "no middle": Variant({"mid_block_type": None}),
    "cross-attention alone": Variant({"only_cross_attention": True}),
    "first convolution 5x5, last 1x1": Variant({"conv_in_kernel": 5, "conv_out_kernel": 1}),
    "inpainting": Variant({"in_channels": 9}),
    "mish, two layers a block": Variant({"act_fn": "mish", "layers_per_block": 2, "transformer_layers_per_block": 2}),
    "text of several lengths": Variant(
        {}, lambda: {"encoder_attention_mask": torch.arange(TOKENS) < torch.tensor([[TOKENS], [4]])}
    ),
    "ControlNet": Variant({}, residuals),
    "T2I-Adapter": Variant(
        {}, lambda: {"down_intrablock_additional_residuals": [normal(BATCH, 16, 16, 16), normal(BATCH, 32, 8, 8)]}
    ),
    "IP-Adapter": Variant({}, lambda: {"added_cond_kwargs": {"image_embeds": [normal(BATCH, 1, 10)]}}, add_ip_adapter),
    "GLIGEN": Variant({"attention_type": "gated"}, boxes),
    "FreeU": Variant(change=lambda unet: unet.enable_freeu(0.9, 0.2, 1.1, 1.2)),
    "one projection for query, key and value": Variant(change=lambda unet: unet.fuse_qkv_projections()),
    "attention in slices": Variant(change=lambda unet: unet.set_attention_slice("max")),
    "attention by two products": Variant(change=lambda unet: unet.set_attn_processor(AttnProcessor())),
}


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_the_unet(name: str) -> None:
    variant = VARIANTS[name]
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**MICRO, **variant.config})
    variant.change(unet)
    unet.to(DTYPE).eval()
    for parameter in unet.parameters():
        parameter += 0.1 * torch.randn_like(parameter)  # new norms and gates do nothing

    sparse = sparsify(unet, {"dense_below": 4})
    options = variant.arguments()
    sample, text = normal(BATCH, unet.config["in_channels"], SIDE, SIDE), normal(BATCH, TOKENS, TEXT)
    base = sparse.call(sample, torch.tensor(500), text, **options)
    edit = sparse.call(sample + normal(*sample.shape), torch.tensor(500), text + normal(*text.shape), **options)
    dense = unet(**base.kwargs, return_dict=False)[0]
    out, cache = sparse.record(base)
    assert_close(out, dense)

    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[:, 4:9, 3:10] = True
    plan = sparse.prepare(base, mask)
    assert_close(sparse.step(base, cache, plan), dense)  # unchanged inputs
    changed = sparse.step(edit, cache, plan)
    outside = ~mask[:, None].expand_as(out)
    assert torch.equal(changed[outside], out[outside])
    assert not torch.allclose(changed[~outside], out[~outside])
    assert torch.equal(sparse.step(edit, cache, sparse.prepare(edit, torch.zeros_like(mask))), out)  # an empty mask
    edited, own = sparse.record(edit)
    assert_close(sparse.step(edit, own, sparse.prepare(edit, torch.ones_like(mask))), edited)  # a full one
