"""The passes in their order, and the loop that runs, times and checks them.

``README.md`` in this folder lists what holds between two passes, and how to add one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.fx import GraphModule

from fisedit_compile.config import SparsityConfig
from fisedit_compile.passes.fusion.fuse_norms import fuse_norms
from fisedit_compile.passes.fusion.fuse_pointwise import fuse_pointwise
from fisedit_compile.passes.fusion.join_shortcuts import join_shortcuts
from fisedit_compile.passes.fusion.merge_linears import merge_linears
from fisedit_compile.passes.graph_dump import GraphDump
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.region.annotate_layout import annotate_layout
from fisedit_compile.passes.region.cancel_scatter_gather import cancel_scatter_gather
from fisedit_compile.passes.region.insert_gather_scatter import insert_gather_scatter
from fisedit_compile.passes.region.select_region import select_region, select_sparse_levels
from fisedit_compile.passes.region.unfold_whole_rows import unfold_whole_rows
from fisedit_compile.passes.sparsify.follow_statistics import follow_statistics
from fisedit_compile.passes.sparsify.sparsify_attention import sparsify_attention
from fisedit_compile.passes.sparsify.sparsify_conv import sparsify_conv, sparsify_conv_inside
from fisedit_compile.passes.sparsify.sparsify_norm import sparsify_norm
from fisedit_compile.passes.sparsify.sparsify_pointwise import sparsify_pointwise
from fisedit_compile.passes.staging.hoist_invariants import hoist_invariants
from fisedit_compile.passes.staging.reuse_timestep import reuse_timestep

Pass = Callable[[GraphModule, SparsityConfig], PassReport]

#: Dense graph -> sparse graph. Between any two of them the graph is complete and can run.
SPARSE_PASSES: tuple[Pass, ...] = (
    annotate_layout,
    select_region,
    insert_gather_scatter,
    sparsify_conv,
    sparsify_norm,
    sparsify_attention,
    sparsify_pointwise,
    cancel_scatter_gather,
    reuse_timestep,
    merge_linears,
    fuse_pointwise,
    fuse_norms,
    join_shortcuts,
    hoist_invariants,
)

#: Dense graph -> sparse graph for masks that change much of the picture: its norms follow the edit.
FOLLOWING_PASSES: tuple[Pass, ...] = tuple(
    each for sparse in SPARSE_PASSES for each in ((sparse, follow_statistics) if sparse is sparsify_norm else (sparse,))
)

#: Dense graph -> the graph of the same meaning in which every pixel is a row; with ``EVERY_RESOLUTION`` as
#: ``dense_below``. It reads nothing of a base: neither values of the timestep, nor maps to scatter into. Recording adds
#: a pass of its own behind ``cancel_scatter_gather``.
WHOLE_PASSES: tuple[Pass, ...] = tuple(unfold_whole_rows if each is reuse_timestep else each for each in SPARSE_PASSES)

#: Those of the sparse graph for decoders, whose maps are too large for a base to keep: on a GPU, where rows of a whole
#: level save kernels, and on the host, where convolutions of whole maps are twice as fast.
DECODER_PASSES: tuple[Pass, ...] = tuple(
    sparsify_conv_inside if each is sparsify_conv else each for each in SPARSE_PASSES
)
DECODER_PASSES_ON_HOST: tuple[Pass, ...] = tuple(
    select_sparse_levels if each is select_region else each for each in DECODER_PASSES
)


def run_passes(
    graph_module: GraphModule, config: SparsityConfig, passes: tuple[Pass, ...] = SPARSE_PASSES
) -> list[PassReport]:
    """Rewrite ``graph_module`` in place; one report a pass, in order.

    :func:`~fisedit_compile.passes.graph_dump.dump_graphs` writes the graph before and after some of them.

    Raises:
        ValueError: a dump was asked for around a pass that does not exist.
    """
    known = dict.fromkeys(rewrite.__name__ for rewrite in (*FOLLOWING_PASSES, *WHOLE_PASSES, *DECODER_PASSES_ON_HOST))
    dump = GraphDump([rewrite.__name__ for rewrite in passes], list(known))
    reports = []
    for rewrite in passes:
        dump.write(graph_module, rewrite.__name__, "before")
        start = time.perf_counter()
        report = rewrite(graph_module, config)
        report.seconds = time.perf_counter() - start
        dump.write(graph_module, rewrite.__name__, "after")
        reports.append(report)
    graph_module.graph.lint()  # after the last one alone: it takes a third as long as the passes
    graph_module.recompile()
    return reports
