"""The invariants on a CUDA device, at the true Stable Diffusion shapes and in the dtypes that people run there."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from fisedit_compile.architectures import build_unet, unet_inputs
from fisedit_compile.masks.sample_masks import square_mask
from fisedit_compile.sparse_unet import sparsify
from fisedit_compile.testing import TOLERANCES, assert_close, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ieee_fp32")]

#: arch -> image size. The tiny one runs every dtype; the true shapes, those that fit their weights.
SHAPES = {"tiny": 512, "sd2": 768, "sdxl": 1024}
CASES = [("tiny", torch.float32), ("tiny", torch.float16), ("tiny", torch.bfloat16), ("sd2", torch.bfloat16),
         ("sd2", torch.float16), ("sdxl", torch.bfloat16)]  # fmt: skip


shapes = pytest.mark.parametrize(("arch", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))


@cache
def recorded(arch: str, dtype: torch.dtype, attention: str = "full") -> tuple[Any, Any, torch.Tensor, Any]:
    """A sparse U-Net on the GPU, a call of it, its noise prediction and its cache, which is exact."""
    unet = build_unet(arch, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    args, kwargs = unet_inputs(unet, batch=2, height=SHAPES[arch], width=SHAPES[arch])
    sparse = sparsify(unet, {"attention": attention, "cache": "exact"})
    call = sparse.call(*args, **kwargs)
    return sparse, call, *sparse.record(call)


def latents_mask(call: Any, share: float) -> torch.Tensor:
    _, _, height, width = call.signature.sample_shape
    return square_mask(share, (height, width))


@shapes
def test_unchanged_inputs_reproduce_the_base(arch, dtype):
    sparse, call, out, cache = recorded(arch, dtype)
    edited = sparse.step(call, cache, sparse.prepare(call, latents_mask(call, 0.15)))
    assert_close(edited, out, dtype)


@shapes
def test_an_empty_mask_is_the_base(arch, dtype):
    sparse, call, out, cache = recorded(arch, dtype)
    empty = torch.zeros_like(latents_mask(call, 0.15))
    assert torch.equal(sparse.step(call, cache, sparse.prepare(call, empty)), out)


@shapes
def test_a_full_mask_is_the_dense_unet(arch, dtype):
    sparse, call, out, cache = recorded(arch, dtype)
    poisoned = {entry: value * float("nan") if entry.kind == "map" else value for entry, value in cache.items()}
    full = torch.ones_like(latents_mask(call, 0.15))
    assert_close(sparse.step(call, poisoned, sparse.prepare(call, full)), out, dtype)


@shapes
def test_changed_latents_change_the_mask_alone_and_the_same_way_twice(arch, dtype):
    sparse, call, out, cache = recorded(arch, dtype)
    mask = latents_mask(call, 0.15)
    sample = call.tensors[0]
    changed = torch.where(mask[:, None].cuda(), sample + 0.5, sample)
    new = sparse.call(**{**call.kwargs, "sample": changed})
    prepared = sparse.prepare(call, mask)
    first, second = (sparse.step(new, cache, prepared) for _ in range(2))
    outside = ~mask[:, None].cuda().expand_as(out)
    assert torch.equal(first[outside], out[outside])
    assert torch.equal(first, second)
    assert relative_error(first[~outside], out[~outside]) > TOLERANCES[torch.float32]


@pytest.mark.parametrize("mode", ["balanced", "small"])
@pytest.mark.parametrize(("arch", "dtype"), [("tiny", torch.float32), *CASES[1:4], CASES[5]], ids=str)
def test_a_packed_base_is_near_an_exact_one(arch, dtype, mode):
    sparse, call, out, cache = recorded(arch, dtype)
    packed = sparsify(sparse.unet, {"cache": mode})
    same, kept = packed.record(call)
    assert torch.equal(same, out)
    assert sum(each.nbytes for each in kept.values()) < 0.4 * sum(each.nbytes for each in cache.values())
    mask = latents_mask(call, 0.15)
    changed = torch.where(mask[:, None].cuda(), call.tensors[0] + 0.5, call.tensors[0])
    new = sparse.call(**{**call.kwargs, "sample": changed})
    exact = sparse.step(new, cache, sparse.prepare(call, mask))
    step = packed.step(new, kept, packed.prepare(call, mask))
    assert relative_error(step, exact) < (0.2 if mode == "small" else 0.04)
    left = ~mask[:, None].cuda().expand_as(out)
    assert torch.equal(step[left], out[left])


def test_masked_attention_agrees_with_the_cpu():
    sparse, call, _, cache = recorded("tiny", torch.float32, "masked")
    mask = latents_mask(call, 0.15)
    on_gpu = sparse.step(call, cache, sparse.prepare(call, mask))
    unet = build_unet("tiny", dtype=torch.float32)
    unet.load_state_dict(sparse.unet.state_dict())
    reference = sparsify(unet, {"attention": "masked"})
    moved = reference.call(*(tensor.cpu() for tensor in call.tensors))
    kept = {entry: value.cpu() for entry, value in cache.items()}
    wanted = reference.step(moved, kept, reference.prepare(moved, mask))
    assert_close(on_gpu.cpu(), wanted, torch.float16)  # convolutions on the GPU may use TF32
