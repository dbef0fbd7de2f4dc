"""The layers of a sparse step whose work grows with its rows: how much each multiplies, and how many bytes it moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fisedit_compile.compiler.lowered import Lowered
from fisedit_compile.ir.layout import Size
from fisedit_compile.ir.meta_interpreter import MetaInterpreter
from fisedit_compile.passes import targets
from fisedit_compile.planning.edit_plan import plan_edit

Kind = Literal["convolution", "linear", "self_attention", "cached_attention", "text_attention"]

_CONVOLUTIONS = (targets.CONV2D_ROWS, targets.CONV2D_ROWS_AND_NORM)
_LINEARS = (targets.LINEAR_ROWS, targets.LINEAR_ROWS_AND_NORM, targets.LINEAR_ROWS_AND_LAYER_NORM)


@dataclass(frozen=True)
class LayerShape:
    """All that the time of a layer depends on but the number of its rows.

    Attributes:
        kind: a query of ``self_attention`` sees the rows of its sample, one of ``cached_attention`` all pixels of its
            sample, and one of ``text_attention`` the tokens of its sample's text.
        channels: the channels of an input row.
        filters: the rows of a product's weight; the output channels of attention.
        taps: how many pixels an output row reads.
        beside: channels of a shortcut that a convolution takes in.
        geglu: whether the second half of the product gates the first, so that the output is half as wide.
        samples, heads, keys: used by attention alone; ``keys`` is the number of keys of each sample, or 0 if they are
            the sample's rows.
    """

    kind: Kind
    channels: int
    filters: int
    taps: int = 1
    beside: int = 0
    geglu: bool = False
    samples: int = 1
    heads: int = 1
    keys: int = 0

    @property
    def is_product(self) -> bool:
        """Whether the layer multiplies rows by a weight; attention does not."""
        return self.kind in ("convolution", "linear")

    @property
    def depth(self) -> int:
        """How many products are added up for one value of the output."""
        return self.taps * self.channels + self.beside

    def macs(self, rows: int) -> float:
        """Multiply-accumulates of ``rows`` output rows; attention's rows are taken to be as many for each sample."""
        if self.is_product:
            return rows * self.depth * self.filters
        return 2 * rows * self._keys(rows) * self.channels

    def bytes(self, rows: int, itemsize: int) -> float:
        """Bytes that must move at least: weights (or keys and values), rows in, rows out, and the neighbour table."""
        if self.is_product:
            out = self.filters // 2 if self.geglu else self.filters
            table = 4 * self.taps * rows if self.kind == "convolution" else 0
            return itemsize * (self.depth * self.filters + rows * (self.channels + self.beside + out)) + table
        return itemsize * 2 * self.channels * (rows + self.samples * self._keys(rows))

    def __str__(self) -> str:
        taps = f", {self.taps} taps" if self.taps > 1 else ""
        taps += f", {self.beside} beside" if self.beside else ""
        keys = f", {self.heads} heads, {self.keys or 'own'} keys" if not self.is_product else ""
        return f"{self.kind} {self.channels} -> {self.filters}{taps}{keys}"

    def _keys(self, rows: int) -> float:
        return self.keys or rows / self.samples


@dataclass(frozen=True)
class RowLayer:
    """One layer of a sparse step.

    Attributes:
        path: the path of its module.
        shape: what its time depends on besides the rows.
        size: the resolution of its output, whose rows it computes.
        most: the number of its rows if every pixel is active.
        halo: the resolution whose halo rows are fetched for it; None if it reads no halo.
    """

    path: str
    shape: LayerShape
    size: Size
    most: int
    halo: Size | None = None


def row_layers(lowered: Lowered) -> list[RowLayer]:
    """The convolutions, linear layers and attentions that a sparse step runs on rows, in the order in which they run.

    Norms, gathers and the resolutions at which every pixel is computed anyway (``config.is_whole``) are left out.
    Shapes come from a run on the meta device, where nothing is computed.
    """
    full = torch.ones(1, *lowered.latents, dtype=torch.bool)
    plan = plan_edit(full, lowered.plan_requests, batch=lowered.batch, dense_below=lowered.config.dense_below)
    values = {**lowered.step_specs, **{request: plan.tensor(request) for request in lowered.plan_requests}}
    placeholders = lowered.sparse.graph.find_nodes(op="placeholder")
    walk = _Walk(lowered.sparse)
    with torch.no_grad():
        walk.run(*(values[node.meta.get("request", node.target)].to("meta") for node in placeholders))
    return [layer for layer in walk.layers if not lowered.config.is_whole(layer.size)]


class _Walk(MetaInterpreter):
    """Collects the layers of a graph on the meta device while it runs."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.layers: list[RowLayer] = []

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if "rows" in n.meta and n.target in _READERS:
            shape = _READERS[n.target](n, map_arg(n.args, self.env.__getitem__))
            has_halo = n.target in _CONVOLUTIONS and n.args[1] is not None
            halo = n.args[4].meta["request"].where.source if has_halo else None  # type: ignore[union-attr]
            most = (out[0] if isinstance(out, tuple) else out).shape[0]
            self.layers.append(RowLayer(n.meta["module_path"], shape, n.meta["rows"].size, most, halo))
        return out


def _convolution(node: Node, args: Any) -> LayerShape:
    rows, _, weight, _, table = args[:5]
    beside = args[12].shape[1] if len(args) > 12 else 0
    return LayerShape("convolution", rows.shape[1], weight.shape[0], taps=table.shape[1], beside=beside)


def _linear(node: Node, args: Any) -> LayerShape:
    rows, weight = args[:2]
    return LayerShape("linear", rows.shape[1], weight.shape[0], geglu="geglu" in node.args)


def _attention_rows(node: Node, args: Any) -> LayerShape:
    query, key, _, offsets = args[:4]
    if node.args[3] is node.args[4]:
        return _attention("self_attention", query, offsets, keys=0)
    return _attention("text_attention", query, offsets, key.shape[0] // (offsets.shape[0] - 1))


def _attention_cached(node: Node, args: Any) -> LayerShape:
    query, base_key, offsets = args[0], args[3], args[6]
    return _attention("cached_attention", query, offsets, base_key.shape[0] // (offsets.shape[0] - 1))


def _attention(kind: Kind, query: Tensor, offsets: Tensor, keys: int) -> LayerShape:
    heads, width = query.shape[1:]
    return LayerShape(kind, heads * width, heads * width, samples=offsets.shape[0] - 1, heads=heads, keys=keys)


_READERS: dict[Any, Any] = {
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_LINEARS, _linear),
    targets.ATTENTION_ROWS: _attention_rows,
    targets.ATTENTION_CACHED: _attention_cached,
}
