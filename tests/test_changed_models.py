"""What users change of a U-Net between two pictures: the next one is the plain U-Net's, and the old base is refused.

Each change is made and taken back, for each way in: the editor, ``sparsify`` in one's own loop, and the backend.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import peft
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from support.unets import MICRO
from test_unet_variants import add_ip_adapter
from torch.utils._pytree import tree_map_only

from fisedit_compile import BaseMismatchError, Editor, sparsify
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = Path(__file__).parents[1] / "examples" / "demo_model"
CAT, DOG = "a cat on a green background", "a dog on a green background"
SIDE = 16


class Weaker(AttnProcessor):
    """An attention processor of a user's."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(*args, **kwargs) * self.share


@dataclass(frozen=True)
class Change:
    """What is done to a U-Net and taken back, the words of the difference, and what is prepared before the base."""

    do: Callable[[Any], object]
    undo: Callable[[Any], object]
    words: str
    prepare: Callable[[Any], object] = lambda unet: None
    arguments: dict[str, Any] = field(default_factory=dict)
    rounds: bool = False  # taking it back leaves other last bits


def adapters(unet: Any, *names: str) -> None:
    for name in names:
        lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        unet.add_adapter(lora, adapter_name=name)
    if names:
        unet.set_adapters([names[0]], [0.5])


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
        prepare=lambda unet: adapters(unet, "snow"),
    ),
    "LoRA switched": Change(
        lambda unet: unet.set_adapters(["rain"], [0.5]),
        lambda unet: unet.set_adapters(["snow"], [0.5]),
        "active LoRA adapters: 'snow' -> 'rain'",
        prepare=lambda unet: adapters(unet, "snow", "rain"),
    ),
    "LoRAs joined": Change(
        lambda unet: unet.set_adapters(["snow", "rain"], [0.5, 0.5]),
        lambda unet: unet.set_adapters(["snow"], [0.5]),
        "active LoRA adapters: 'snow' -> 'snow', 'rain'",
        prepare=lambda unet: adapters(unet, "snow", "rain"),
    ),
    "LoRA disabled": Change(
        lambda unet: unet.disable_adapters(),
        lambda unet: unet.enable_adapters(),
        "LoRA adapters: on -> off",
        prepare=lambda unet: adapters(unet, "snow"),
    ),
    "LoRA fused": Change(
        lambda unet: unet.fuse_lora(),
        lambda unet: unet.unfuse_lora(),
        "LoRA adapter 'snow': fused; weights of .*",
        prepare=lambda unet: adapters(unet, "snow"),
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


def micro_unet(text: int = MICRO["cross_attention_dim"]) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**{**MICRO, "cross_attention_dim": text})
    return unet.eval().requires_grad_(False)


