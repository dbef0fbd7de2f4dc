"""Pass 1: find out where each value lies in space: its :class:`~fisedit_compile.ir.layout.Layout`.

    %sample   [B, 4, H, W]        ->  bchw at (H, W)
    %conv2d   [B, C, H, W]        ->  bchw at (H, W)
    %permute  [B, H, W, C]        ->  bhwc at (H, W)
    %reshape  [B, H*W, C]         ->  bsc  at (H, W)
    %view     [B, H*W, heads, d]  ->  bscc at (H, W)

The latents are a map, and each operation has a rule for what it makes of its operands' layouts. A value that is
computed from no spatial value, such as the time embedding or the text, gets no layout. An operation without a rule, or
one that mixes pixels in a way that rows cannot follow, ends the region: it is reported and stays dense. Where its
result is a map ``[B, C, H, W]`` again, a new region starts behind it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.layout import Layout
from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import permutation


def annotate_layout(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Set ``meta["layout"]`` on every spatial value.

    An operation that cannot run on rows gets ``meta["dense"]``, the reason in words.
    """
    report = PassReport("annotate_layout")
    sample: Layout | None = None
    for node in graph_module.graph.nodes:
        if node.target is targets.CONV:
            _restart_at(node.args[0], report)
        if node.op == "placeholder":
            layout = _input_layout(node, sample)
            sample = sample or layout
        elif node.op == "call_function" and any("layout" in arg.meta for arg in node.all_input_nodes):
            try:
                layout = _rule(node)
            except ValueError as reason:
                node.meta["dense"] = str(reason)
                report.skip(node, str(reason))
                layout = _map_layout(node) if _reads_a_map(node) else None
        else:
            continue
        if layout is not None:
            node.meta["layout"] = layout
            report.change(node)
    return report


def _rule(node: Node) -> Layout | None:
    """The layout of an operation's result. Raises ValueError, with the reason, where it has to stay dense."""
    rule = _RULES.get(node.target)
    if rule is None:
        raise ValueError(f"no rule for {node.target}: its result is computed dense")
    return rule(node)


def _restart_at(source: Node, report: PassReport) -> None:
    """Let a new region start at what a convolution reads: that is a map, whatever it was computed from."""
    layout = _map_layout(source)
    if "layout" not in source.meta and layout is not None:
        source.meta.update(layout=layout, dense="computed from a value whose layout is not known")
        report.skip(source, source.meta["dense"])


