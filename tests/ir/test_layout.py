"""Layouts: which views and transposes keep pixels apart from channels, and what each dimension is afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compile.ir.layout import Layout

MAP = Layout("bchw", (4, 6))
TOKENS = Layout("bsc", (4, 6))
HEADS = Layout("bcsc", (4, 6))


@pytest.mark.parametrize("roles", ["bchw", "bhwc", "bsc", "bcsc", "bscc", "bccs", "bhw", "cbs", "bhcw", "bs"])
def test_batch_and_space_in_order_make_a_layout(roles: str) -> None:
    assert Layout(roles, (4, 6)).roles == roles


@pytest.mark.parametrize(
    "roles", ["", "b", "bc", "bchc", "bcwh", "bwhc", "chw", "bbchw", "bshw", "bhws", "bss", "bcxs"]
)
def test_anything_else_is_refused(roles: str) -> None:
    with pytest.raises(ValueError, match=f"'{roles}' is not a layout"):
        Layout(roles, (4, 6))


@pytest.mark.parametrize(
    ("roles", "order", "pixel_dims"),
    [
        ("bchw", (0, 2, 3, 1), 3),
        ("bhwc", (0, 1, 2, 3), 3),
        ("bsc", (0, 1, 2), 2),
        ("bcsc", (0, 2, 1, 3), 2),
        ("bccs", (0, 3, 1, 2), 2),
        ("csbc", (2, 1, 0, 3), 2),
        ("bhcw", (0, 1, 3, 2), 3),
    ],
)
def test_order_brings_pixels_to_the_front(roles: str, order: tuple[int, ...], pixel_dims: int) -> None:
    layout = Layout(roles, (4, 6))
    assert layout.order == order
    assert layout.pixel_dims == pixel_dims


def test_channels_are_the_sizes_in_order() -> None:
    assert HEADS.channels((2, 8, 24, 5)) == (8, 5)
    assert MAP.channels((2, 8, 4, 6)) == (8,)
    assert Layout("bhw", (4, 6)).channels((2, 4, 6)) == ()


@pytest.mark.parametrize(
    ("layout", "dim", "row_dim"),
    [(MAP, 1, 1), (MAP, -3, 1), (TOKENS, 2, 1), (TOKENS, -1, 1), (HEADS, 1, 1), (HEADS, 3, 2), (HEADS, -1, 2)],
)
def test_row_dim_of_a_channel(layout: Layout, dim: int, row_dim: int) -> None:
    assert layout.row_dim(dim) == row_dim


@pytest.mark.parametrize(("layout", "dim"), [(MAP, 0), (MAP, 2), (MAP, -1), (TOKENS, 1), (TOKENS, -2), (HEADS, 2)])
def test_row_dim_of_batch_or_space_is_refused(layout: Layout, dim: int) -> None:
    with pytest.raises(ValueError, match=f"of a '{layout.roles}' value is no channel dimension"):
        layout.row_dim(dim)


@pytest.mark.parametrize(
    ("layout", "dims", "roles"),
    [
        (MAP, (0, 2, 3, 1), "bhwc"),
        (Layout("bhwc", (4, 6)), (0, 3, 1, 2), "bchw"),
        (Layout("bscc", (4, 6)), (0, 2, 1, 3), "bcsc"),
        (TOKENS, (0, 2, 1), "bcs"),
        (HEADS, (0, 1, 3, 2), "bccs"),
        (MAP, (1, 0, 2, 3), "cbhw"),
    ],
)
def test_permuted(layout: Layout, dims: tuple[int, ...], roles: str) -> None:
    assert layout.permuted(dims) == Layout(roles, layout.size)


@pytest.mark.parametrize("dims", [(0, 1, 3, 2), (3, 0, 1, 2), (0, 3, 1, 2)])
def test_width_before_height_is_refused(dims: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is not a layout"):
        MAP.permuted(dims)


@pytest.mark.parametrize(
    ("layout", "old", "new", "roles"),
    [
        (Layout("bhwc", (4, 6)), (2, 4, 6, 8), (2, 24, 8), "bsc"),
        (TOKENS, (2, 24, 8), (2, 4, 6, 8), "bhwc"),
        (TOKENS, (2, 24, 8), (2, 24, 2, 4), "bscc"),
        (Layout("bscc", (4, 6)), (2, 24, 2, 4), (2, 24, 8), "bsc"),
        (MAP, (2, 8, 4, 6), (2, 8, 24), "bcs"),
        (Layout("bcs", (4, 6)), (2, 8, 24), (2, 8, 4, 6), "bchw"),
        (MAP, (2, 8, 4, 6), (2, 2, 4, 4, 6), "bcchw"),
        (MAP, (2, 8, 4, 6), (2, 8, 4, 6), "bchw"),
        (TOKENS, (1, 24, 8), (1, 24, 8), "bsc"),
        (TOKENS, (2, 24, 8), (2, 24, 1, 8), "bscc"),
        (Layout("bhw", (4, 6)), (2, 4, 6), (2, 24), "bs"),
    ],
)
def test_views_that_regroup_space_or_channels(
    layout: Layout, old: tuple[int, ...], new: tuple[int, ...], roles: str
) -> None:
    assert layout.viewed(old, new) == Layout(roles, layout.size)


@pytest.mark.parametrize(
    ("layout", "old", "new", "reason"),
    [
        (TOKENS, (2, 24, 8), (2, 192), "mixes 's' with its neighbours"),
        (TOKENS, (2, 24, 8), (48, 8), "mixes 'b' with its neighbours"),
        (HEADS, (2, 8, 24, 5), (16, 24, 5), "mixes 'b' with its neighbours"),
        (HEADS, (2, 8, 24, 5), (2, 8, 120), "mixes 's' with its neighbours"),
        (MAP, (2, 8, 4, 6), (2, 32, 6), "mixes 'c' with its neighbours"),
        (TOKENS, (2, 24, 8), (2, 6, 4, 8), r"splits space into \(6, 4\)"),
        (TOKENS, (2, 24, 8), (2, 2, 12, 8), r"splits space into \(2, 12\)"),
        (MAP, (2, 8, 4, 6), (2, 8, 6, 4), r"splits space into \(6, 4\)"),
        (MAP, (2, 8, 4, 6), (2, 8, 4, 2, 3), r"splits space into \(4, 2, 3\)"),
        (TOKENS, (4, 24, 8), (2, 2, 24, 8), "splits the batch"),
        (TOKENS, (2, 24, 8), (2, 24, 8, 1), r"leaves \(1,\) without a role"),
    ],
)
def test_views_that_mix_are_refused_with_both_shapes(
    layout: Layout, old: tuple[int, ...], new: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        layout.viewed(old, new)
    assert str(old) in str(refusal.value)
    assert str(new) in str(refusal.value)


@given(st.permutations(range(4)), st.sampled_from(["bchw", "bhwc", "bcsc", "bscc", "bcsc"]))
def test_any_permutation_leaves_the_rows_as_they_are(dims: list[int], roles: str) -> None:
    """Rows are what ``permute(order)`` gives; permuting the value first may only reorder its channel dimensions."""
    layout = Layout(roles, (2, 3))
    shape = [{"b": 2, "c": 4 + i, "h": 2, "w": 3, "s": 6}[role] for i, role in enumerate(roles)]
    value = torch.arange(math.prod(shape)).view(shape)

    def rows(x: torch.Tensor, of: Layout) -> torch.Tensor:
        return x.permute(of.order).flatten(0, of.pixel_dims - 1)

    try:
        permuted = layout.permuted(dims)
    except ValueError:
        assert "wh" in "".join(roles[dim] for dim in dims if roles[dim] in "hw")
        return
    before, after = rows(value, layout), rows(value.permute(dims), permuted)
    assert before.shape[0] == after.shape[0] == 12
    assert torch.equal(before.flatten(1).sort().values, after.flatten(1).sort().values)


def factorisations(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    if factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in factorisations(number // first, factors - 1))


@pytest.mark.parametrize(
    ("roles", "old"), [("bsc", (2, 6, 4)), ("bhwc", (2, 2, 3, 4)), ("bscc", (2, 6, 2, 2)), ("bchw", (2, 4, 2, 3))]
)
def test_every_accepted_view_regroups_each_row_alone(roles: str, old: tuple[int, ...]) -> None:
    """All shapes of one to five dimensions: each is refused, or every row keeps its values in their order."""
    layout, value, accepted = Layout(roles, (2, 3)), torch.arange(math.prod(old)).view(old), []
    rows = value.permute(layout.order).flatten(0, layout.pixel_dims - 1).flatten(1)
    for rank in range(1, 6):
        for new in factorisations(math.prod(old), rank):
            try:
                viewed = layout.viewed(old, new)
            except ValueError:
                continue
            accepted.append(viewed.roles)
            again = value.view(new).permute(viewed.order).flatten(0, viewed.pixel_dims - 1)
            assert torch.equal(again.flatten(1), rows), new
    merged = roles.replace("hw", "s").replace("cc", "c")
    assert {merged, merged.replace("s", "hw"), merged.replace("c", "cc")} <= set(accepted)
