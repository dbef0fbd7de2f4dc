"""Counts the MACs of a flat FX graph with fvcore, on the meta device: nothing is computed and no weight is read.

fvcore counts the operators of a TorchScript trace. Tracing works on meta tensors under three conditions: the graph runs
there wherever its weights are, the functions that compute shapes are not traced, and convolutions have the form that
the tracer knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fvcore.nn.jit_analysis import JitModelAnalysis
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from fisedit_compile.ir.meta_interpreter import MetaInterpreter
from fisedit_compile.macs.formulas import FORMULAS, OpFormula

aten = torch.ops.aten


def fvcore_by_kind(graph_module: GraphModule, inputs: Sequence[Tensor]) -> Counter[str]:
    """MACs of each kind of operator, counted by fvcore.

    Args:
        graph_module: a graph of ATen and ``fisedit`` operators, on any device.
        inputs: one tensor for each placeholder, on any device. Only their shapes count, and the values of row offsets
            if they have any.
    """
    values = {i: tensor for i, tensor in enumerate(inputs) if tensor.device.type != "meta"}
    handles = {name: _handle(formula, values) for name, formula in FORMULAS.items()}
    with torch.no_grad():
        analysis = JitModelAnalysis(_Replay(graph_module), tuple(tensor.to("meta") for tensor in inputs))
        analysis.set_op_handle(**handles)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        return analysis.by_operator()


def _handle(formula: OpFormula, values: Mapping[int, Tensor]) -> Callable[[list[Any], list[Any]], Counter[str]]:
    """The formula as a handle for fvcore, which is called with TorchScript values.

    ``values`` has the graph's inputs that have values, by position.
    """

    def argument(value: Any) -> Any:
        if not value.isCompleteTensor():
            return value.toIValue()  # a number or None; no formula reads a list
        if value.type().scalarType() == "Int" and value.node().kind() == "prim::Param":  # offsets are int32
            position = [output.unique() for output in value.node().outputs()].index(value.unique())
            if position in values:
                return values[position]
        return torch.empty(value.type().sizes(), device="meta")

    def handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        return Counter({formula.kind: formula.macs(argument(outputs[0]), *map(argument, inputs))})

    return handle


class _Replay(torch.nn.Module):
    """The module that is traced: it runs a graph node by node."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__()
        self._replay = _WithTraceableConvolutions(graph_module)

    def forward(self, *inputs: Tensor) -> Any:
        with _ShapesOutsideTheTrace():
            return self._replay.run(*inputs)


class _WithTraceableConvolutions(MetaInterpreter):
    """Calls convolutions as ``aten::_convolution``, the only form of them that appears in a trace."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is aten.conv2d.default:
            defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
            args = (*args, *defaults[len(args) :])
            target, args = aten.convolution.default, (*args[:6], False, [0, 0], args[6])
        if target is aten.convolution.default:
            target, args = aten._convolution.default, (*args, False, False, False, False)  # options of cuDNN
        return super().call_function(target, args, kwargs)


class _ShapesOutsideTheTrace(TorchDispatchMode):
    """Runs the operators of a trace with the tracer switched off.

    Many operators compute the shape of a meta tensor's result in Python; while a thread traces, sizes read there are
    traced tensors instead of numbers, and the checks on them fail.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten._convolution.default:  # this form has no kernel for the meta device
            func, args = aten.convolution.default, args[:9]
        with _untraced():
            return func(*args, **kwargs or {})


@contextmanager
def _untraced() -> Iterator[None]:
    # In a dispatch mode the tracer's key is excluded, and while it is, the tracing state cannot be set.
    trace = torch._C._get_tracing_state()
    torch._C._dispatch_tls_set_dispatch_key_excluded("Tracer", False)
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        # The tracer adds autograd's record of views itself, and refuses results that already have one.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            yield
    finally:
        torch._C._set_tracing_state(trace)  # type: ignore[attr-defined]
        torch._C._dispatch_tls_set_dispatch_key_excluded("Tracer", True)