def _input_layout(node: Node, sample: Layout | None) -> Layout | None:
    """The layout of an input of the U-Net; ``sample`` is that of the latents, None for the latents themselves.

    Another input is a map if it has the latents' resolution, or this halved some times, as ControlNet's residuals have.
    """
    layout = _map_layout(node)
    if layout is None or sample is None:
        return layout
    sizes = [tuple(-(-side // 2**level) for side in sample.size) for level in range(8)]
    return layout if layout.size in sizes and layout.size != (1, 1) else None


def _reads_a_map(node: Node) -> bool:
    """Whether the result of a dense operation may be a map again: if an operand is one.

    Four dimensions alone do not say so, as heads ``[B, heads, H*W, d]`` have them as well.
    """
    return any(layout is not None and layout.roles == "bchw" for layout in map(layout_of, node.all_input_nodes))


def _map_layout(node: Node) -> Layout | None:
    """The layout of a floating-point value of four dimensions, taken to be a map ``[B, C, H, W]``."""
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor) and val.ndim == 4 and val.is_floating_point():
        return Layout("bchw", (val.shape[2], val.shape[3]))
    return None


def layout_of(node: object) -> Layout | None:
    """The layout of an operand; None for numbers and for values without space."""
    return node.meta.get("layout") if isinstance(node, Node) else None


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _same(node: Node) -> Layout | None:
    return layout_of(node.args[0])


def _binary(node: Node) -> Layout | None:
    operands = [arg for arg in node.args[:2] if isinstance(arg, Node)]
    layouts = {layout for layout in map(layout_of, operands) if layout is not None}
    if len(layouts) != 1:
        raise ValueError("its operands lie differently in space")
    (layout,) = layouts
    out = _shape(node)
    if len(out) != len(layout.roles):
        raise ValueError("its operands broadcast to more dimensions")
    for operand in operands:
        shape = (1,) * (len(out) - operand.meta["val"].ndim) + _shape(operand)
        if layout_of(operand) is not None and shape != out:
            raise ValueError("a spatial operand is broadcast")
        if layout_of(operand) is None and any(shape[i] != 1 for i, role in enumerate(layout.roles) if role in "hws"):
            raise ValueError("an operand without a known layout varies over space")
    return layout


def _map_in(node: Node, what: str) -> Layout:
    layout = layout_of(node.args[0])
    if layout is None or layout.roles != "bchw":
        raise ValueError(f"{what} of a value that is no map [B, C, H, W]")
    return layout


def _conv(node: Node) -> Layout | None:
    _map_in(node, "a convolution")
    if node.kwargs:
        raise ValueError("a convolution with keyword arguments has no row kernel")
    groups = arguments_of(node)["groups"]
    if groups != 1:
        raise ValueError(f"a grouped convolution (groups={groups}) has no row kernel")
    return Layout("bchw", _shape(node)[2:])  # type: ignore[arg-type]


def _upsample(node: Node) -> Layout | None:
    source = _map_in(node, "upsampling").size
    scales = arguments_of(node)["scale_factors"]
    if scales and any(side * scale != out for side, scale, out in zip(source, scales, _shape(node)[2:], strict=True)):
        raise ValueError(f"upsampling by {scales}, which is no ratio of whole sizes")
    return Layout("bchw", _shape(node)[2:])  # type: ignore[arg-type]


def _group_norm(node: Node) -> Layout | None:
    if node.kwargs:
        raise ValueError("a group norm with keyword arguments has no row kernel")
    layout = layout_of(node.args[0])
    if layout is None or layout.roles not in ("bchw", "bcs"):
        raise ValueError("a group norm of a value that is neither [B, C, H, W] nor [B, C, H*W]")
    return layout


def _layer_norm(node: Node) -> Layout | None:
    layout = layout_of(node.args[0])
    assert layout is not None
    if set(layout.roles[-len(arguments_of(node)["normalized_shape"]) :]) != {"c"}:
        raise ValueError("a layer norm over dimensions that are not channels")
    return layout


def _linear(node: Node) -> Layout | None:
    layout = layout_of(node.args[0])
    if layout is None or layout.roles[-1] != "c":
        raise ValueError("a linear layer over a dimension that is not a channel")
    return layout


def _view(node: Node) -> Layout | None:
    layout = layout_of(node.args[0])
    assert layout is not None
    return layout.viewed(_shape(node.args[0]), _shape(node))  # type: ignore[arg-type]


def _permute(node: Node) -> Layout | None:
    layout = layout_of(node.args[0])
    assert layout is not None
    return layout.permuted(permutation(node))


def _cat(node: Node) -> Layout | None:
    layouts = {layout_of(arg) for arg in node.args[0]}  # type: ignore[union-attr]
    if len(layouts) != 1 or None in layouts:
        raise ValueError("its parts lie differently in space")
    (layout,) = layouts
    assert layout is not None
    layout.row_dim(arguments_of(node)["dim"])
    return layout


def _chunk(node: Node) -> Layout | None:
    layout = layout_of(node.args[0])
    assert layout is not None
    layout.row_dim(arguments_of(node)["dim"])
    return layout


def _attention(node: Node) -> Layout | None:
    query, key, value = (layout_of(arg) for arg in node.args[:3])
    if query is None or query.roles != "bcsc":
        raise ValueError("attention whose query is not [B, heads, H*W, channels]")
    if not (key == value and key in (None, query)):
        raise ValueError("attention whose keys and values lie elsewhere than its queries")
    given = arguments_of(node)
    if given["attn_mask"] is not None:
        raise ValueError("attention with a mask has no row kernel")
    if any(given[option] for option in ("is_causal", "dropout_p", "enable_gqa")):
        raise ValueError("causal, grouped-query or dropped-out attention has no row kernel")
    if key is None and _shape(node.args[1])[:2] != _shape(node)[:2]:  # type: ignore[arg-type]
        raise ValueError("cross-attention whose keys are not [B, heads, tokens, channels] of the queries' batch")
    return query


_RULES: dict[object, Callable[[Node], Layout | None]] = {
    **dict.fromkeys(targets.UNARY | targets.COPY, _same),
    **dict.fromkeys(targets.BINARY, _binary),
    **dict.fromkeys(targets.VIEW, _view),
    **dict.fromkeys(targets.PERMUTE, _permute),
    **dict.fromkeys(targets.CAT, _cat),
    **dict.fromkeys(targets.CHUNK, _chunk),
    targets.GETITEM: _same,
    targets.CONV: _conv,
    targets.LINEAR: _linear,
    targets.GROUP_NORM: _group_norm,
    targets.LAYER_NORM: _layer_norm,
    targets.ATTENTION: _attention,
    targets.UPSAMPLE: _upsample,
}
