"""Pass 4: convolutions of the region read the active pixels and their halo through a neighbour table.

1.  A convolution of a value of the region, of any stride and dilation:
        gather(conv2d(%x, %w, %b, stride 2))
    ->  conv2d_rows(gather(%x), halo, packed(%w), %b, table(size of %x -> size of %y)) where ``halo = base_map_x[halo
    index]`` has the base's values of the pixels next to the mask. Where every pixel of %x is a row
    (``config.is_whole``) there is no halo.
2.  A convolution of a nearest-upsampled value: the same, but the table names pixels of the small map. The large map is
    never made.
3.  A convolution of a dense value, such as the latents:
    ->  conv2d_rows(pixels of %x, None, packed(%w), %b, table of pixel ids)
4.  A 1x1 convolution of stride 1 needs no neighbours:
    ->  linear(gather(%x), flattened %w, %b)

:func:`sparsify_conv_inside` is the same pass for a base that keeps no maps. Case 1 has no halo there:
    ->  conv2d_rows(gather(%x), None, packed(%w), %b, table) whose table names the nearest row where a pixel is none
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.fx import GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.layout import Size
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.taps import Taps
from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import RowBuilder, move_gathers

aten = targets.aten


def sparsify_conv(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Rewrite the convolutions of the region."""
    report = PassReport("sparsify_conv")
    move_gathers(graph_module, report, {targets.CONV}, partial(_conv_rows, config=config, inside=False))
    return report


def sparsify_conv_inside(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Rewrite the convolutions of the region so that they read nothing of the base."""
    report = PassReport("sparsify_conv_inside")
    move_gathers(graph_module, report, {targets.CONV}, partial(_conv_rows, config=config, inside=True))
    return report


def _conv_rows(build: RowBuilder, conv: Node, *, config: SparsityConfig, inside: bool) -> Node:
    given = arguments_of(conv)
    source, weight, bias = given["input"], given["weight"], given["bias"]
    geometry = geometry_of(conv)
    upsampled = None
    if source.target is targets.UPSAMPLE and "dense" not in source.meta:
        upsampled = source.meta["layout"].size
        source = source.args[0]

    kernel = tuple(weight.meta["val"].shape[2:])
    if kernel == (1, 1) and geometry == {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)} and not upsampled:
        flat = build.call(aten.flatten.using_ints, weight, 1)
        return build.form(targets.LINEAR, build.rows(source), flat, bias)

    packed = pack_weight(build, weight)
    size, target = source.meta["layout"].size, conv.meta["layout"].size
    in_region = source.target is targets.SCATTER_ROWS
    options: dict[str, Any] = {**geometry, "dense": not in_region, "inside": in_region and inside}
    taps = Taps(size, target, kernel, upsampled=upsampled, **options)
    table = build.inputs(PlanTensor("table", taps))
    if not in_region:
        return build.form(targets.CONV2D_ROWS, build.pixels(source), None, packed, bias, table)
    if inside or config.is_whole(size):
        return build.form(targets.CONV2D_ROWS, build.rows(source), None, packed, bias, table)
    base = arguments_of(source)["base"]
    halo = build.call(aten.index_select.default, base, 0, build.inputs(PlanTensor("halo", taps)))
    return build.form(targets.CONV2D_ROWS, build.rows(source), halo, packed, bias, table)


def pack_weight(build: RowBuilder, weight: Node) -> Node:
    """A weight ``[Cout, Cin, kh, kw]`` as ``[Cout, kh * kw * Cin]``: tap after tap, each with all channels."""
    packed = build.call(aten.permute.default, weight, [0, 2, 3, 1])
    return build.call(aten.flatten.using_ints, packed, 1)


def geometry_of(conv: Node) -> dict[str, Size]:
    """Stride, padding and dilation of a convolution, each for height and width."""
    given = arguments_of(conv)
    return {name: (given[name][0], given[name][-1]) for name in ("stride", "padding", "dilation")}
