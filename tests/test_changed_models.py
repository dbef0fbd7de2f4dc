"""What users change of a U-Net between two pictures: the next one is the plain U-Net's, and the old base is refused.

Each change is made and taken back in one's own loop, and one of each kind in the editor, which follows them through the
same U-Net; `test_changed_models_backend.py` makes these below ``torch.compile``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from support.changes import CHANGES, ONE_OF_EACH_KIND, Change, small_unet, weights
from support.pipelines import CONFIG, EDIT, PROMPT, arguments, generate, left_half, tiny_pipeline
from support.unets import MICRO
from torch.utils._pytree import tree_map_only

from fisedit_compile import BaseMismatchError, Editor, sparsify
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 16


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
        self.mask[:, 4:8, 3:7] = True  # norms keep the base's statistics; in the editor's edits they follow
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
    monkeypatch.setattr(module, "lower", lambda *args, **form: made.append("capture") or lower(*args, **form))
    return made


def shared(build: Callable[..., Any]) -> Callable[..., Any]:
    """``build(change, ...)``, once for all changes that are prepared alike: each is made to what the last one left."""
    made: dict[Any, Any] = {}

    def of(change: Change, *args: Any) -> Any:
        if change.rounds:
            return build(change, *args)
        key = (change.prepare, *args)
        if key not in made:
            made[key] = build(change, *args)
        return made[key]

    return of


@pytest.fixture(scope="module")
def loop_of() -> Callable[[Change, str], OwnLoop]:
    def build(change: Change, device: str) -> OwnLoop:
        unet = small_unet().to(device)
        change.prepare(unet)
        return OwnLoop(unet.to(device), change.arguments)

    return shared(build)


@pytest.fixture(scope="module")
def editor_of() -> Callable[[Change], Editor]:
    def build(change: Change) -> Editor:
        pipe = tiny_pipeline(unet=small_unet())
        change.prepare(pipe.unet)
        return Editor(pipe, CONFIG)

    return shared(build)


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.usefixtures("ieee_fp32")
def test_in_ones_own_loop(
    name: str, device: str, captures: list[str], loop_of: Callable[[Change, str], OwnLoop]
) -> None:
    change = CHANGES[name]
    loop = loop_of(change, device)
    unet = loop.unet
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


def plain(pipe: Any) -> torch.Tensor:
    latents: torch.Tensor = pipe(PROMPT, output_type="latent", **arguments()).images
    return latents


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH_KIND if not CHANGES[name].arguments])
def test_in_the_editor(name: str, editor_of: Callable[[Change], Editor]) -> None:
    change = CHANGES[name]
    editor = editor_of(change)
    pipe = editor.pipe
    old = generate(editor)
    assert_close(old.latents, plain(pipe))
    change.do(pipe.unet)
    new = generate(editor)
    assert_close(new.latents, plain(pipe))
    assert not torch.allclose(new.latents, old.latents)
    assert editor.edit(new, EDIT, left_half()).report.background_identical
    with pytest.raises(BaseMismatchError) as refusal:
        editor.edit(old, EDIT, left_half())
    assert re.search(change.words, str(refusal.value)), refusal.value
    change.undo(pipe.unet)
    assert_close(generate(editor).latents, plain(pipe))
    if not change.rounds:
        assert editor.edit(old, EDIT, left_half()).report.background_identical


@torch.no_grad()
def test_the_editor_follows_another_unet_and_the_first_one_again() -> None:
    pipe = tiny_pipeline(unet=small_unet())
    editor = Editor(pipe, CONFIG)
    old = generate(editor)
    first = pipe.unet
    pipe.unet = small_unet()
    weights(pipe.unet, 0.5)
    assert_close(generate(editor).latents, plain(pipe))
    with pytest.raises(BaseMismatchError, match=r"weights of conv_in and .* more"):
        editor.edit(old, EDIT, left_half())
    pipe.unet = first
    assert_close(generate(editor).latents, old.latents)
    assert editor.edit(old, EDIT, left_half()).report.background_identical


@torch.no_grad()
def test_a_unet_that_a_callback_changes_on_the_way_is_refused() -> None:
    pipe = tiny_pipeline(unet=small_unet())
    editor = Editor(pipe, CONFIG)

    def callback(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe.unet.enable_freeu(0.9, 0.2, 1.3, 1.4)
        return {}

    with pytest.raises(BaseMismatchError, match=r"changed on the way \(FreeU: off -> on\)"):
        generate(editor, callback_on_step_end=callback)


@torch.no_grad()
def test_under_model_offload() -> None:
    pipe = tiny_pipeline(unet=small_unet())
    expected = plain(pipe)
    editor = Editor(pipe, CONFIG)
    before = generate(editor)
    hook = None
    for name in ("text_encoder", "unet", "vae"):
        model = getattr(pipe, name)
        _, hook = accelerate.cpu_offload_with_hook(model, torch.device("cpu"), prev_module_hook=hook)
    base = generate(editor)
    assert_close(base.latents, expected)
    for each in (base, before):
        assert editor.edit(each, EDIT, left_half()).report.background_identical
    for name in ("text_encoder", "vae"):
        accelerate.hooks.remove_hook_from_module(getattr(pipe, name))  # they are the module's own
