"""Products of rows are read and rewritten by the names of their schemas, however their arguments are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of, call_form
from fisedit_compile.passes.row_product import RowProduct


@pytest.fixture
def nodes() -> dict[str, Node]:
    """A graph with an input for each tensor that a convolution of rows may be given."""
    graph = Graph()
    names = ("rows", "halo", "weight", "bias", "table", "count", "sample", "sample_bias", "residual", "shortcut")
    made = {name: graph.placeholder(name) for name in (*names, "shortcut_weight")}
    for i, node in enumerate(made.values()):
        node.meta["val"] = torch.empty(i + 1, 4, device="meta")
    return made


def conv(nodes: dict[str, Node], *optional: Any, **named: Any) -> Node:
    """A call of ``conv2d_rows`` with all that every call needs, and more."""
    operands = [nodes[name] for name in ("rows", "halo", "weight", "bias", "table")]
    return nodes["rows"].graph.call_function(targets.CONV2D_ROWS, (*operands, *optional), named)


def test_an_argument_is_the_same_by_position_and_by_keyword(nodes: dict[str, Node]) -> None:
    by_position = RowProduct(conv(nodes, nodes["count"], None, None, nodes["residual"]))
    by_keyword = RowProduct(conv(nodes, residual=nodes["residual"], count=nodes["count"]))
    assert by_position.arguments == by_keyword.arguments
    assert by_keyword["residual"] is nodes["residual"]
    assert (by_keyword["sample"], by_keyword["activation"]) == (None, "none")


def test_every_product_has_the_names_of_its_schema(nodes: dict[str, Node]) -> None:
    graph = nodes["rows"].graph
    for target in targets.ROW_PRODUCTS:
        required = [each.name for each in target._schema.arguments if not each.has_default_value()]
        given = [1e-5 if name == "eps" else nodes.get(name) for name in required]
        product = RowProduct(graph.call_function(target, tuple(given)))
        assert list(product.arguments) == [each.name for each in target._schema.arguments]
        assert set(product.epilogue) == {"residual"} & set(required)  # which the layer norm's product always has


def test_what_an_operator_does_not_have_is_an_error(nodes: dict[str, Node]) -> None:
    linear = nodes["rows"].graph.call_function(targets.LINEAR_ROWS, (nodes["rows"], nodes["weight"], None))
    with pytest.raises(KeyError, match="shortcut"):
        RowProduct(linear)["shortcut"]
    with pytest.raises(ValueError, match=r"linear_rows.default has no arguments \['shortcut'\]"):
        RowProduct(linear).rewrite(shortcut=nodes["shortcut"])
    with pytest.raises(ValueError, match="rows calls rows, which is no product of rows"):
        RowProduct(nodes["rows"])


def test_the_epilogue_is_what_does_something(nodes: dict[str, Node]) -> None:
    sums = {name: nodes[name] for name in ("sample", "sample_bias", "residual")}
    product = RowProduct(conv(nodes, count=nodes["count"], activation="silu", **sums))
    assert product.epilogue == {**sums, "activation": "silu"}


def test_rewriting_gives_keywords_and_leaves_defaults_out(nodes: dict[str, Node]) -> None:
    node = conv(nodes, nodes["count"], None, None, nodes["residual"])
    shortcut = {name: nodes[name] for name in ("shortcut", "shortcut_weight")}
    RowProduct(node).rewrite(bias=None, residual=None, **shortcut)
    assert node.args == (nodes["rows"], nodes["halo"], nodes["weight"], None, nodes["table"])
    assert node.kwargs == {"count": nodes["count"], **shortcut}
    assert node not in nodes["residual"].users


def test_values_stand_for_tensors(nodes: dict[str, Node]) -> None:
    product = RowProduct(conv(nodes))
    assert product.val("weight") is nodes["weight"].meta["val"]
    assert product.val("residual") is None


def test_a_call_needs_what_has_no_default(nodes: dict[str, Node]) -> None:
    arguments = arguments_of(conv(nodes))
    del arguments["table"]
    with pytest.raises(KeyError, match="table"):
        call_form(targets.CONV2D_ROWS, arguments)


def test_what_is_no_operator_has_no_schema(nodes: dict[str, Node]) -> None:
    graph = nodes["rows"].graph
    with pytest.raises(ValueError, match="has no schema that 2 arguments"):
        arguments_of(graph.call_function(targets.GETITEM, (nodes["rows"], 0)))
