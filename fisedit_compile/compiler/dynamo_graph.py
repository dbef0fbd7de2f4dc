"""A graph of Dynamo as a model of its own, which can be exported again and watched: what ``torch.compile`` gives us."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fisedit_compile.errors import CaptureError


class ModelGraph(torch.nn.Module):
    """Dynamo's graph with all that it takes from the model back in place, so that it takes a user's arguments alone.

    Attributes:
        settings: numbers that the model holds and that Dynamo gives as inputs once they have changed, such as the scale
            of a LoRA: part of the model's state, as its weights are.

    Raises:
        CaptureError: the graph is only a part of a U-Net, or writes to its weights.
    """

    settings: tuple[int | float | bool, ...]

    def __init__(self, graph_module: GraphModule, kinds: Sequence[str], inputs: Sequence[Any]) -> None:
        super().__init__()
        (outputs,) = graph_module.graph.output_node().args
        self._places = {kind: [i for i, each in enumerate(kinds) if each == kind] for kind in _KINDS}
        samples = [i for i in self._places["user"] if _is_latents(inputs[i])]
        if not isinstance(outputs, tuple) or len(outputs) != 1 or not samples:
            raise CaptureError(
                "backend 'fisedit' was given a part of a U-Net, not the whole: compile the U-Net itself, with "
                "fullgraph=True to see what breaks the graph"
            )
        _refuse_written_weights(graph_module.graph, kinds)
        self._places["user"].remove(samples[0])
        self._sample_at = samples[0]
        self._graph_module = graph_module
        self._dtypes = tuple(getattr(inputs[i], "dtype", None) for i in self._places["setting"])
        self.hold(inputs)

    def hold(self, inputs: Sequence[Any]) -> None:
        """Take over what the model gives to this call; parameters are the same objects unless they were replaced."""
        weights = [inputs[i] for i in self._places["weight"]]
        held = getattr(self, "weights", ())
        if len(weights) != len(held) or any(new is not old for new, old in zip(weights, held, strict=True)):
            self.weights = torch.nn.ParameterList(weights)
        self.settings = tuple(_number(inputs[i]) for i in self._places["setting"])

    def arguments(self, inputs: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...]]:
        """The user's among the inputs of the compiled graph: the sample, and the rest, sizes included."""
        return inputs[self._sample_at], tuple(inputs[i] for i in self._places["user"])

    def forward(self, sample: Tensor, rest: tuple[Any, ...]) -> Any:
        settings = [
            # A number of the model as a tensor that is made here is a constant of the exported graph.
            value if dtype is None else torch.tensor(value, dtype=dtype)
            for value, dtype in zip(self.settings, self._dtypes, strict=True)
        ]
        given = {"user": rest, "weight": list(self.weights), "setting": settings}
        values = {self._sample_at: sample}
        for kind, places in self._places.items():
            values.update(zip(places, given[kind], strict=True))
        return self._graph_module(*(values[i] for i in range(len(values))))


_KINDS = ("user", "weight", "setting")

_IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv", "add_", "sub_", "mul_", "div_", "copy_", "fill_", "zero_"})


def kinds_of_inputs(graph_module: GraphModule, inputs: Sequence[Any]) -> list[str]:
    """Of each input of Dynamo's graph: ``"user"``, ``"weight"`` or ``"setting"``; to be asked while it compiles."""
    return [_kind(*each) for each in zip(graph_module.graph.find_nodes(op="placeholder"), inputs, strict=True)]


def _kind(node: Node, value: Any) -> str:
    """Whether an input of Dynamo's graph is the user's, a tensor of the model, or a number that the model holds."""
    if isinstance(value, torch.nn.Parameter):
        return "weight"
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    if "_modules[" not in (name() if callable(name) else name):
        return "user"
    return "weight" if isinstance(value, Tensor) and value.ndim else "setting"


def _refuse_written_weights(graph: Graph, kinds: Sequence[str]) -> None:
    """Refuse a graph that writes to ``weight.data``, which a graph that is exported from it would not repeat."""
    for node, kind in zip(graph.find_nodes(op="placeholder"), kinds, strict=True):
        for data in node.users if kind == "weight" else ():
            for writer in data.users if _name(data).endswith("_get_data_attr") else ():
                if writer.args[0] is data and _name(writer) in _IN_PLACE:
                    raise CaptureError(
                        "the U-Net writes to its weights within a call, as PEFT does with adapters that were fused and "
                        "then disabled: call unet.unfuse_lora() instead of disabling them, and compile it anew"
                    )


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_latents(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()


def _number(value: Any) -> int | float | bool:
    number: int | float | bool = value.item() if isinstance(value, Tensor) else value
    return number
