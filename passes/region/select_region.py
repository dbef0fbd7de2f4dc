"""Pass 2: choose the values that become rows: those at the resolutions that pay for it (paper 3.1).

A value joins the region if it has a layout and its operation can run on rows. Below ``config.dense_below`` cells on the
shorter side every pixel is a row, whatever the mask. Such a level is computed whole, but by the same operations, so
that nothing has to be scattered and gathered on the way down and up. Two kinds of values stay out of the region. A
chunk is a tuple, and its pieces join instead. A nearest-upsampled map is never made: the convolution behind it reads
the small map through its table.

:func:`select_sparse_levels` is the same pass where maps of a whole level are faster than its rows: that level stays as
it is.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fisedit_compile.config import EVERY_RESOLUTION, SparsityConfig
from fisedit_compile.errors import SparsifyError
from fisedit_compile.passes import targets
from fisedit_compile.passes.pass_report import PassReport


def select_region(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Set ``meta["region"]`` on the values of the sparse region.

    Raises:
        SparsifyError: no value at all qualifies, so that the edit would run dense, although the config does not ask
            for every resolution to be computed whole.
    """
    return _select(graph_module, config, PassReport("select_region"), whole_levels=True)


def select_sparse_levels(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Set ``meta["region"]`` on the values of the sparse region, but for those of whole levels.

    Raises:
        SparsifyError: as :func:`select_region`.
    """
    return _select(graph_module, config, PassReport("select_sparse_levels"), whole_levels=False)


def _select(graph_module: GraphModule, config: SparsityConfig, report: PassReport, *, whole_levels: bool) -> PassReport:
    for node in graph_module.graph.nodes:
        layout = node.meta.get("layout")
        if layout is None or node.op != "call_function" or "dense" in node.meta or node.target in targets.CHUNK:
            continue
        if node.target is targets.UPSAMPLE:
            if not _read_by_convolutions_alone(node):
                report.skip(node, "its map is used by more than convolutions, so it is computed dense")
            continue
        if config.is_whole(layout.size):
            report.skip(node, f"resolution {layout.size[0]}x{layout.size[1]} is below dense_below={config.dense_below}")
        else:
            report.change(node)
        if whole_levels or not config.is_whole(layout.size):
            node.meta["region"] = True
    if not report.changed and config.dense_below != EVERY_RESOLUTION:
        raise SparsifyError(
            f"nothing to make sparse: no operation of the U-Net runs at {config.dense_below} or more latent cells a "
            "side; lower dense_below, or edit a larger picture"
        )
    return report


def _read_by_convolutions_alone(node: Node) -> bool:
    return all(user.target is targets.CONV and "dense" not in user.meta for user in node.users)
