"""Multiply-accumulates (MACs) of a U-Net call, counted on the meta device: no weights are read, nothing is computed.

The total is counted by fvcore, the breakdown by walking the graph; both use :mod:`fisedit_compile.mac_formulas`, and
a count on which they differ is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fisedit_compile.architectures import VAE_SCALE_FACTOR, build_unet, unet_inputs
from fisedit_compile.capture import bind, capture, module_path
from fisedit_compile.config import SparsityConfig
from fisedit_compile.errors import CaptureError
from fisedit_compile.mac_formulas import FORMULAS, OP_KINDS, REFUSED
from fisedit_compile.mac_report import NO_RESOLUTION, MacCount, MacReport
from fisedit_compile.mac_tracing import fvcore_by_kind, to_meta
from fisedit_compile.passes.annotate_layout import annotate_layout

__all__ = ["MacCount", "MacReport", "count_graph", "count_macs"]


def count_macs(unet_or_model: Any, *, height: int, width: int, batch: int = 2) -> MacReport:
    """MACs of one call of a U-Net for images of ``height`` x ``width`` pixels.

    Args:
        unet_or_model: a U-Net, a pipeline with one, or the name of an architecture
            (:data:`fisedit_compile.architectures.ARCHITECTURES`).
        height: of the image, in pixels; a U-Net on its own is taken to see latents of an eighth of that.
        width: of the image, in pixels.
        batch: samples of the call; classifier-free guidance makes two of an image.

    Raises:
        ValueError: an unknown architecture, a model without U-Net, or a size that is no multiple of a latent pixel's.
        CaptureError: the U-Net cannot be captured as one graph, or has an operation that cannot be counted.
    """
    unet, scale_factor = _unet_of(unet_or_model)
    args, kwargs = unet_inputs(unet, batch=batch, height=height, width=width, scale_factor=scale_factor)
    call = bind(unet, args, kwargs)
    graph_module = capture(unet, call)
    annotate_layout(graph_module, SparsityConfig())
    return MacReport(count_graph(graph_module, call.tensors), height=height, width=width, batch=batch)


def count_graph(graph_module: GraphModule, inputs: Sequence[Tensor]) -> MacCount:
    """MACs of one run of a flat FX graph of ATen and ``fisedit`` operators.

    Args:
        graph_module: resolutions are read from ``meta["layout"]``, module paths from ``meta["module_path"]``.
        inputs: one tensor a placeholder, of any device. Their shapes are all that counts, with one exception: inputs
            that are row offsets should have values, see :func:`fisedit_compile.mac_formulas.attention_rows`.

    Raises:
        CaptureError: an operation that multiplies and accumulates has no formula.
    """
    on_meta = to_meta(graph_module)
    walk = _Walk(on_meta, inputs)
    with torch.no_grad():
        walk.run(*(tensor.to("meta") for tensor in inputs))
    fvcore = fvcore_by_kind(on_meta, inputs)
    by_op: dict[str, int] = {kind: walk.by_op[kind] for kind in OP_KINDS}
    if any(fvcore[kind] != by_op[kind] for kind in OP_KINDS):
        raise AssertionError(f"fvcore counts {dict(fvcore)} where the graph's nodes have {by_op}")
    return MacCount(by_op, dict(sorted(walk.by_resolution.items(), key=_by_area)), dict(walk.by_module))


class _Walk(Interpreter):
    """Runs a graph on the meta device and counts each node by its formula."""

    def __init__(self, graph_module: GraphModule, inputs: Sequence[Tensor]) -> None:
        super().__init__(graph_module)
        self.by_op: Counter[str] = Counter()
        self.by_resolution: Counter[str] = Counter()
        self.by_module: Counter[str] = Counter()
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        self._given = dict(zip(placeholders, inputs, strict=True))

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if not isinstance(n.target, torch._ops.OpOverload):
            return out
        name = n.target._schema.name
        path = n.meta.get("module_path") or module_path(n)
        if name in REFUSED:
            raise CaptureError(f"{name} in {path or 'the graph'} has no MAC formula: add one to mac_formulas.FORMULAS")
        if name in FORMULAS:
            self._count(n, name, path, out)
        return out

    def _count(self, node: Node, name: str, path: str, out: Any) -> None:
        args, kwargs = map_arg((node.args, node.kwargs), lambda arg: self._given.get(arg, self.env[arg]))
        macs = FORMULAS[name].macs(out, *args, **kwargs)
        layout = node.meta.get("layout")
        self.by_op[FORMULAS[name].kind] += macs
        self.by_resolution["{}x{}".format(*layout.size) if layout else NO_RESOLUTION] += macs
        self.by_module[path] += macs


def _by_area(item: tuple[str, int]) -> int:
    """Sorts the largest resolution first and what has none last."""
    name, _ = item
    return 0 if name == NO_RESOLUTION else -prod(map(int, name.split("x")))


def _unet_of(model: Any) -> tuple[UNet2DConditionModel, int]:
    """The U-Net of a name, a pipeline or a U-Net, and how many image pixels a latent pixel is wide."""
    if isinstance(model, str):
        return build_unet(model, device="meta"), VAE_SCALE_FACTOR
    if isinstance(model, UNet2DConditionModel):
        return model, VAE_SCALE_FACTOR
    unet = getattr(model, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(
            f"{type(model).__name__} is no UNet2DConditionModel and has none as .unet: "
            "give a U-Net, a Stable Diffusion pipeline or the name of an architecture"
        )
    return unet, model.vae_scale_factor
