"""A U-Net as one flat FX graph of ATen operations, for one signature of its inputs.

The graph comes from ``torch.export`` in non-strict mode. Its parameters are the module's own tensors, so nothing is
copied. Operations that only check something or do nothing at inference (metadata checks, dropout) are dropped.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from fisedit_compile.compiler.export_errors import describe_failure
from fisedit_compile.compiler.functionalize import functionalize
from fisedit_compile.errors import CaptureError
from fisedit_compile.ir.call import Call
from fisedit_compile.utils.exchanged_functions import exchanged_functions

logger = logging.getLogger(__name__)

aten = torch.ops.aten

#: torch keeps stacks and flags of an export in globals: of two at once both fail, and leave them wrong.
_ONE_AT_A_TIME = threading.RLock()


def export(unet: torch.nn.Module, call: Call) -> GraphModule:
    """The graph of ``unet`` for the signature of ``call``; it takes ``call.tensors`` and returns the noise prediction.

    Every node of an operation carries ``meta["val"]`` (a fake tensor) and ``meta["module_path"]``.

    Raises:
        CaptureError: the model does not trace as one graph; the message says where, and what can be done. Or a function
            of ``torch.nn.functional`` is exchanged.
    """
    _refuse_exchanged_functions()
    shape = "x".join(map(str, call.signature.sample_shape))
    logger.info("capturing %s for inputs of %s ...", type(unet).__name__, shape)
    args, kwargs = call.split()
    if "return_dict" in inspect.signature(unet.forward).parameters:
        kwargs["return_dict"] = False
    try:
        with _ONE_AT_A_TIME, torch.no_grad(), _without_by_products():
            exported = torch.export.export(unet, args, kwargs, strict=False)
    except Exception as error:
        reason = describe_failure(unet, error)
        raise CaptureError(f"{type(unet).__name__} could not be exported as one graph: {reason}") from error
    graph, attributes = _unlift(exported)
    _simplify(graph)
    graph_module = _LazyGraphModule(attributes, graph)
    graph_module.graph.lint()
    return graph_module


def _refuse_exchanged_functions() -> None:
    """While it is exported, torch's own function looks itself up by its name, finds the other one and calls it again.

    So what that adds would be in the graph several times.
    """
    for name in exchanged_functions():
        if name.startswith("torch.nn.functional."):
            raise CaptureError(
                f"{name} is another function than torch's own, which an exported graph would call more than once: put "
                "torch's own back, and change the modules that call it instead"
            )


def module_path(node: Node) -> str:
    """The path of the innermost module that a node was traced in, such as ``down_blocks.0.resnets.0.conv1``."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


@contextmanager
def _without_by_products() -> Iterator[None]:
    """Let torch trace without what nobody reads here, which is a third of the time.

    That is the stack of Python calls of each node (torch 2.11 has no such option, and keeps them), and the Python code
    of the graphs on the way to the last one.
    """
    config = torch.fx.config
    before = getattr(config, "do_not_emit_stack_traces", False)
    config.do_not_emit_stack_traces = True
    try:
        with _use_lazy_graph_module(True):
            yield
    finally:
        config.do_not_emit_stack_traces = before


def _unlift(exported: ExportedProgram) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The graph in which parameters, buffers and constants are attributes instead of inputs, and those attributes.

    ``exported.module()`` would give such a graph with guards, and copy and compile it three times on the way.
    """
    graph = Graph()
    inputs = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    attributes: dict[str, torch.Tensor] = {}
    made: dict[Node, Node] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        assert spec.target is not None
        known = exported.state_dict if spec.target in exported.state_dict else exported.constants
        attributes[spec.target] = known[spec.target]
        lifted = inputs[spec.arg.name]
        made[lifted] = graph.create_node("get_attr", spec.target)
        made[lifted].meta = dict(lifted.meta)
    graph.output(graph.graph_copy(exported.graph, made))
    return graph, attributes


def _simplify(graph: Graph) -> None:
    graph.set_codegen(CodeGen())  # flat tensors in, instead of the U-Net's nested keyword arguments
    for node in list(graph.nodes):
        node.meta.setdefault("module_path", module_path(node))
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    functionalize(graph)
    for node in graph.nodes:
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), torch.Tensor):
            graph.erase_node(node)
    (outputs,) = graph.output_node().args
    graph.output_node().args = (pytree.tree_leaves(outputs)[0],)
    graph.eliminate_dead_code()


def _is_identity(node: Node) -> bool:
    """Whether a node returns its argument: dropout at inference, a division by 1, a cast to the dtype a value has.

    ``rescale_output_factor`` of diffusers' blocks is such a division.
    """
    args: tuple[Any, ...] = node.args
    if node.target is aten.dropout.default:
        return not args[2]
    if node.target is aten.div.Tensor:
        return not isinstance(args[1], Node) and args[1] == 1
    return node.target is aten.to.dtype and args[0].meta["val"].dtype is args[1]
