"""A graph run for its shapes alone: on the meta device, where nothing is computed and no weight is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter


class MetaInterpreter(Interpreter):
    """Runs a graph on the meta device, whatever device its parameters, buffers and device arguments name."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        names = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
        self._attributes = {name: _on_meta(self.fetch_attr(name)) for name in names}

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._attributes[target]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args = tuple(_on_meta(arg) if isinstance(arg, torch.device) else arg for arg in args)
        kwargs = {name: _on_meta(arg) if isinstance(arg, torch.device) else arg for name, arg in kwargs.items()}
        return super().call_function(target, args, kwargs)


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    return value.detach().to("meta") if isinstance(value, Tensor) else value
