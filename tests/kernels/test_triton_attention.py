"""The attention kernel in Triton's interpreter, ragged and over a base map, against the references in fp64."""

from __future__ import annotations

import pytest
import torch
from support.interpreter import INTERPRETED_DTYPES, MARKS
from support.poison import poisoned
from support.random_rows import normal

from fisedit_compile.kernels.attention.attention_rows import attention_cached_reference, attention_rows_reference
from fisedit_compile.kernels.attention.attention_tiles import AttentionTile
from fisedit_compile.planning.edit_plan import row_of_pixels
from fisedit_compile.testing import assert_close

rows_kernel = pytest.importorskip(
    "fisedit_compile.kernels.attention.attention_rows_triton", reason="Triton is not installed"
)
cached_kernel = pytest.importorskip(
    "fisedit_compile.kernels.attention.attention_cached_triton", reason="Triton is not installed"
)
launcher = pytest.importorskip("fisedit_compile.kernels.attention.attention_launch", reason="Triton is not installed")
pytestmark = MARKS

WHOLE, SPLIT = (AttentionTile(16, 16, 4, 2, splits) for splits in (1, 3))
HEADS = 2


@pytest.fixture(params=[0, 1024], ids=["blocks without a mask in their own loop", "one loop"])
def many_keys(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_UNMASKED_LOOP_FROM_KEYS", request.param)


def rows(count: int, head_dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return normal(count, HEADS, head_dim, dtype=dtype, seed=seed)


def offsets(*counts: int) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


@pytest.mark.usefixtures("many_keys")
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("tile", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("head_dim", [16, 40])
def test_ragged_equals_the_reference(dtype: torch.dtype, tile: AttentionTile, head_dim: int) -> None:
    q_offsets, k_offsets = offsets(19, 0, 5, 2), offsets(5, 3, 34, 1)  # the second sample has no queries
    q, k, v = (rows(count, head_dim, dtype, seed) for seed, count in enumerate((26, 43, 43)))
    with poisoned():
        out = rows_kernel.attention_rows_triton(q, k, v, q_offsets, k_offsets, 0.3, tile)
    expected = attention_rows_reference(q.double(), k.double(), v.double(), q_offsets, k_offsets, 0.3)
    assert out.dtype == dtype
    assert_close(out, expected)


@pytest.mark.parametrize("tile", [WHOLE, SPLIT], ids=["whole", "split"])
def test_queries_of_a_sample_without_keys_give_zeros(tile: AttentionTile) -> None:
    q, k = rows(5, 16, torch.float32, 0), rows(4, 16, torch.float32, 1)
    out = rows_kernel.attention_rows_triton(q, k, k, offsets(2, 3), offsets(0, 4), None, tile)
    assert torch.equal(out[:2], torch.zeros(2, HEADS, 16))
    assert_close(out[2:], attention_rows_reference(q[2:], k, k, offsets(3), offsets(4), None).double())


@pytest.mark.usefixtures("many_keys")
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("tile", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("head_dim", "pixels"), [(16, 32), (40, 35)])
def test_cached_equals_the_reference(
    dtype: torch.dtype, tile: AttentionTile, head_dim: int, pixels: int, merged: bool
) -> None:
    counts = (19, 0, 3)
    index = torch.cat([b * pixels + torch.randperm(pixels)[:n].sort().values for b, n in enumerate(counts)])
    q, k, v = (rows(sum(counts), head_dim, dtype, seed) for seed in range(3))
    base_k, base_v = (rows(3 * pixels, head_dim, dtype, seed) for seed in (3, 4))
    before = base_k.clone(), base_v.clone()
    arguments = (row_of_pixels(index, 3 * pixels), offsets(*counts), None)
    with poisoned():
        out = cached_kernel.attention_cached_triton(q, k, v, base_k, base_v, *arguments, tile, merged)
    assert torch.equal(base_k, before[0])
    assert torch.equal(base_v, before[1])
    assert_close(out, attention_cached_reference(*(t.double() for t in (q, k, v, base_k, base_v)), *arguments))


@pytest.mark.parametrize("tile", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (6, 19)])
def test_padding_behind_the_last_offset_is_never_read(
    tile: AttentionTile, counts: tuple[int, int], merged: bool
) -> None:
    real, pixels, samples = sum(counts), 35, offsets(*counts)
    index = torch.cat([b * pixels + torch.randperm(pixels)[:n].sort().values for b, n in enumerate(counts)])
    q, k, v = (rows(30, 16, torch.float32, seed) for seed in range(3))
    for padded in (q, k, v):
        padded[real:] = torch.nan
    base_k, base_v = (rows(2 * pixels, 16, torch.float32, seed) for seed in (3, 4))
    row_of = row_of_pixels(index, 2 * pixels)
    with poisoned():
        out = rows_kernel.attention_rows_triton(q, k, v, samples, samples, None, tile)
        cached = cached_kernel.attention_cached_triton(q, k, v, base_k, base_v, row_of, samples, None, tile, merged)
    q, k, v = (t[:real].double() for t in (q, k, v))
    assert_close(out[:real], attention_rows_reference(q, k, v, samples, samples, None), torch.float32)
    expected = attention_cached_reference(q, k, v, base_k.double(), base_v.double(), row_of, samples, None)
    assert_close(cached[:real], expected, torch.float32)


def test_parts_of_merged_projections_are_read_where_they_are() -> None:
    merged = rows(12, 3 * 16, torch.float32, 0).view(12, 3, HEADS, 16)
    q, k, v = merged.unbind(1)
    assert launcher.head_last(q) is q
    out = rows_kernel.attention_rows_triton(q, k, v, offsets(5, 7), offsets(5, 7), None)
    assert_close(out, attention_rows_reference(q, k, v, offsets(5, 7), offsets(5, 7), None).double())


def test_no_queries() -> None:
    empty, base = rows(0, 16, torch.float32, 0), rows(8, 16, torch.float32, 1)
    nowhere = torch.full((8,), -1, dtype=torch.int32)
    out = cached_kernel.attention_cached_triton(empty, empty, empty, base, base, nowhere, offsets(0, 0), None)
    assert out.shape == (0, HEADS, 16)
    assert rows_kernel.attention_rows_triton(empty, base, base, offsets(0), offsets(8), None).shape == (0, HEADS, 16)