class OwnLoop:
    """``sparsify`` below one's own loop; one call stands for it."""

    def __init__(self, unet: Any, arguments: dict[str, Any]) -> None:
        generator, device = torch.Generator().manual_seed(1), unet.device
        self.unet = unet
        self.inputs = (
            torch.randn(2, 4, SIDE, SIDE, generator=generator).to(device),
            torch.tensor(500),
            torch.randn(2, 7, MICRO["cross_attention_dim"], generator=generator).to(device),
        )
        self.arguments = tree_map_only(torch.Tensor, lambda each: each.to(device), arguments)
        self.mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
        self.mask[:, 4:9, 3:10] = True
        self.sparse = sparsify(unet, {"dense_below": 4})

    def plain(self) -> torch.Tensor:
        return self.unet(*self.inputs, **self.arguments).sample

    def base(self) -> tuple[torch.Tensor, Any]:
        call = self.sparse.call(*self.inputs, **self.arguments)
        out, cache = self.sparse.record(call)
        cache.model.digest()
        plan = self.sparse.prepare(call, self.mask)
        return out, (call, cache, plan)

    def edit(self, base: Any) -> torch.Tensor:
        call, cache, _ = base
        return self.sparse.step(call, cache, self.sparse.prepare(call, self.mask))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each capture."""
    import fisedit_compile.sparse_unet as module

    made: list[str] = []
    lower = module.lower
    monkeypatch.setattr(module, "lower", lambda *args: made.append("capture") or lower(*args))
    return made


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CHANGES)
def test_in_ones_own_loop(name: str, device: str, captures: list[str]) -> None:
    change = CHANGES[name]
    unet = micro_unet().to(device)
    change.prepare(unet)
    unet.to(device)
    loop = OwnLoop(unet, change.arguments)
    before, old = loop.base()
    assert_close(before, loop.plain())
    change.do(unet)
    changed, new = loop.base()
    assert_close(changed, loop.plain())
    assert not torch.allclose(changed, before)
    assert_close(loop.edit(new), changed)  # the sparse step follows as well
    with pytest.raises(BaseMismatchError) as refusal:
        loop.edit(old)
    found = re.search(
        r"another one than the call was recorded with \((.*)\): record the call again", str(refusal.value)
    )
    assert found is not None, refusal.value
    assert re.fullmatch(change.words, found[1])
    with pytest.raises(BaseMismatchError, match="than it was prepared for"):
        loop.sparse.step(new[0], new[1], old[2])
    made = len(captures)
    change.undo(unet)
    again, _ = loop.base()
    assert_close(again, loop.plain())
    if not change.rounds:
        assert_close(again, before)
        assert_close(loop.edit(old), before)  # the base is of this U-Net
    if name != "other parameters":
        assert len(captures) == made  # going back captures nothing


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """The demo model around a U-Net that captures in a second."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_unet(pipeline: Any) -> Any:
    unet = micro_unet(text=pipeline.unet.config.cross_attention_dim)
    pipe = diffusers.StableDiffusionPipeline(
        **{**pipeline.components, "unet": unet, "safety_checker": None}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments() -> dict[str, Any]:
    size = {"height": 64, "width": 64}
    return {"num_inference_steps": 2, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(3), **size}


def plain(pipe: Any) -> torch.Tensor:
    return pipe(CAT, output_type="latent", **arguments()).images


def box() -> torch.Tensor:
    mask = torch.zeros(SIDE, SIDE)
    mask[4:9, 3:10] = 1
    return mask


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, change in CHANGES.items() if not change.arguments])
def test_in_the_editor(name: str, pipeline: Any) -> None:
    change, pipe = CHANGES[name], with_unet(pipeline)
    change.prepare(pipe.unet)
    editor = Editor(pipe, {"dense_below": 4, "dense_steps": 1})
    old = editor.generate(CAT, **arguments())
    assert_close(old.latents, plain(pipe))
    change.do(pipe.unet)
    new = editor.generate(CAT, **arguments())
    assert_close(new.latents, plain(pipe))
    assert not torch.allclose(new.latents, old.latents)
    assert editor.edit(new, DOG, box()).report.background_identical
    with pytest.raises(BaseMismatchError) as refusal:
        editor.edit(old, DOG, box())
    assert re.search(change.words, str(refusal.value)), refusal.value
    change.undo(pipe.unet)
    assert_close(editor.generate(CAT, **arguments()).latents, plain(pipe))
    if not change.rounds:
        assert editor.edit(old, DOG, box()).report.background_identical


@torch.no_grad()
def test_the_editor_follows_another_unet_and_the_first_one_again(pipeline: Any) -> None:
    pipe = with_unet(pipeline)
    editor = Editor(pipe, {"dense_below": 4, "dense_steps": 1})
    old = editor.generate(CAT, **arguments())
    first = pipe.unet
    pipe.unet = with_unet(pipeline).unet
    weights(pipe.unet, 0.5)
    assert_close(editor.generate(CAT, **arguments()).latents, plain(pipe))
    with pytest.raises(BaseMismatchError, match=r"weights of conv_in and .* more"):
        editor.edit(old, DOG, box())
    pipe.unet = first
    assert_close(editor.generate(CAT, **arguments()).latents, old.latents)
    assert editor.edit(old, DOG, box()).report.background_identical


@torch.no_grad()
def test_a_unet_that_a_callback_changes_on_the_way_is_refused(pipeline: Any) -> None:
    pipe = with_unet(pipeline)
    editor = Editor(pipe, {"dense_below": 4, "dense_steps": 1})

    def callback(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe.unet.enable_freeu(0.9, 0.2, 1.3, 1.4)
        return {}

    with pytest.raises(BaseMismatchError, match=r"changed on the way \(FreeU: off -> on\)"):
        editor.generate(CAT, callback_on_step_end=callback, **arguments())


@torch.no_grad()
def test_under_model_offload(pipeline: Any) -> None:
    pipe = with_unet(pipeline)
    expected = plain(pipe)
    editor = Editor(pipe, {"dense_below": 4, "dense_steps": 1})
    before = editor.generate(CAT, **arguments())
    hook = None
    for name in ("text_encoder", "unet", "vae"):
        model = getattr(pipe, name)
        _, hook = accelerate.cpu_offload_with_hook(model, torch.device("cpu"), prev_module_hook=hook)
    base = editor.generate(CAT, **arguments())
    assert_close(base.latents, expected)
    for each in (base, before):
        assert editor.edit(each, DOG, box()).report.background_identical
    for name in ("text_encoder", "vae"):
        accelerate.hooks.remove_hook_from_module(getattr(pipe, name))  # they are the module's own
