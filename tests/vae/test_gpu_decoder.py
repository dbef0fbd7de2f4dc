"""The sparse decoder on a GPU: the CPU's result, and one CUDA graph a bucket."""

from __future__ import annotations

import pytest
import torch
from support.vaes import KINDS, Decodes

import fisedit_compile.vae.sparse_decoder as sparse_decoder
from fisedit_compile.errors import CaptureError
from fisedit_compile.masks.grown import grown
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(sparse_decoder.DENSE_ABOVE, device, 1.0)


def square(size: int, at: int = 2) -> torch.Tensor:
    mask = torch.zeros(2, 24, 18, dtype=torch.bool)
    mask[0, at : at + size, at : at + size] = mask[1, 10 : 10 + size, 4 : 4 + size] = True
    return mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cpu_s_result_in_full_precision(kind: str, dtype: torch.dtype) -> None:
    gpu = Decodes(kind, dtype, size=(24, 18), device="cuda")
    exact = gpu.in_full_precision(kind)
    for size in (1, 4, 8):
        out = gpu.sparse(gpu.changed(square(size)), 2)
        assert out.dtype is dtype
        wanted = exact.sparse(exact.changed(square(size)), 2)
        assert_close(out.cpu(), wanted.to(dtype), dtype=dtype)
        outside = ~gpu.pixels(grown(square(size), 2))
        assert torch.equal(out[outside], gpu.picture[outside])


def test_one_capture_a_bucket() -> None:
    gpu = Decodes("kl", torch.bfloat16, size=(24, 18), device="cuda")
    masks = [square(size, at) for size in (3, 8) for at in (1, 2, 4)]
    first = [gpu.sparse(gpu.changed(mask)) for mask in masks]
    buckets = {gpu.prepare(gpu.changed(mask)).bucket for mask in masks}
    assert gpu.decoder.captures == len(buckets) < len(masks)
    again = [gpu.sparse(gpu.changed(mask)) for mask in reversed(masks)]
    assert all(torch.equal(*pair) for pair in zip(first, reversed(again), strict=True))
    assert gpu.decoder.captures == len(buckets)


def test_its_plan_is_the_host_s() -> None:
    gpu = Decodes("kl", torch.bfloat16, size=(24, 18), device="cuda")
    (program,) = gpu.decoder._programs
    plans = [program.lowered.plan(square(5).to(device)) for device in ("cpu", "cuda")]
    for request in program.lowered.plan_requests:
        one, other = (plan.tensor(request) for plan in plans)
        assert other.is_cuda
        assert torch.equal(one, other.cpu()), request


def test_full_precision_is_left_to_the_autoencoder() -> None:
    with pytest.raises(CaptureError, match=r"runs in torch\.float32 on a GPU"):
        Decodes("kl", device="cuda")
