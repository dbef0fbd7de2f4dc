"""Architectures: parameter counts of the published models, finite activations, inputs that fit."""

from __future__ import annotations

import pytest
import torch

from fisedit_compile.architectures import ARCHITECTURES, build_unet, latent_size, unet_inputs

TINY = [arch for arch in ARCHITECTURES if arch.startswith("tiny")]


@pytest.mark.parametrize(("arch", "parameters"), [("sd15", 859_520_964), ("sd2", 865_910_724), ("sdxl", 2_567_463_684)])
def test_published_models_have_their_parameter_count(arch: str, parameters: int) -> None:
    unet = build_unet(arch, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta for p in unet.parameters()), "gigabytes of weights were made"
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("arch", TINY)
def test_tiny_models_are_tiny_and_of_three_resolutions(arch: str) -> None:
    unet = build_unet(arch, device="meta")
    assert 1e6 < sum(p.numel() for p in unet.parameters()) < 3e6
    assert len(unet.down_blocks) == 3
    assert unet.config["cross_attention_dim"] == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", TINY)
def test_activations_keep_their_size(arch: str, dtype: torch.dtype) -> None:
    unet = build_unet(arch, dtype=dtype)
    args, kwargs = unet_inputs(unet, batch=2, height=128, width=64)
    largest: list[float] = []

    def watch(_module: torch.nn.Module, _inputs: object, out: object) -> None:
        if isinstance(out, torch.Tensor):
            largest.append(float(out.abs().max()))

    for module in unet.modules():
        module.register_forward_hook(watch)
    with torch.no_grad():
        out = unet(*args, **kwargs).sample
    assert out.shape == (2, 4, 16, 8)
    assert out.dtype == dtype
    assert 0.1 < float(out.float().std()) < 10
    assert all(value < 1e3 for value in largest)  # fp16 ends at 65,504; NaN fails too
    assert len(largest) > 100


def test_weights_and_inputs_depend_on_the_seed_alone() -> None:
    first, again, other = (build_unet("tiny", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    unet = build_unet("tiny-sdxl", device="meta")
    draws = [unet_inputs(unet, batch=1, height=64, width=64, device="cpu", seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(draws[0][0][0], draws[1][0][0])
    assert not torch.equal(draws[0][0][0], draws[2][0][0])


def test_the_published_models_run_on_meta_with_their_inputs() -> None:
    for arch in ("sd15", "sd2", "sdxl"):
        unet = build_unet(arch, device="meta")
        size = 8 * unet.config["sample_size"]
        args, kwargs = unet_inputs(unet, batch=2, height=size, width=size)
        assert args[1].dtype == torch.int64
        assert args[1].shape == ()
        assert unet(*args, **kwargs).sample.shape == (2, 4, size // 8, size // 8)
    assert kwargs["added_cond_kwargs"]["text_embeds"].shape == (2, 1280)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown architecture 'sd3'; known are tiny, .*sdxl"):
        build_unet("sd3")
    unet = build_unet("tiny", device="meta")
    with pytest.raises(ValueError, match=r"width is 100 pixels.*multiple of 8; 96 is the nearest"):
        unet_inputs(unet, batch=1, height=64, width=100)
    with pytest.raises(ValueError, match="batch is 0"):
        unet_inputs(unet, batch=0, height=64, width=64)
    with pytest.raises(ValueError, match=r"height is 0 pixels.*8 is the nearest"):
        latent_size(0, 8)
    assert latent_size(776, 512) == (97, 64)
