"""Whether a model is still the same one: by what it computes with, in words, and as a key for other processes."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from support.unets import MICRO
from torch import nn

from fisedit_compile.errors import BaseMismatchError, CaptureError
from fisedit_compile.runtime.model_watch import ModelWatch


def small() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8, 5), nn.Conv2d(2, 2, 1))


def state_of(net: nn.Module) -> Any:
    """Its weights are read, so that it can be compared with states of other objects."""
    watch = ModelWatch(net)
    state = watch.look()
    state.digest()
    return state


def micro() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**MICRO).eval()


class Halved(AttnProcessor):
    """An attention processor of a user's."""

    def __init__(self, share: float = 0.5) -> None:
        self.share = share

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(*args, **kwargs) * self.share


def _add_data(weight: torch.Tensor) -> None:
    weight.data += 0.1  # a LoRA is fused so; the version counter stays


def _add_in_place(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.add_(0.1)


def _write_one(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.view(-1)[-1] = 7.0


# ---- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [_add_data, _add_in_place, _write_one])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "2.weight", "3.bias"])
def test_a_weight_that_is_written_to(name: str, write: Callable[[torch.Tensor], None]) -> None:
    net = small()
    watch = ModelWatch(net)
    before = watch.look()
    before.digest()
    assert watch.look() is before
    write(net.get_parameter(name))
    after = watch.look()
    assert before.difference(after) == f"weights of {name[0]}"
    assert before != after
    assert before.digest() != after.digest()


def test_weights_that_were_written_to_before_they_were_read_are_named_all_the_same() -> None:
    net = small()
    watch = ModelWatch(net)
    before = watch.look()
    net[2].weight.data += 1
    assert before.difference(watch.look()) == "weights of 2"
    with pytest.raises(BaseMismatchError, match="changed since"):
        before.digest()


def test_weights_that_were_taken_back_are_the_same() -> None:
    net = small()
    watch = ModelWatch(net)
    before = watch.look()
    before.digest()
    kept = copy.deepcopy(net.state_dict())
    net.load_state_dict({name: each + 1 for name, each in kept.items()})
    assert before.difference(watch.look()) == "weights of 0 and 3 more"
    net.load_state_dict(kept)
    assert before == watch.look()


def test_other_objects_in_other_memory_with_the_same_values_are_the_same_model() -> None:
    net = small()
    watch = ModelWatch(net)
    before = watch.look()
    before.digest()
    net[0].weight.data = net[0].weight.data.clone()  # as by moving to a device
    assert before == watch.look()
    net[2] = copy.deepcopy(net[2])
    assert before == watch.look()
    assert before == state_of(small())


def test_memory_formats_are_the_same_and_dtypes_are_not() -> None:
    digest = state_of(small()).digest()
    assert ModelWatch(small().to(memory_format=torch.channels_last)).look().digest() == digest
    assert state_of(small().half()).digest() != digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_every_dtype_is_watched(dtype: torch.dtype) -> None:
    net = small()
    net.register_buffer("other", torch.ones(3, 7).to(dtype))
    watch = ModelWatch(net)
    before = watch.look()
    before.digest()
    net.other.data.copy_(torch.full((3, 7), 2.0).to(dtype))
    assert before.difference(watch.look()) == "weights of other"


def test_a_weight_that_is_no_block_of_memory_is_watched_too() -> None:
    net = nn.Linear(6, 4)
    net.weight = nn.Parameter(torch.randn(4, 12)[:, ::2])
    watch = ModelWatch(net)
    before = watch.look()
    assert watch.look() is before
    net.weight.data += 1
    assert before != watch.look()


def test_a_model_without_weights_and_one_on_the_meta_device() -> None:
    assert state_of(nn.SiLU()) == state_of(nn.SiLU())
    with torch.device("meta"):
        assert state_of(nn.Linear(2, 3)) == state_of(nn.Linear(2, 3))
        assert state_of(nn.Linear(2, 3)) != state_of(nn.Linear(2, 4))


def test_a_look_in_inference_mode_and_one_without() -> None:
    with torch.inference_mode():
        net = small()
        watch = ModelWatch(net)
        before = watch.look()
    assert watch.look() is before
    net[2].weight.data += 1
    assert watch.look() != before


# ---- behaviour ---------------------------------------------------------------------------------------------------


def _lists_of_a_processor(unet: Any) -> Callable[[], object]:
    processor = Halved()
    processor.scale = [0.5, [1.0]]  # type: ignore[attr-defined]
    unet.set_attn_processor(processor)
    return lambda: processor.scale[1].append(2.0)  # type: ignore[attr-defined]


def _closure_of_a_hook(unet: Any) -> Callable[[], object]:
    factor = 1.0

    def set_factor() -> None:
        nonlocal factor
        factor = 2.0

    unet.conv_in.register_forward_hook(lambda module, args, out: out * factor)
    return set_factor


FACTOR = {"value": 1.0}


def _global_of_a_hook(unet: Any) -> Callable[[], object]:
    FACTOR["value"] = 1.0
    unet.conv_in.register_forward_hook(lambda module, args, out: out * FACTOR["value"])
    return lambda: FACTOR.update(value=2.0)


def _global_of_another_module(unet: Any) -> Callable[[], object]:
    namespace: dict[str, Any] = {"module": sys.modules[__name__]}
    exec("def hook(module_, args, out): return out * module.FACTOR['value']", namespace)
    FACTOR["value"] = 1.0
    unet.conv_in.register_forward_hook(namespace["hook"])
    return lambda: FACTOR.update(value=3.0)


def _tensor_of_a_processor(unet: Any) -> Callable[[], object]:
    processor = Halved(torch.tensor(0.5))  # type: ignore[arg-type]
    unet.set_attn_processor(processor)
    return lambda: processor.share.mul_(2)  # type: ignore[attr-defined]


CHANGES: dict[str, tuple[Callable[[Any], Callable[[], object]], str]] = {
    "FreeU on": (lambda unet: lambda: unet.enable_freeu(0.9, 0.2, 1.1, 1.2), "FreeU: off -> on"),
    "FreeU other": (
        lambda unet: unet.enable_freeu(0.9, 0.2, 1.1, 1.2) or (lambda: unet.enable_freeu(0.8, 0.2, 1.1, 1.2)),
        "FreeU: s1 0.9 -> 0.8",
    ),
    "processor": (
        lambda unet: lambda: unet.set_attn_processor(Halved()),
        r"attention processor of .* and 7 more: AttnProcessor2_0 -> Halved",
    ),
    "value of a processor": (
        lambda unet: unet.set_attn_processor(Halved()) or (lambda: unet.set_attn_processor(Halved(0.3))),
        r"attention processor of .* and 7 more: share: 0.5 -> 0.3",
    ),
    "list of a processor": (_lists_of_a_processor, r"attention processor of .*: scale.*"),
    "tensor of a processor": (_tensor_of_a_processor, r"weights of .*processor"),
    "hook": (
        lambda unet: lambda: unet.conv_in.register_forward_hook(print),
        r"hook .*print of conv_in: added",
    ),
    "closure of a hook": (_closure_of_a_hook, r"hook .*lambda.* of conv_in: changed"),
    "global of a hook": (_global_of_a_hook, r"hook .*lambda.* of conv_in: changed"),
    "global of another module": (_global_of_another_module, r"hook .*hook of conv_in: changed"),
    "attribute": (
        lambda unet: lambda: setattr(unet.mid_block.resnets[0], "output_scale_factor", 2.0),
        r"mid_block.resnets.0.output_scale_factor: 1 -> 2.0",
    ),
    "config": (lambda unet: lambda: unet.register_to_config(sample_size=24), r"config.sample_size: 16 -> 24"),
    "module": (
        lambda unet: lambda: setattr(unet, "conv_act", nn.GELU()),
        r"conv_act: torch.nn.modules.activation.SiLU -> .*GELU",
    ),
    "method": (
        lambda unet: lambda: setattr(unet.mid_block, "forward", lambda *args, **kwargs: args[0]),
        r"mid_block.forward.*",
    ),
    "training": (lambda unet: lambda: unet.mid_block.train(), r"mid_block.*training: False -> True.*"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_behaviour_is_seen_and_named(name: str) -> None:
    prepare, words = CHANGES[name]
    unet = micro()
    change = prepare(unet)
    watch = ModelWatch(unet)
    before = watch.look()
    before.digest()
    assert watch.look() is before
    change()
    after = watch.look()
    difference = before.difference(after)
    assert re.fullmatch(words, difference), difference
    assert after != before
    assert watch.look() is after


def test_a_function_that_is_exchanged_for_all_processors_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = ModelWatch(micro())
    before = watch.look()
    plain = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: plain(*args, **kwargs))
    assert "scaled_dot_product_attention" in before.difference(watch.look())


def test_a_method_of_a_librarys_class_that_is_exchanged_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = micro()
    unet.set_attn_processor(AttnProcessor())
    watch = ModelWatch(unet)
    before = watch.look()
    plain = AttnProcessor.__call__
    monkeypatch.setattr(AttnProcessor, "__call__", lambda self, *args, **kwargs: 0.5 * plain(self, *args, **kwargs))
    assert "AttnProcessor.__call__" in before.difference(watch.look())


def test_what_is_switched_off_again_is_the_same() -> None:
    unet = micro()
    watch = ModelWatch(unet)
    before = watch.look()
    default = unet.attn_processors
    unet.enable_freeu(0.9, 0.2, 1.1, 1.2)
    unet.set_attn_processor(Halved())
    handle = unet.register_forward_pre_hook(lambda module, args: None)
    assert watch.look() != before
    unet.disable_freeu()
    unet.set_attn_processor(default)
    handle.remove()
    assert watch.look() == before


def test_two_objects_that_behave_alike_are_the_same() -> None:
    first, second = micro(), micro()
    for unet in (first, second):
        unet.set_attn_processor(Halved(0.3))
        unet.register_forward_pre_hook(lambda module, args: None)
    assert state_of(first) == state_of(second)


# ---- states ------------------------------------------------------------------------------------------------------


def test_a_state_is_plain_data_and_holds_no_model() -> None:
    net = small()
    watch = ModelWatch(net)
    state = watch.look()
    loaded = pickle.loads(pickle.dumps(state))
    assert loaded == state == copy.deepcopy(state)
    assert hash(loaded) == hash(state)
    net[0].bias.data += 1
    assert loaded.difference(watch.look()) == "weights of 0"
    gone = weakref.ref(net)
    del net, watch
    gc.collect()
    assert gone() is None
    assert state == loaded  # it was read while the model was there


def test_weights_may_move_before_they_are_read() -> None:
    net = small()
    watch = ModelWatch(net)
    state = watch.look()
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()  # as from one device to another
    assert state.digest() == watch.look().digest()


def test_a_digest_is_the_same_in_every_process() -> None:
    code = (
        "import torch; from fisedit_compile.runtime.model_watch import ModelWatch; torch.manual_seed(0);"
        "net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.BatchNorm2d(8)); net.words = {'a', 'b', 'c'};"
        "net.register_forward_hook(lambda module, args, out: out * 2 if out.ndim in {3, 4, 5} else out);"
        "watch = ModelWatch(net); print(watch.look().digest())"
    )
    seen = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(seen) == 1


# ---- side effects ------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its calls and stores what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.stored, self.known = 0, [], {"first": 1}


def test_what_a_run_changes_is_refused_by_name_and_put_back() -> None:
    net = Counting()
    watch = ModelWatch(net)
    before = watch.look()

    def run() -> None:
        with watch.left_alone("the model"):
            net.calls += 1
            net.stored.append(torch.zeros(2))
            net.known.clear()
            net.new = 3

    with pytest.raises(CaptureError, match=r"the model changes what it holds \(calls: 0 -> 1"):
        run()
    assert (net.calls, net.stored, net.known, hasattr(net, "new")) == (0, [], {"first": 1}, False)
    assert watch.look() is before
    with pytest.raises(ZeroDivisionError), watch.left_alone("the model"):
        net.calls = 1 / 0
    assert net.calls == 0


def test_what_a_run_takes_back_itself_is_its_own_matter() -> None:
    net = Counting()
    watch = ModelWatch(net)
    with watch.left_alone("the model"):
        net.calls += 1
        net.calls -= 1
