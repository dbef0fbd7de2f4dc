"""What an exported graph cannot stand for is refused by name before anything is computed; hooks go in, or are named."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import tomesd
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from support.pipelines import EDIT, generate, left_half
from support.unets import MICRO

from fisedit_compile import Base, CaptureError, Editor, sparsify
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(**MICRO).eval().requires_grad_(False)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 16, 16, generator=generator),
        torch.tensor(500),
        torch.randn(2, 7, MICRO["cross_attention_dim"], generator=generator),
    )


def _group_offload(unet: Any) -> None:
    unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def _sequential_offload(unet: Any) -> None:
    accelerate.cpu_offload(unet, execution_device=CPU)


def _casting(unet: Any) -> None:
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _token_merging(unet: Any) -> None:
    tomesd.apply_patch(unet, ratio=0.5)


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "group offload": (_group_offload, r"group offloading .*enable_model_cpu_offload\(\) works"),
    "sequential offload": (_sequential_offload, r"sequential CPU offload.*enable_model_cpu_offload\(\) works"),
    "layerwise casting": (_casting, r"layerwise casting .* load the U-Net without enable_layerwise_casting\(\)"),
    "token merging": (_token_merging, r"token merging \(tomesd\) .* call tomesd.remove_patch\(pipe\) first"),
    "training": (lambda unet: unet.train(), r"training mode: call unet.eval\(\) first"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name_before_anything_is_computed(name: str, unet: Any, inputs: Any) -> None:
    change, words = REFUSED[name]
    sparse = sparsify(unet)
    sparse.look()
    change(unet)
    calls: list[object] = []
    unet.conv_in.register_forward_pre_hook(lambda module, args: calls.append(module))
    for refused in (sparse.look, lambda: sparse.record(sparse.call(*inputs)), lambda: sparse.explain(*inputs)):
        with pytest.raises(CaptureError, match=words):
            refused()
    assert not calls


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_is_refused(device: str, unet: Any, inputs: Any, tiny_editor: Editor, tiny_base: Base) -> None:
    sparse = sparsify(unet, {"dense_below": 4})
    call = sparse.call(*inputs)
    _, cache = sparse.record(call)
    prepared = sparse.prepare(call, left_half()[None])
    with torch.autocast(device, torch.bfloat16):
        torch.set_autocast_enabled(device, True)  # there may be no such device
        for refused in (
            lambda: sparse.record(call),
            lambda: sparse.step(call, cache, prepared),
            lambda: generate(tiny_editor),
            lambda: tiny_editor.edit(tiny_base, EDIT, left_half()),
        ):
            with pytest.raises(CaptureError, match=rf"torch.autocast\('{device}'\) is on"):
                refused()
    assert tiny_editor.edit(tiny_base, EDIT, left_half()).report.background_identical


@torch.no_grad()
def test_what_was_refused_works_once_it_is_taken_off(unet: Any, inputs: Any) -> None:
    sparse = sparsify(unet)
    before = sparse.look()
    plain = unet(*inputs).sample
    tomesd.apply_patch(unet, ratio=0.5)
    unet(*inputs)
    tomesd.remove_patch(unet)
    assert_close(sparse.record(sparse.call(*inputs))[0], plain)
    assert sparse.look() == before


@torch.no_grad()
def test_model_offload_is_captured_from_the_unet_without_its_hook(unet: Any, inputs: Any) -> None:
    plain = unet(*inputs).sample
    sparse = sparsify(unet)
    before = sparse.look()
    before.digest()
    _, hook = accelerate.cpu_offload_with_hook(unet, execution_device=CPU)
    with sparse.looked_at() as state:
        assert state == before
        assert_close(sparse.record(sparse.call(*inputs))[0], plain)
    hook.offload()
    assert_close(unet(*inputs).sample, plain)
    assert_close(sparse.record(sparse.call(*inputs))[0], plain)


@torch.no_grad()
def test_hooks_of_the_unet_are_given_what_the_pipeline_gives(unet: Any, inputs: Any) -> None:
    """Within the capture, too: positional arguments are positional ones there."""
    unet.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))
    sparse = sparsify(unet)
    call = sparse.call(*inputs[:2], encoder_hidden_states=inputs[2])
    assert_close(sparse.record(call)[0], unet(*inputs[:2], encoder_hidden_states=inputs[2]).sample)
    assert_close(sparse.dense(call), unet(*inputs[:2], encoder_hidden_states=inputs[2]).sample)


class Storing(AttnProcessor2_0):
    """Keeps what it computes, as those do that show or control attention."""

    def __init__(self, stored: list[Any]) -> None:
        self.stored = stored

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        self.stored.append(out)
        return out


STORED: list[Any] = []


class StoringGlobally(AttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        STORED.append(out)
        return out


@torch.no_grad()
@pytest.mark.parametrize("globally", [False, True])
def test_a_processor_that_stores_is_refused_and_nothing_is_left_in_its_store(
    unet: Any, inputs: Any, globally: bool
) -> None:
    stored = STORED if globally else []
    stored.clear()
    unet.set_attn_processor(StoringGlobally() if globally else Storing(stored))
    sparse = sparsify(unet)
    with pytest.raises(CaptureError, match=r"changes what it holds \(.*(stored|STORED).*Take off"):
        sparse.record(sparse.call(*inputs))
    assert stored == []
    unet(*inputs)
    assert len(stored) == 8
    unet.set_attn_processor(AttnProcessor2_0())
    assert_close(sparse.record(sparse.call(*inputs))[0], unet(*inputs).sample)


@torch.no_grad()
def test_a_hook_that_counts_is_refused_by_name(unet: Any, inputs: Any) -> None:
    counted = [0]

    def count(module: Any, args: Any) -> None:
        counted[0] += 1

    handle = unet.mid_block.register_forward_pre_hook(count)
    sparse = sparsify(unet)
    with pytest.raises(CaptureError, match=r"hook .*count of mid_block: changed.*Take off"):
        sparse.record(sparse.call(*inputs))
    assert counted == [0]
    handle.remove()
    sparse.record(sparse.call(*inputs))


class Asking(AttnProcessor):
    """Decides by the value of a tensor."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.sum() > 0:
            hidden_states = hidden_states * 2
        return super().__call__(attn, hidden_states, *args, **kwargs)


