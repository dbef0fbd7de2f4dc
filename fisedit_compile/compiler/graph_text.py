"""An exported graph as plain data that JSON can hold, and back.

Only operations of ATen are named in it, so that reading such data runs nothing of whoever wrote it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from fisedit_compile.ir.meta_interpreter import on_meta

#: The kinds of values of torch that operations take as arguments, by the names that ``repr`` gives them.
_NAMED = (torch.dtype, torch.layout, torch.memory_format)

_GETITEM = "getitem"


class GraphTextError(ValueError):
    """A graph that cannot be written as plain data, or data that is no such graph."""


def as_text(graph_module: GraphModule) -> list[Any]:
    """The nodes of a graph whose attributes are tensors alone: operation, name, arguments, shapes, module path.

    Raises:
        GraphTextError: an operation that is not of ATen, or an argument of a kind that is not known here.
    """
    return [
        {
            "op": node.op,
            "name": node.name,
            "target": _text_of_target(node),
            "args": [_text(each) for each in node.args],
            "kwargs": {name: _text(each) for name, each in node.kwargs.items()},
            "val": _text_of_val(node.meta.get("val")),
            "path": node.meta.get("module_path"),
        }
        for node in graph_module.graph.nodes
    ]


def of_text(nodes: list[Any]) -> GraphModule:
    """The graph of :func:`as_text`. Its nodes have fake tensors, and its attributes are on the meta device.

    Raises:
        GraphTextError: the data is not what :func:`as_text` returns.
    """
    graph, made, attributes = Graph(), dict[str, Node](), dict[str, Tensor]()
    try:
        vals = _vals([each["val"] for each in nodes])
        for each, val in zip(nodes, vals, strict=True):
            args = tuple(_value(arg, made) for arg in each["args"])
            kwargs = {name: _value(arg, made) for name, arg in each["kwargs"].items()}
            node = graph.create_node(each["op"], _target(each), args, kwargs, name=each["name"])
            if node.name != each["name"]:
                raise GraphTextError(f"two nodes are called {each['name']}")
            made[node.name] = node
            if val is not None:
                node.meta["val"] = val
            if each["path"] is not None:
                node.meta["module_path"] = each["path"]
            if node.op == "get_attr":
                attributes[each["target"]] = on_meta(val)
        graph.output_node()
        return _LazyGraphModule(attributes, graph)
    except GraphTextError:
        raise
    except Exception as error:  # of torch, for whatever the data may be instead
        raise GraphTextError(f"no graph ({type(error).__name__}: {error})") from error


def _text_of_target(node: Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if target is operator.getitem:
        return _GETITEM
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return target._schema.name.removeprefix("aten::") + "." + target._overloadname
    raise GraphTextError(f"{target} is no operation of ATen")


def _target(node: dict[str, Any]) -> str | Callable[..., Any]:
    target: str = node["target"]
    if node["op"] in ("placeholder", "get_attr", "output"):
        return target
    if node["op"] != "call_function":
        raise GraphTextError(f"a node that is a {node['op']}")
    if target == _GETITEM:
        return operator.getitem
    packet, _, overload = target.partition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise GraphTextError(f"torch has no operation {target}")
    return found


def _text(value: Any) -> Any:
    """An argument; whatever is no plain value becomes a dict of one key, which says what it is."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_text(each) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [_text(each) for each in value]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, _NAMED):
        return {"torch": str(value).removeprefix("torch.")}
    raise GraphTextError(f"an argument that is a {type(value).__name__}")


def _value(text: Any, made: dict[str, Node]) -> Any:
    if isinstance(text, list):
        return [_value(each, made) for each in text]
    if not isinstance(text, dict):
        return text
    ((kind, content),) = text.items()
    if kind == "node":
        return made[content]
    if kind == "tuple":
        return tuple(_value(each, made) for each in content)
    if kind == "device":
        return torch.device(content)
    if kind == "torch" and isinstance(found := getattr(torch, content), _NAMED):
        return found
    raise GraphTextError(f"an argument that is a {kind}")


def _text_of_val(val: Any) -> Any:
    """Shape, strides, dtype and device of a tensor; of a tuple or list each; None of anything else."""
    if isinstance(val, Tensor):
        dtype = str(val.dtype).removeprefix("torch.")
        return {"shape": [*val.shape], "stride": [*val.stride()], "dtype": dtype, "device": str(val.device)}
    return [_text_of_val(each) for each in val] if isinstance(val, tuple | list) else None


def _vals(texts: list[Any]) -> list[Any]:
    """What :func:`_text_of_val` was given, as tensors without memory on the device that they had."""
    mode = FakeTensorMode()

    def val(text: Any) -> Any:
        if not isinstance(text, dict):
            return None if text is None else tuple(map(val, text))
        dtype = getattr(torch, text["dtype"])
        meta = torch.empty_strided(text["shape"], text["stride"], dtype=dtype, device="meta")
        return FakeTensor(mode, meta, torch.device(text["device"]))

    return [val(text) for text in texts]
