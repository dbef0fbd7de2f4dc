"""gather_rows and scatter_rows against plain indexing: exact, for every layout of the U-Net."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support.random_rows import DTYPES, masks, normal, pixel_ids

import fisedit_compile.kernels.ops  # noqa: F401  (registers torch.ops.fisedit)

CHANNELS, HEADS = 3, 2


def dense(layout: str, mask: torch.Tensor, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, list[int], int]:
    """A random dense tensor of ``layout`` for ``mask`` [B, H, W], its order and its number of pixel dimensions."""
    batch, height, width = mask.shape
    if layout in ("nchw", "channels_last", "sliced"):
        x = normal(batch, 2 * CHANNELS, height, width, dtype=dtype, seed=seed)
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        return (x[:, ::2] if layout == "sliced" else x), [0, 2, 3, 1], 3
    if layout == "tokens":
        return normal(batch, height * width, CHANNELS, dtype=dtype, seed=seed), [0, 1, 2], 2
    return normal(batch, HEADS, height * width, CHANNELS, dtype=dtype, seed=seed), [0, 2, 1, 3], 2


LAYOUTS = st.sampled_from(["nchw", "channels_last", "sliced", "tokens", "heads"])


def pixel_major(x: torch.Tensor, layout: str) -> torch.Tensor:
    """[P, *C] by moving the channel dimension(s) last, written apart from ``order``."""
    if layout == "tokens":
        return x.reshape(-1, x.shape[-1])
    return (
        x.movedim(1, -1).reshape(-1, x.shape[1]) if x.ndim == 4 and layout != "heads" else x.movedim(1, 2).flatten(0, 1)
    )


@hypothesis.given(masks(), LAYOUTS, st.sampled_from(DTYPES), st.integers(0, 99))
def test_gather_takes_the_active_pixels(mask: torch.Tensor, layout: str, dtype: torch.dtype, seed: int) -> None:
    x, order, pixel_dims = dense(layout, mask, dtype, seed)
    rows = torch.ops.fisedit.gather_rows(x, pixel_ids(mask), order, pixel_dims)
    assert rows.is_contiguous()
    assert torch.equal(rows, pixel_major(x, layout)[mask.flatten()])


@hypothesis.given(masks(), LAYOUTS, st.sampled_from(DTYPES), st.integers(0, 99))
def test_scatter_replaces_the_active_pixels_only(
    mask: torch.Tensor, layout: str, dtype: torch.dtype, seed: int
) -> None:
    x, order, pixel_dims = dense(layout, mask, dtype, seed)
    base = pixel_major(x, layout).contiguous()
    kept = base.clone()
    rows = normal(int(mask.sum()), *base.shape[1:], dtype=dtype, seed=seed + 1)
    out = torch.ops.fisedit.scatter_rows(rows, base, pixel_ids(mask), x.shape, order, pixel_dims)
    assert out.shape == x.shape
    assert out.permute(order).is_contiguous()
    active = mask.flatten()
    assert torch.equal(pixel_major(out, layout)[active], rows)
    assert torch.equal(pixel_major(out, layout)[~active], kept[~active])
    out.zero_()
    assert torch.equal(base, kept), "the base was written, or the result is a view of it"


@hypothesis.given(masks(), LAYOUTS, st.integers(0, 99))
def test_gather_undoes_scatter(mask: torch.Tensor, layout: str, seed: int) -> None:
    x, order, pixel_dims = dense(layout, mask, torch.float32, seed)
    index, base = pixel_ids(mask), pixel_major(x, layout).contiguous()
    rows = normal(len(index), *base.shape[1:], dtype=torch.float32, seed=seed + 1)
    out = torch.ops.fisedit.scatter_rows(rows, base, index, x.shape, order, pixel_dims)
    assert torch.equal(torch.ops.fisedit.gather_rows(out, index, order, pixel_dims), rows)


def test_an_id_outside_the_map_is_an_error() -> None:
    x, index = torch.randn(1, 3, 2, 2), torch.tensor([4])
    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        with pytest.raises((IndexError, RuntimeError)):
            torch.ops.fisedit.gather_rows(layout, index, [0, 2, 3, 1], 3)
    with pytest.raises((IndexError, RuntimeError)):
        torch.ops.fisedit.scatter_rows(torch.randn(1, 3), torch.randn(4, 3), index, x.shape, [0, 2, 3, 1], 3)


def test_rows_of_another_dtype_than_the_base_are_an_error() -> None:
    rows, base, index = torch.randn(1, 3), torch.randn(4, 3).double(), torch.tensor([1])
    with pytest.raises(RuntimeError, match="type"):
        torch.ops.fisedit.scatter_rows(rows, base, index, [1, 3, 2, 2], [0, 2, 3, 1], 3)