def _fails(module: Any, args: Any) -> None:
    raise LookupError("no such thing")


FAILING: dict[str, tuple[Callable[[Any], object], tuple[str, ...]]] = {
    "processor": (
        lambda unet: unet.set_attn_processor(Asking()),
        (
            "in down_blocks.0",
            "if hidden_states.sum() > 0:",
            "attention processor Asking",
            "set_attn_processor(AttnProcessor2_0())",
        ),
    ),
    "hook": (
        lambda unet: unet.mid_block.resnets[0].register_forward_pre_hook(_fails),
        ("LookupError: no such thing", "in mid_block.resnets.0", "hook _fails of mid_block.resnets.0: take it off"),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FAILING)
def test_an_error_of_the_capture_says_where_and_what_fits_its_cause(name: str, unet: Any, inputs: Any) -> None:
    change, words = FAILING[name]
    change(unet)
    sparse = sparsify(unet)
    with pytest.raises(CaptureError) as error:
        sparse.record(sparse.call(*inputs))
    for each in words:
        assert each in str(error.value)


@torch.no_grad()
def test_arguments_that_the_unet_itself_fails_on_are_said_to_be_at_fault(unet: Any, inputs: Any) -> None:
    sparse = sparsify(unet)
    sample, timestep, text = inputs
    with pytest.raises(CaptureError, match=r"attn2(?s:.*)arguments, too, they are at fault") as error:
        sparse.record(sparse.call(sample, timestep, text[:, :, :3]))
    assert "processor" not in str(error.value).splitlines()[-1]


@torch.no_grad()
def test_signature_and_export_of_the_unet_are_its_own(unet: Any, inputs: Any) -> None:
    before = inspect.signature(unet.forward)
    sparse = sparsify(unet)
    with sparse.looked_at():
        sparse.record(sparse.call(*inputs))
        assert inspect.signature(unet.forward) == before
        exported = torch.export.export(unet, inputs, {"return_dict": False}, strict=False)
    assert_close(exported.module()(*inputs, return_dict=False)[0], unet(*inputs).sample)
    assert "forward" not in vars(unet)
