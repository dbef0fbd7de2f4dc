"""A linear layer, its halves, and one times the GELU of the other: one product, where it is exactly that."""

from __future__ import annotations

import operator
from typing import Any

import pytest
from support.fused import (
    COUNT,
    NO_PRODUCT,
    Build,
    behind_a_product,
    epilogue,
)
from support.hand_built import (
    CHANNELS,
    HandBuilt,
    assert_means_the_same,
    aten,
    only,
    targets_of,
)
from torch.fx import Node

from fisedit_compile.passes import targets
from fisedit_compile.passes.fusion.fuse_pointwise import fuse_pointwise

pytestmark = pytest.mark.usefixtures("one_thread")


def geglu(
    build: HandBuilt,
    x: Node,
    pieces: int = 2,
    *,
    gate: int = 1,
    swapped: bool = False,
    twice: bool = False,
    **gelu: Any,
) -> Node:
    wide = build.op(
        aten.linear.default, build.tokens(x), build.weight(pieces * 3, CHANNELS), build.weight(pieces * 3), path="proj"
    )
    chunk = build.op(aten.chunk.default, wide, pieces, -1)
    parts = [build.op(operator.getitem, chunk, i) for i in range(2)]
    factors = parts[1 - gate], build.op(aten.gelu.default, parts[gate], path="gelu", **gelu)
    out = build.op(aten.mul.Tensor, *(factors[::-1] if swapped else factors), path="geglu")
    return build.op(aten.add.Tensor, out, parts[0]) if twice else out


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("options", [{}, {"approximate": "none"}])
def test_7_geglu(swapped: bool, options: dict[str, str]) -> None:
    done = behind_a_product(lambda build, x: geglu(build, x, swapped=swapped, **options))
    fused = only(done.after(fuse_pointwise), targets.LINEAR_ROWS)
    assert epilogue(fused) == {"count": COUNT, "activation": "geglu"}
    assert not {aten.chunk.default, aten.gelu.default, aten.mul.Tensor} & set(targets_of(done.after(fuse_pointwise)))
    assert [user.target for user in fused.users] == [targets.SCATTER_ROWS]
    assert_means_the_same(done, fuse_pointwise)


@pytest.mark.parametrize(
    "then",
    [
        lambda build, x: geglu(build, x, approximate="tanh"),
        lambda build, x: geglu(build, x, pieces=3),
        lambda build, x: geglu(build, x, gate=0),
        lambda build, x: geglu(build, x, twice=True),
    ],
    ids=["GELU by tanh", "three pieces", "GELU of the first half", "a half is read as well"],
)
def test_7_skips_what_looks_like_geglu(then: Build) -> None:
    done = behind_a_product(then)
    assert epilogue(only(done.after(fuse_pointwise), targets.LINEAR_ROWS)) == {"count": COUNT}
    assert {aten.chunk.default, aten.gelu.default, aten.mul.Tensor} <= set(targets_of(done.after(fuse_pointwise)))
    assert ("gelu", NO_PRODUCT) in done.skips("fuse_pointwise")
    assert_means_the_same(done, fuse_pointwise)


def test_7_skips_one_half_times_its_own_gelu() -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        wide = build.op(aten.linear.default, build.tokens(x), build.weight(6, CHANNELS))
        chunk = build.op(aten.chunk.default, wide, 2, -1)
        value, again = (build.op(operator.getitem, chunk, 0) for _ in range(2))
        return build.op(aten.mul.Tensor, value, build.op(aten.gelu.default, again))

    done = behind_a_product(then)
    assert epilogue(only(done.after(fuse_pointwise), targets.LINEAR_ROWS)) == {"count": COUNT}
    assert_means_the_same(done, fuse_pointwise)
