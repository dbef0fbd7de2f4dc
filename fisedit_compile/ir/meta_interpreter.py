"""Operations and graphs run for their shapes alone: on the meta device, where nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter


class MetaInterpreter(Interpreter):
    """Runs a graph on the meta device, whatever device its parameters, buffers and device arguments name."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        names = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
        self._attributes = {name: on_meta(self.fetch_attr(name)) for name in names}

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._attributes[target]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, *_on_meta_device(args, kwargs))


def shape_of_call(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What one operation returns for arguments on the meta device: a tensor there, or a tuple of them."""
    args, kwargs = _on_meta_device(args, kwargs)
    with torch.no_grad():
        return target(*args, **kwargs)


def on_meta(value: Any) -> Any:
    """A tensor of the same shape, strides and dtype on the meta device, whatever kind of tensor it is given.

    Of a tuple or list each tensor; anything else is returned as it is. Under ``FakeTensorMode`` an operation takes a
    hundred times as long as on plain meta tensors, which is why shapes are worked out on these.
    """
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return type(value)(on_meta(each) for each in value) if isinstance(value, tuple | list) else value


def _on_meta_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an operation with the meta device in place of every device that they name."""
    meta = torch.device("meta")
    return (
        tuple(meta if isinstance(arg, torch.device) else arg for arg in args),
        {name: meta if isinstance(arg, torch.device) else arg for name, arg in kwargs.items()},
    )
