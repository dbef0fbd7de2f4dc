"""Writing operations of a captured graph: what takes their place gives the same, and what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fisedit_compile.compiler.functionalize import functionalize
from fisedit_compile.errors import CaptureError


def exported(run: Callable[[Tensor], Tensor]) -> GraphModule:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return run(x)

    module = torch.export.export(Model(), (torch.zeros(4, 6),), strict=False).module()
    assert isinstance(module, GraphModule)
    return module


def add(x: Tensor) -> Tensor:
    y = x * 2
    before = y + 1
    y += x
    return y * before


def twice(x: Tensor) -> Tensor:
    y = x * 2
    y += x
    y.mul_(y)
    return y


def slices(x: Tensor) -> Tensor:
    y = x * 2
    y[1:3, ::2] = x[:2, :3]
    y[:, 1:] *= 3
    return y


def smaller_and_of_another_dtype(x: Tensor) -> Tensor:
    y = x * 2
    y[1:3] = torch.arange(6)
    return y


def filled(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[2:] = 1.5
    return x + y


def a_slice_that_is_read_later(x: Tensor) -> Tensor:
    y = x * 2
    part = y[1:3]
    part += 1
    return y.sum() + part * 2


@pytest.mark.parametrize("run", [add, twice, slices, smaller_and_of_another_dtype, filled, a_slice_that_is_read_later])
def test_the_same_without_writing(run: Callable[[Tensor], Tensor]) -> None:
    module = exported(run)
    functionalize(module.graph)
    module.graph.lint()
    module.recompile()
    targets = [node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert not any(target._schema.is_mutable for target in targets)
    x = torch.randn(4, 6)
    assert torch.equal(module(x), run(x))


def the_input(x: Tensor) -> Tensor:
    x += 1
    return x


def another_view(x: Tensor) -> Tensor:
    y = x * 2
    y.view(6, 4)[0] += 1
    return y


def a_view_that_is_read_later(x: Tensor) -> Tensor:
    y = x * 2
    turned = y.t()
    y += 1
    return turned + 1


def a_part_of_a_split_that_is_read_later(x: Tensor) -> Tensor:
    y = x * 2
    left, _ = y.chunk(2, dim=1)
    y += 1
    return left * 2


def an_outer_slice_that_is_read_later(x: Tensor) -> Tensor:
    y = x * 2
    rows = y[1:]
    rows[:, 2:] += 1
    return rows * 2


@pytest.mark.parametrize(
    "run",
    [
        the_input,
        another_view,
        a_view_that_is_read_later,
        a_part_of_a_split_that_is_read_later,
        an_outer_slice_that_is_read_later,
    ],
)
def test_what_would_be_wrong_is_refused(run: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match=r"writes to .*set_default_attn_processor"):
        functionalize(exported(run).graph)
