"""The layers of a sparse step whose work grows with its rows: how much each multiplies, and how many bytes it moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from fisedit_compile.compiler.lowered import Lowered
from fisedit_compile.ir.layout import Size
from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of
from fisedit_compile.passes.row_product import RowProduct

Kind = Literal["convolution", "linear", "self_attention", "cached_attention", "text_attention"]


@dataclass(frozen=True)
class LayerShape:
    """All that the time of a layer depends on but the number of its rows.

    Attributes:
        kind: a query of ``self_attention`` sees the rows of its sample, one of ``cached_attention`` all pixels of its
            sample, and one of ``text_attention`` the tokens of its sample's text.
        channels: the channels of an input row.
        filters: the rows of a product's weight; the output channels of attention.
        taps: how many pixels an output row reads.
        shortcut_channels: channels of a ResNet's shortcut that the convolution computes as well; 0 without one.
        geglu: whether the second half of the product gates the first, so that the output is half as wide.
        samples, heads, keys: used by attention alone; ``keys`` is the number of keys of each sample, or 0 if they are
            the sample's rows.
    """

    kind: Kind
    channels: int
    filters: int
    taps: int = 1
    shortcut_channels: int = 0
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
        return self.taps * self.channels + self.shortcut_channels

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
            moved = rows * (self.channels + self.shortcut_channels + out)
            return itemsize * (self.depth * self.filters + moved) + table
        return itemsize * 2 * self.channels * (rows + self.samples * self._keys(rows))

    def __str__(self) -> str:
        taps = f", {self.taps} taps" if self.taps > 1 else ""
        taps += f", {self.shortcut_channels} of a shortcut" if self.shortcut_channels else ""
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
    """
    layers = []
    for node in lowered.sparse.graph.nodes:
        layout = node.meta.get("row_layout")
        if layout is None or node.target not in _READERS or lowered.config.is_whole(layout.size):
            continue
        val = node.meta["val"]
        most = (val[0] if isinstance(val, tuple) else val).shape[0]  # as ``val`` is of every pixel
        layers.append(RowLayer(node.meta["module_path"], _READERS[node.target](node), layout.size, most, _halo(node)))
    return layers


def _halo(node: Node) -> Size | None:
    """The resolution of the halo rows that a layer reads."""
    if node.target not in targets.CONVOLUTIONS_OF_ROWS:
        return None
    product = RowProduct(node)
    source: Size = product["table"].meta["request"].where.source
    return None if product["halo"] is None else source


def _convolution(node: Node) -> LayerShape:
    product = RowProduct(node)
    filters, channels = product.val("weight").shape[0], product.val("rows").shape[1]
    shortcut = product.val("shortcut")
    shortcut_channels = 0 if shortcut is None else shortcut.shape[1]
    taps = product.val("table").shape[1]
    return LayerShape("convolution", channels, filters, taps=taps, shortcut_channels=shortcut_channels)


def _linear(node: Node) -> LayerShape:
    product = RowProduct(node)
    filters, channels = product.val("weight").shape
    return LayerShape("linear", channels, filters, geglu=product.epilogue.get("activation") == "geglu")


def _attention_rows(node: Node) -> LayerShape:
    given = arguments_of(node)
    if given["q_offsets"] is given["k_offsets"]:
        return _attention("self_attention", given["q"], given["q_offsets"])
    return _attention("text_attention", given["q"], given["q_offsets"], given["k"])


def _attention_cached(node: Node) -> LayerShape:
    given = arguments_of(node)
    return _attention("cached_attention", given["q"], given["offsets"], given["base_k"])


def _controlled_rows(node: Node) -> LayerShape:
    given = arguments_of(node)
    return _attention("text_attention", given["q"], given["offsets"], given["k"])


def _attention(kind: Kind, query: Node, offsets: Node, key: Node | None = None) -> LayerShape:
    """``key``: all keys of the batch, as many for each sample; None where they are the rows of the queries."""
    _, heads, width = query.meta["val"].shape
    samples = offsets.meta["val"].shape[0] - 1
    keys = 0 if key is None else key.meta["val"].shape[0] // samples
    return LayerShape(kind, heads * width, heads * width, samples=samples, heads=heads, keys=keys)


_READERS: dict[Any, Callable[[Node], LayerShape]] = {
    **dict.fromkeys(targets.CONVOLUTIONS_OF_ROWS, _convolution),
    **dict.fromkeys(targets.LINEARS_OF_ROWS, _linear),
    targets.ATTENTION_ROWS: _attention_rows,
    targets.ATTENTION_CACHED: _attention_cached,
    targets.CONTROLLED_ROWS: _controlled_rows,
}
