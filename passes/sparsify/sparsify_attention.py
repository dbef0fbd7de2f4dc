"""Pass 6: attention of the region runs on the active tokens of each sample (approximate attention, paper A.3).

Samples may have different numbers of active tokens. The rows stay gathered from the first projection through self- and
cross-attention to the feed-forward layers behind them.

1.  Self-attention, ``attention="full"``: every key of the sample, the base's where a token is not active.
        gather(attention(%q, %k, %v))
    ->  attention_cached(gather(%q), gather(%k), gather(%v), base %k, base %v, row of each pixel, offsets)
2.  Self-attention, ``attention="masked"`` (the paper's): the active tokens of the sample alone.
    ->  attention_rows(gather(%q), gather(%k), gather(%v), offsets, offsets)
    and in either mode where every pixel is a row (``config.is_whole``). There heads of more than 256 channels, as
    decoders have them, stay torch's attention, which the rows of all pixels are viewed for: no row kernel holds them.
3.  Cross-attention: every token of the text, under Prompt-to-Prompt control where the step has it (paper 3.1).
    ->  controlled_rows(gather(%q), tokens of %k, tokens of %v, offsets, index, base maps, %span, %mapper,
                       %keep, %weight)
4.  Cross-attention with ``cross_replace=0``, or to other tokens than the prompt's.
    ->  attention_rows(gather(%q), tokens of %k, tokens of %v, offsets, text offsets)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from math import prod

import torch
from torch.fx import GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, ControlTensor
from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import RowBuilder, move_gathers
from fisedit_compile.passes.text_attention import control_vals, text_attentions

aten = targets.aten

#: Channels of a head that the row kernel holds in registers.
_WIDEST_HEAD = 256


def sparsify_attention(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Rewrite the attention of the region."""
    report = PassReport("sparsify_attention")
    controlled = set(text_attentions(graph_module.graph)) if config.cross_replace else set()
    build = partial(_attention_rows, config=config, controlled=controlled)
    move_gathers(graph_module, report, {targets.ATTENTION}, build)
    return report


def _attention_rows(
    build: RowBuilder, attention: Node, *, config: SparsityConfig, controlled: Collection[Node]
) -> Node:
    query, key, value = attention.args[:3]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    size = attention.meta["layout"].size
    scale = attention.kwargs.get("scale")
    offsets = build.inputs(PlanTensor("offsets", size))
    if "layout" not in key.meta:
        tokens, text = (_tokens(build, node) for node in (key, value))
        if attention in controlled:
            control = _control(build, attention)
            index = build.inputs(PlanTensor("index", size))
            operands = (build.rows(query), tokens, text, offsets, index, *control, prod(size), scale)
            return build.form(targets.CONTROLLED_ROWS, *operands)
        counts = _text_offsets(build, key)
        return build.form(targets.ATTENTION_ROWS, build.rows(query), tokens, text, offsets, counts, scale)
    rows = [build.rows(node) for node in (query, key, value)]
    if config.is_whole(size) and query.meta["val"].shape[-1] > _WIDEST_HEAD:
        return _attention_of_maps(build, attention, rows)
    if config.attention == "masked" or config.is_whole(size):
        return build.form(targets.ATTENTION_ROWS, *rows, offsets, offsets, scale)
    row_of = build.inputs(PlanTensor("row_of", size))
    base = [arguments_of(node)["base"] for node in (key, value)]
    return build.form(targets.ATTENTION_CACHED, *rows, *base, row_of, offsets, scale)


def _control(build: RowBuilder, attention: Node) -> list[Node]:
    """The base's maps of a cross-attention, and the tensors of control."""
    vals = control_vals(attention)
    control = [build.inputs(ControlTensor(kind), vals[kind]) for kind in ("span", "mapper", "keep", "weight")]
    return [build.inputs(CacheEntry(attention.name, "attention"), vals["maps"]), *control]


def _attention_of_maps(build: RowBuilder, attention: Node, rows: Sequence[Node]) -> Node:
    """Attention of rows ``[B*S, heads, d]``, all pixels among them, as torch computes it."""
    samples = attention.meta["val"].shape[0]
    heads = [
        build.call(aten.transpose.int, build.call(aten.unflatten.int, each, 0, [samples, -1]), 1, 2) for each in rows
    ]
    out = build.call(targets.ATTENTION, *heads, scale=attention.kwargs.get("scale"))
    return build.form(aten.flatten.using_ints, build.call(aten.transpose.int, out, 1, 2), 0, 1)


def _tokens(build: RowBuilder, value: Node) -> Node:
    """Text keys or values ``[B, heads, T, d]`` as rows ``[B*T, heads, d]``."""
    permuted = build.call(aten.permute.default, value, [0, 2, 1, 3])
    return build.call(aten.flatten.using_ints, permuted, 0, 1)


def _text_offsets(build: RowBuilder, key: Node) -> Node:
    """Cumulative token counts of the text, the same for every sample: int32 ``[B + 1]``."""
    batch, _, tokens, _ = key.meta["val"].shape
    options = {"dtype": torch.int32, "device": key.meta["val"].device}
    return build.call(aten.arange.start_step, 0, tokens * (batch + 1), tokens, **options)
