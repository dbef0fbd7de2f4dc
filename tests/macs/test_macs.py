"""MACs: each operator against numbers worked out by hand and torch's counter, whole U-Nets against their modules."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given
from hypothesis import strategies as st
from support.random_rows import masks, offsets_of
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.utils.flop_counter import FlopCounterMode

from fisedit_compile.architectures import build_unet, unet_inputs
from fisedit_compile.errors import CaptureError
from fisedit_compile.macs.counter import MacCount, MacReport, count_graph, count_macs
from fisedit_compile.macs.formulas import FORMULAS, UNCOUNTED, attention_rows, is_refused
from fisedit_compile.planning.edit_plan import row_of_pixels

aten, fisedit = torch.ops.aten, torch.ops.fisedit


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def offsets(*counts: int) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


#: operator, its arguments, and its MACs as the product that anyone would write down
CASES: dict[str, tuple[Any, tuple[Any, ...], str, int]] = {
    "conv 3x3": (
        aten.conv2d.default,
        (normal(2, 4, 6, 5), normal(8, 4, 3, 3), normal(8), [1, 1], [1, 1]),
        "convolution",
        2 * 8 * (6 * 5) * (4 * 3 * 3),
    ),
    "conv stride 2, dilated, two groups": (
        aten.conv2d.default,
        (normal(3, 4, 9, 7), normal(6, 2, 3, 3), None, [2, 2], [2, 2], [2, 2], 2),
        "convolution",
        3 * 6 * (5 * 4) * (2 * 3 * 3),
    ),
    "conv in its general form": (
        aten.convolution.default,
        (normal(1, 4, 6, 5), normal(8, 4, 1, 1), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        "convolution",
        8 * (6 * 5) * 4,
    ),
    "transposed conv": (
        aten.convolution.default,
        (normal(1, 4, 6, 5), normal(4, 8, 2, 2), None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1),
        "convolution",
        4 * (6 * 5) * (8 * 2 * 2),
    ),
    "linear": (aten.linear.default, (normal(2, 7, 4), normal(5, 4), normal(5)), "linear", 2 * 7 * 4 * 5),
    "mm": (aten.mm.default, (normal(3, 4), normal(4, 5)), "linear", 3 * 4 * 5),
    "addmm": (aten.addmm.default, (normal(5), normal(3, 4), normal(4, 5)), "linear", 3 * 4 * 5),
    "bmm": (aten.bmm.default, (normal(2, 3, 4), normal(2, 4, 5)), "attention", 2 * 3 * 4 * 5),
    "baddbmm": (
        aten.baddbmm.default,
        (normal(2, 3, 5), normal(2, 3, 4), normal(2, 4, 5)),
        "attention",
        2 * 3 * 4 * 5,
    ),
    "self-attention": (
        aten.scaled_dot_product_attention.default,
        (normal(2, 3, 10, 8), normal(2, 3, 10, 8), normal(2, 3, 10, 8)),
        "attention",
        2 * 3 * (10 * 10) * (8 + 8),
    ),
    "cross-attention": (
        aten.scaled_dot_product_attention.default,
        (normal(2, 3, 10, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 8)),
        "attention",
        2 * 3 * (10 * 7) * (8 + 8),
    ),
    "conv of rows, with a halo": (
        fisedit.conv2d_rows.default,
        (normal(5, 4), normal(3, 4), normal(6, 9 * 4), normal(6), torch.randint(-1, 8, (7, 9), dtype=torch.int32)),
        "convolution",
        7 * 9 * 4 * 6,
    ),
    "conv of rows, all of it outside the picture": (
        fisedit.conv2d_rows.default,
        (normal(0, 4), None, normal(6, 4 * 4), None, torch.full((2, 4), -1, dtype=torch.int32)),
        "convolution",
        2 * 4 * 4 * 6,
    ),
    "conv of rows, which takes the next norm too": (
        fisedit.conv2d_rows_and_norm.default,
        (
            *(normal(5, 4), None, normal(6, 4 * 4), normal(6), torch.randint(-1, 5, (7, 4), dtype=torch.int32)),
            *(torch.tensor([7], dtype=torch.int32), torch.tensor([0] * 3 + [1] * 4), None, normal(7, 6)),
            *(normal(2, 6), normal(2, 6), "silu"),
        ),
        "convolution",
        7 * 4 * 4 * 6,
    ),
    "conv of rows, with a shortcut beside it": (
        fisedit.conv2d_rows.default,
        (
            *(normal(5, 4), None, normal(6, 4 * 4), None, torch.randint(-1, 5, (7, 4), dtype=torch.int32)),
            *(None, None, None, None, None, None, "none", normal(7, 3), normal(6, 3)),
        ),
        "convolution",
        7 * (4 * 4 + 3) * 6,
    ),
    "linear of rows": (
        fisedit.linear_rows.default,
        (normal(7, 4), normal(6, 4), None, torch.tensor([5], dtype=torch.int32)),  # padded rows count
        "linear",
        7 * 4 * 6,
    ),
    "linear of rows, with GEGLU": (
        fisedit.linear_rows.default,
        (normal(7, 4), normal(6, 4), normal(6), None, None, None, None, None, None, "geglu"),
        "linear",
        7 * 4 * 6,
    ),
    "linear of rows, which takes the next norm too": (
        fisedit.linear_rows_and_norm.default,
        (
            *(normal(3, 4), normal(6, 4), normal(6), None, torch.tensor([0, 0, 1]), normal(2, 6), normal(3, 6)),
            *(normal(2, 6), normal(2, 6), "none"),
        ),
        "linear",
        3 * 4 * 6,
    ),
    "linear of rows, which takes the layer norm too": (
        fisedit.linear_rows_and_layer_norm.default,
        (normal(3, 4), normal(6, 4), normal(6), normal(3, 6), normal(6), None, 1e-5),
        "linear",
        3 * 4 * 6,
    ),
    "ragged self-attention": (
        fisedit.attention_rows.default,
        (normal(9, 2, 4), normal(9, 2, 4), normal(9, 2, 4), offsets(2, 0, 7), offsets(2, 0, 7), None),
        "attention",
        (2 * 2 + 0 * 0 + 7 * 7) * 2 * (4 + 4),
    ),
    "ragged cross-attention": (
        fisedit.attention_rows.default,
        (normal(9, 2, 4), normal(15, 2, 4), normal(15, 2, 4), offsets(2, 0, 7), offsets(5, 5, 5), None),
        "attention",
        (2 * 5 + 0 * 5 + 7 * 5) * 2 * (4 + 4),
    ),
    "cross-attention that may be controlled": (
        fisedit.controlled_rows.default,
        (
            *(normal(9, 2, 4), normal(15, 2, 4), normal(15, 2, 4), offsets(2, 0, 7), torch.arange(9)),
            *(normal(0, 2, 0), torch.zeros(3, dtype=torch.int32), normal(1, 5, 5), normal(1, 5), normal(1, 5), 7, None),
        ),
        "attention",
        9 * 5 * 2 * (4 + 4),
    ),
    "attention to all pixels": (
        fisedit.attention_cached.default,
        (
            *(normal(5, 2, 4) for _ in range(3)),
            normal(12, 2, 4),
            normal(12, 2, 4),
            row_of_pixels(torch.tensor([0, 2, 3, 5, 8]), 12),
            offsets(4, 1),
            None,
        ),
        "attention",
        (4 * 6 + 1 * 6) * 2 * (4 + 4),
    ),
}


def graph_of(target: Any, args: tuple[Any, ...]) -> tuple[GraphModule, list[Tensor]]:
    """A graph of one operator whose tensors are inputs, and those."""
    graph, inputs = Graph(), [arg for arg in args if isinstance(arg, Tensor)]
    nodes = [graph.placeholder(f"input_{i}") if isinstance(arg, Tensor) else arg for i, arg in enumerate(args)]
    graph.output(graph.call_function(target, tuple(nodes)))
    return GraphModule({}, graph), inputs


@pytest.mark.parametrize("case", CASES)
def test_every_counter_agrees_with_the_count_by_hand(case: str) -> None:
    target, args, kind, macs = CASES[case]
    with FlopCounterMode(display=False) as torchs:
        out = target(*args)
    assert FORMULAS[target._schema.name].macs(out, *args) == macs
    assert torchs.get_total_flops() == 2 * macs
    count = count_graph(*graph_of(target, args))  # by fvcore, and by walking the graph
    assert count.total == macs
    assert {name: value for name, value in count.by_op.items() if value} == {kind: macs}


def test_every_formula_has_a_case() -> None:
    covered = {target._schema.name for target, *_ in CASES.values()}
    assert covered == set(FORMULAS) - {"aten::_convolution"}  # the name that fvcore meets each convolution under


def test_torch_counts_attention_on_the_cpu_too() -> None:
    target, args, _, macs = CASES["self-attention"]
    for device in ("cpu", "meta"):
        with FlopCounterMode(display=False) as torchs:
            target(*(arg.to(device) for arg in args))
        assert torchs.get_total_flops() == 2 * macs


@given(masks(), st.integers(0, 5))
def test_ragged_attention_without_values_assumes_equal_counts(mask: Tensor, tokens: int) -> None:
    own, text = offsets_of(mask), offsets(*[tokens] * len(mask))
    rows, words = torch.empty(int(own[-1]), 2, 4), torch.empty(int(text[-1]), 2, 4)
    known = attention_rows(rows, rows, rows, rows, own, own)
    unknown = attention_rows(rows, rows, rows, rows, own.to("meta"), own.to("meta"))
    assert known == sum(int(n) ** 2 for n in own.diff()) * 2 * (4 + 4)
    assert unknown <= known
    if len(set(own.diff().tolist())) == 1:
        assert unknown == known
    exact = attention_rows(rows, rows, words, words, own, text)
    assert attention_rows(rows, rows, words, words, own.to("meta"), text.to("meta")) == exact == len(rows) * tokens * 16


def test_a_graph_of_rows_is_counted_for_any_number_of_rows() -> None:
    target, (rows, halo, weight, bias, _), *_ = CASES["conv of rows, with a halo"]
    for outputs in (0, 1, 11):
        graph_module, inputs = graph_of(target, (rows, halo, weight, bias, torch.zeros(outputs, 9, dtype=torch.int32)))
        assert count_graph(graph_module, [tensor.to("meta") for tensor in inputs]).total == outputs * 9 * 4 * 6


def test_an_operation_that_cannot_be_counted_is_refused() -> None:
    graph_module, inputs = graph_of(aten.einsum.default, ("ij,jk->ik", normal(2, 3)))
    (node,) = graph_module.graph.find_nodes(op="call_function", target=aten.einsum.default)
    node.args = ("ij,kj->ik", [node.args[1], node.args[1]])
    node.meta["module_path"] = "mid_block.strange"
    with pytest.raises(CaptureError, match=r"aten::einsum in mid_block\.strange has no MAC formula"):
        count_graph(graph_module, inputs)


def test_an_operator_of_ours_without_a_formula_is_refused() -> None:
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fisedit::")}
    assert {name for name in ours if is_refused(name)} == set()
    assert ours >= UNCOUNTED
    assert is_refused("fisedit::another")


def by_module(unet: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """MACs of each module of a diffusers U-Net, from what its modules say of themselves while it runs."""
    macs: Counter[str] = Counter()

    def watch(path: str) -> Any:
        def count(module: Any, given: tuple[Any, ...], options: dict[str, Any], out: Any) -> None:
            if isinstance(module, torch.nn.Linear):
                macs[path] += out.numel() * module.in_features
            elif isinstance(module, torch.nn.Conv2d):
                macs[path] += out.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            elif isinstance(module, Attention):
                text = options.get("encoder_hidden_states")
                samples, queries, _ = given[0].shape
                keys = queries if text is None else text.shape[1]
                macs[path] += 2 * samples * queries * keys * module.inner_dim

        return count

    handles = [m.register_forward_hook(watch(path), with_kwargs=True) for path, m in unet.named_modules()]
    with torch.no_grad():
        unet(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return {path: value for path, value in macs.items() if value}


@pytest.mark.parametrize(
    ("arch", "batch", "height", "width"),
    [("tiny", 2, 128, 64), ("tiny-sd15", 3, 72, 104), ("tiny-sdxl", 1, 128, 128)],
)
def test_each_module_has_the_macs_that_its_own_shapes_say(arch: str, batch: int, height: int, width: int) -> None:
    unet = build_unet(arch, device="meta")
    args, kwargs = unet_inputs(unet, batch=batch, height=height, width=width)
    expected = by_module(unet, args, kwargs)
    report = count_macs(unet, height=height, width=width, batch=batch)
    assert dict(report.by_module) == expected
    for breakdown in (report.by_op, report.by_resolution, report.by_module):
        assert sum(breakdown.values()) == report.total
    assert next(iter(report.by_resolution)) == f"{height // 8}x{width // 8}"
    assert report.dense.of_module("down_blocks.1") == sum(
        value for path, value in expected.items() if path.startswith("down_blocks.1.")
    )
    assert report.dense.of_module("") == report.total
    with FlopCounterMode(display=False) as torchs:
        unet(*args, **kwargs)
    assert torchs.get_total_flops() == 2 * report.total


@pytest.mark.parametrize(
    ("arch", "size", "batch", "total", "without_attention"),
    [("sd15", 512, 1, 401.64, 338.61), ("sd2", 768, 2, 2149.11, 1520.97), ("sdxl", 1024, 2, 6761.24, 5977.32)],
)
def test_published_models(arch: str, size: int, batch: int, total: float, without_attention: float) -> None:
    report = count_macs(arch, height=size, width=size, batch=batch)
    assert report.total / 1e9 == pytest.approx(total, abs=0.005)
    assert report.dense.without_attention / 1e9 == pytest.approx(without_attention, abs=0.005)
    unet = build_unet(arch, device="meta")
    args, kwargs = unet_inputs(unet, batch=batch, height=size, width=size)
    with FlopCounterMode(display=False) as torchs:
        unet(*args, **kwargs)
    assert torchs.get_total_flops() == 2 * report.total
    if arch == "sd2":
        by_resolution = {name: round(macs / 1e9) for name, macs in report.by_resolution.items()}
        assert by_resolution == {"96x96": 1056, "48x48": 565, "24x24": 435, "12x12": 89, "none": 4}


@pytest.fixture(scope="module")
def report() -> MacReport:
    return count_macs("tiny", height=64, width=96)


def test_a_model_with_weights_counts_as_one_without_and_keeps_them(report: MacReport) -> None:
    unet = build_unet("tiny", dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    pipeline = SimpleNamespace(unet=unet, vae_scale_factor=4)  # whose latent pixels are half as wide as usual
    assert count_macs(pipeline, height=32, width=48).dense == report.dense
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert unet.device.type == "cpu"


def test_the_report_speaks_json_and_tables(report: MacReport) -> None:
    row = json.loads(report.to_json())
    assert row["macs_dense"] == report.total
    assert row["macs_sparse"] is row["ratio"] is row["edit_size"] is None
    assert row["by_op"]["linear"] == {"dense": report.by_op["linear"], "sparse": None}
    text = str(report)
    assert text.splitlines()[0] == "MACs of one U-Net call, image 64x96, batch 2"
    for line in ("total", "without attention products", "convolution", "8x12", "none", "down_blocks.0", "conv_out"):
        assert any(each.strip().startswith(line) for each in text.splitlines())


def test_a_sparse_count_stands_beside_the_dense_one() -> None:
    def count(conv: int, attention: int) -> MacCount:
        by_op = {"convolution": conv, "linear": 0, "attention": attention}
        return MacCount(by_op, {"8x8": conv + attention}, {"a.b": conv, "a.c": attention})

    report = MacReport(count(6_000_000_000, 4_000_000_000), 64, 64, 2, count(2_000_000_000, 0), 0.05, "masked")
    assert (report.total, report.ratio) == (2_000_000_000, 5.0)
    assert report.to_dict()["by_op"]["attention"] == {"dense": 4_000_000_000, "sparse": 0}
    lines = [line.split() for line in str(report).splitlines()]
    assert " ".join(lines[0]).endswith("batch 2, 5.0% edited, masked attention")
    assert ["total", "10.00", "G", "2.00", "G", "5.00x"] in lines
    assert ["attention", "4.00", "G", "0.00", "G", "-"] in lines
    nothing = MacReport(count(1, 1), 64, 64, 2, count(0, 0), 0.0, "full")
    assert (nothing.total, nothing.ratio) == (0, None)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'sd9'"):
        count_macs("sd9", height=64, width=64)
    with pytest.raises(ValueError, match=r"Linear is no UNet2DConditionModel and has none as \.unet"):
        count_macs(torch.nn.Linear(2, 2), height=64, width=64)
    with pytest.raises(ValueError, match="width is 100 pixels"):
        count_macs("tiny", height=64, width=100)
    with pytest.raises(ValueError, match="batch is 0"):
        count_macs("tiny", height=64, width=64, batch=0)
