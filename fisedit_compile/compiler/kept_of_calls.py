"""What a base keeps of each U-Net call, so that sparse steps and controlled ones can be run from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import GraphModule

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.requests import CacheEntry, requests_of
from fisedit_compile.ir.tile_grid import TILES
from fisedit_compile.kernels.indexing.row_format import RowFormat
from fisedit_compile.kernels.norms.tile_moments import moments_dtype
from fisedit_compile.passes.rewriting import norm_arguments
from fisedit_compile.passes.staging.hoist_invariants import fetched_rows
from fisedit_compile.passes.text_attention import text_attentions

#: The shape and dtype of a tensor.
TensorSpec = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True, eq=False)
class KeptOfCalls:
    """The entries of a call's cache: names, shapes, and how they lie in memory.

    Attributes:
        config: what was made sparse and how.
        dense: the dense graph with layouts annotated.
        sparse: the sparse graph before it was cut into stages.
        batch: samples in the U-Net's batch.
        output: the entry of the noise prediction, which a step returns outside the mask; None if it computes all of it.
        follows: whether moments over tiles are kept, by which the statistics of norms follow large edits.
    """

    config: SparsityConfig
    dense: GraphModule
    sparse: GraphModule
    batch: int
    output: CacheEntry | None
    follows: bool

    @cached_property
    def cache_entries(self) -> list[CacheEntry]:
        """What a base must keep of each call so that a sparse step can be run from it."""
        return [entry for entry in self._entries if entry.kind != "attention"]

    @cached_property
    def attention_entries(self) -> list[CacheEntry]:
        """The cross-attention maps that a base must keep of each call for controlled dense steps."""
        return [CacheEntry(node.name, "attention") for node in text_attentions(self.dense.graph)]

    @cached_property
    def controlled_entries(self) -> list[CacheEntry]:
        """Those of :attr:`attention_entries` that a sparse step reads where it is controlled."""
        return [entry for entry in self._entries if entry.kind == "attention"]

    @cached_property
    def _entries(self) -> list[CacheEntry]:
        return [
            *(request for request in requests_of(self.sparse.graph) if isinstance(request, CacheEntry)),
            *self.tiles,
        ]

    @cached_property
    def tiles(self) -> dict[CacheEntry, TensorSpec]:
        """What the graphs of large masks read beside the entries of the sparse graph: moments of inputs of norms."""
        if not self.follows:
            return {}
        nodes, tiles = {node.name: node for node in self.dense.graph.nodes}, {}
        for request in requests_of(self.sparse.graph):
            if isinstance(request, CacheEntry) and request.kind == "scale":
                value, groups, *_ = norm_arguments(nodes[request.node])
                shape = torch.Size([self.batch * TILES, groups, 2])
                tiles[CacheEntry(request.node, "tiles")] = (shape, moments_dtype(value.meta["val"].dtype))
        return tiles

    @cached_property
    def cache_specs(self) -> dict[CacheEntry, TensorSpec]:
        """The shape and dtype of each of :attr:`cache_entries`."""
        specs: dict[CacheEntry, TensorSpec] = dict(self.tiles)
        for node in self.sparse.graph.find_nodes(op="placeholder"):
            if node.meta.get("request") in self.cache_entries:
                specs[node.meta["request"]] = (node.meta["val"].shape, node.meta["val"].dtype)
        return specs

    @cached_property
    def formats(self) -> dict[CacheEntry, RowFormat]:
        """How the maps lie in the base's memory that it keeps in few bits a value; others lie as they are.

        The noise prediction is one of these, since a step returns it outside the mask.
        """
        sample = self.dense.graph.find_nodes(op="placeholder")[0].meta["val"]
        packing = self.config.packing(sample.device, sample.dtype)
        if packing is None:
            return {}
        by_rows = {entry for entry, _ in fetched_rows(self.sparse).values()}
        nodes = {node.name: node for node in self.dense.graph.nodes}
        formats = {}
        for entry, (shape, dtype) in self.cache_specs.items():
            if entry.kind != "map" or entry == self.output:
                continue
            if entry in by_rows:
                formats[entry] = RowFormat(tuple(shape[1:]), dtype, packing.map_bits)
            else:  # keys and values
                size = nodes[entry.node].meta["layout"].size if packing.tiles else None
                formats[entry] = RowFormat(tuple(shape[1:]), dtype, packing.key_bits, size)
        return formats

    @cached_property
    def stored_specs(self) -> dict[CacheEntry, TensorSpec]:
        """The shape and dtype in which a base keeps each of :attr:`cache_entries`."""
        stored = dict(self.cache_specs)
        for entry, form in self.formats.items():
            pixels = stored[entry][0][0]
            stored[entry] = (torch.Size([form.rows_of(pixels), form.nbytes]), torch.uint8)
        return stored

    def record_nbytes(self, *, samples: int, activations: bool, attention: bool, tokens: int | None = None) -> int:
        """Memory of what a base keeps of one call, in bytes; arguments as of ``Program.record``."""
        kept = 0
        if activations:
            kept += sum(shape.numel() * dtype.itemsize for shape, dtype in self.stored_specs.values())
        if attention:
            for node in text_attentions(self.dense.graph):
                query, key = (each.meta["val"] for each in node.args[:2])  # type: ignore[union-attr]
                kept += samples * math.prod(query.shape[1:-1]) * (tokens or key.shape[-2]) * query.dtype.itemsize
        return kept
