"""What users change of a U-Net between two pictures, below ``torch.compile(unet, backend="fisedit")``.

Dynamo sees most changes and compiles anew; weights, and numbers that it keeps open, reach graphs that exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.changes import CHANGES, ONE_OF_EACH_KIND, small_unet
from support.unets import MICRO

from fisedit_compile.backend import editing, fisedit, recording
from fisedit_compile.errors import BaseMismatchError, CaptureError
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 16
MASK = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
MASK[:, 2:6, 3:7] = True  # norms keep the base's statistics


def eager(graph_module: Any, inputs: Any, **_: Any) -> Any:
    """Stands for Inductor, whose C++ takes a minute for a whole U-Net; what the backend adds around it is the same."""
    return graph_module


@pytest.fixture(autouse=True)
def dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: eager)
    torch._dynamo.reset()
    # By default torch.compile ignores hooks that modules are given later, in dense calls too.
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        yield
    torch._dynamo.reset()


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 7, MICRO["cross_attention_dim"], generator=generator)
    return torch.randn(2, 4, SIDE, SIDE, generator=generator), torch.tensor(500), text


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)  # each is compiled twice, which takes seconds
def test_a_change_is_followed_and_an_old_recording_is_refused(name: str) -> None:
    change, unet, args = CHANGES[name], small_unet(), inputs()
    change.prepare(unet)
    compiled = torch.compile(unet, backend=fisedit, options={"dense_below": 4})

    def record() -> tuple[torch.Tensor, Any]:
        with recording() as base:
            return compiled(*args, **change.arguments).sample, base

    def edit(base: Any) -> torch.Tensor:
        with editing(base, MASK):
            out: torch.Tensor = compiled(*args, **change.arguments).sample
            return out

    def plain() -> torch.Tensor:
        out: torch.Tensor = unet(*args, **change.arguments).sample
        return out

    before, old = record()
    assert_close(before, plain())
    assert_close(edit(old), before)
    change.do(unet)
    with pytest.raises(BaseMismatchError, match=r"record the call again|no counterpart among"):
        edit(old)
    changed, new = record()
    assert_close(changed, plain())
    assert not torch.allclose(changed, before)
    assert_close(edit(new), changed)
    change.undo(unet)
    again, _ = record()
    assert_close(again, plain())


@torch.no_grad()
def test_weights_that_change_within_an_edit_are_refused() -> None:
    unet, args = small_unet(), inputs()
    compiled = torch.compile(unet, backend=fisedit, options={"dense_below": 4})
    with recording() as base:
        compiled(*args)
        compiled(*args)
    with editing(base, MASK):
        compiled(*args)
        for parameter in unet.parameters():
            parameter.mul_(0.9)
        with pytest.raises(BaseMismatchError, match="record the call again"):
            compiled(*args)


@torch.no_grad()
def test_a_scale_that_dynamo_keeps_open_is_followed() -> None:
    """Once it has changed, the scale of a LoRA is a number among the inputs of the compiled graph."""
    unet, args = small_unet(), inputs()
    CHANGES["LoRA weight"].prepare(unet)
    compiled = torch.compile(unet, backend=fisedit, options={"dense_below": 4})
    bases: list[Any] = []
    for scale in (1.0, 0.4, 0.2):
        unet.set_adapters(["snow"], [scale])
        plain = unet(*args).sample
        for base in bases:
            with editing(base, MASK), pytest.raises(BaseMismatchError):
                compiled(*args)
        with recording() as base:
            assert_close(compiled(*args).sample, plain)
        with editing(base, MASK):
            assert_close(compiled(*args).sample, plain)
        bases.append(base)


@torch.no_grad()
def test_adapters_that_are_subtracted_within_the_call_are_refused() -> None:
    """PEFT's disabled adapters leave the weights that they were fused into at the next call, as part of it."""
    change, unet, args = CHANGES["LoRA fused and disabled"], small_unet(), inputs()
    change.prepare(unet)
    change.do(unet)
    compiled = torch.compile(unet, backend=fisedit, options={"dense_below": 4})
    with recording(), pytest.raises(CaptureError, match="unfuse"):
        compiled(*args)
