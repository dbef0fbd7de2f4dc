"""Layer norm, the joined group norm and the scatter in Triton's interpreter, against the references."""

from __future__ import annotations

import pytest
import torch
from support.interpreter import INTERPRETED_DTYPES, MARKS
from support.poison import poisoned
from support.random_rows import normal

from fisedit_compile.kernels.indexing.gather_scatter import scatter_rows_reference
from fisedit_compile.kernels.norms.cat_norm_rows import cat_norm_rows_reference
from fisedit_compile.kernels.norms.layer_norm_rows import layer_norm_rows_reference
from fisedit_compile.testing import assert_close

cat_norm = pytest.importorskip("fisedit_compile.kernels.norms.cat_norm_rows_triton", reason="Triton is not installed")
layer_norm = pytest.importorskip(
    "fisedit_compile.kernels.norms.layer_norm_rows_triton", reason="Triton is not installed"
)
scatter = pytest.importorskip("fisedit_compile.kernels.indexing.scatter_rows_triton", reason="Triton is not installed")
pytestmark = MARKS

dtypes = pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize(("rows", "channels"), [(1, 8), (37, 40), (9, 320), (0, 16)])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_equals_the_reference(dtype: torch.dtype, rows: int, channels: int, affine: bool) -> None:
    x = normal(rows, channels, dtype=dtype, seed=1) * 3 + 5
    weight, bias = (normal(channels, dtype=dtype, seed=seed) if affine else None for seed in (2, 3))
    with poisoned():
        out = layer_norm.layer_norm_rows_triton(x, weight, bias, 1e-5)
    wide = (None if t is None else t.double() for t in (weight, bias))
    assert_close(out, layer_norm_rows_reference(x.double(), *wide, 1e-5), dtype)


@pytest.mark.parametrize("count", [0, 1, 20, 37, 50])
def test_layer_norm_leaves_padding(count: int) -> None:
    x = normal(37, 24, dtype=torch.float32, seed=1)
    x[count:] = torch.nan
    with poisoned():
        out = layer_norm.layer_norm_rows_triton(x, None, None, 1e-5, torch.tensor([count], dtype=torch.int32))
    assert_close(out[:count], layer_norm_rows_reference(x[:count].double(), None, None, 1e-5), torch.float32)


@dtypes
@pytest.mark.parametrize("widths", [(64, 32), (40, 24), (5, 3)])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("count", [None, 0, 1, 30, 41])
def test_joined_rows_and_their_norm(dtype: torch.dtype, widths: tuple[int, int], silu: bool, count: int | None) -> None:
    left, right = (normal(41, width, dtype=dtype, seed=width) for width in widths)
    scale, shift = (normal(3, sum(widths), dtype=torch.float32, seed=seed) for seed in (1, 2))
    sample = torch.arange(41) * 3 // 41
    real = 41 if count is None else count
    left[real:], right[real:] = torch.nan, torch.nan
    given = None if count is None else torch.tensor([count], dtype=torch.int32)
    with poisoned():
        joined, normed = cat_norm.cat_norm_rows_triton(left, right, sample, scale, shift, silu, given)
    wanted = cat_norm_rows_reference(*(t[:real] for t in (left.double(), right.double(), sample)), scale, shift, silu)
    assert torch.equal(joined[:real].double(), wanted[0])
    assert_close(normed[:real], wanted[1], dtype)


@dtypes
@pytest.mark.parametrize("channels", [4, 40, 300])
@pytest.mark.parametrize("count", [None, 0, 1, 30, 41])
def test_scatter_equals_the_reference(dtype: torch.dtype, channels: int, count: int | None) -> None:
    shape, order = [2, channels, 6, 7], [0, 2, 3, 1]
    rows, base = (normal(n, channels, dtype=dtype, seed=n) for n in (41, 84))
    real, before = 41 if count is None else count, base.clone()
    index = torch.randperm(84, generator=torch.Generator().manual_seed(1))[:41].sort().values
    rows[real:], index[real:] = torch.nan, 0
    given = None if count is None else torch.tensor([count], dtype=torch.int32)
    for x in (rows, rows.repeat_interleave(2, 1)[:, ::2]):  # contiguous and strided
        with poisoned():
            out = scatter.scatter_rows_triton(x, base, index, shape, order, 3, given)
        wanted = scatter_rows_reference(rows, base, index, shape, order, 3, given)
        assert torch.equal(out, wanted)
        assert out.stride() == wanted.stride()
    assert torch.equal(base, before)


def test_scatter_of_no_rows_and_of_heads() -> None:
    base, nowhere = normal(30, 3, 8, dtype=torch.float32, seed=1), torch.empty(0, dtype=torch.int64)
    shape, order = [2, 3, 15, 8], [0, 2, 1, 3]
    for rows, index in ((base[:0], nowhere), (base[:4] + 1, torch.tensor([2, 9, 16, 29]))):
        with poisoned():
            out = scatter.scatter_rows_triton(rows, base, index, shape, order, 2)
        assert torch.equal(out, scatter_rows_reference(rows, base, index, shape, order, 2))


def test_refuses_what_does_not_fit() -> None:
    rows, scale = torch.zeros(4, 8), torch.zeros(2, 12)
    with pytest.raises(RuntimeError, match="give one dtype"):
        scatter.scatter_rows_triton(rows, rows.half(), torch.arange(4), [1, 8, 2, 2], [0, 2, 3, 1], 3)
    with pytest.raises(ValueError, match=r"give as many rows of both, and scale and shift \[B, 16\]"):
        cat_norm.cat_norm_rows_triton(rows, rows, torch.zeros(4, dtype=torch.int64), scale, scale)
    with pytest.raises(ValueError, match="float16"):
        layer_norm.layer_norm_rows_triton(rows.double(), None, None, 1e-5)
