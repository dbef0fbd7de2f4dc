"""The convolution kernel in Triton's interpreter, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from interpreter import INTERPRETED_DTYPES, MARKS
from poison import poisoned
from random_rows import normal

from fisedit_compile.kernels.conv2d_rows import conv2d_rows_reference
from fisedit_compile.kernels.conv2d_rows_tiles import Tile
from fisedit_compile.testing import assert_close

conv = pytest.importorskip("fisedit_compile.kernels.conv2d_rows_triton", reason="Triton is not installed")
pytestmark = MARKS

WHOLE, SPLIT = Tile(32, 16, 16, 4, 2), Tile(16, 32, 16, 4, 2, splits=3)


def check(
    dtype: torch.dtype,
    tile: Tile | None,
    *,
    count: int,
    rows: int,
    halo: int | None,
    channels: int,
    filters: int,
    taps: int = 9,
    bias: bool = True,
) -> None:
    x, halo_rows = (None if n is None else normal(n, channels, dtype=dtype, seed=n) for n in (rows, halo))
    weight = normal(filters, taps * channels, dtype=dtype, seed=2)
    shift = normal(filters, dtype=dtype, seed=3) if bias else None
    generator = torch.Generator().manual_seed(count)
    table = torch.randint(-1, rows + (halo or 0), (count, taps), generator=generator).int()
    assert x is not None
    with poisoned():
        out = conv.conv2d_rows_triton(x, halo_rows, weight, shift, table, tile)
    wide = (None if t is None else t.double() for t in (x, halo_rows, weight, shift))
    assert out.dtype == dtype
    assert_close(out, conv2d_rows_reference(*wide, table))


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("tile", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("channels", [16, 21])
@pytest.mark.parametrize("halo", [None, 0, 9])
def test_equals_the_reference(dtype: torch.dtype, tile: Tile, channels: int, halo: int | None) -> None:
    check(dtype, tile, count=37, rows=29, halo=halo, channels=channels, filters=20)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "filters"), [(4, 40), (48, 4)])
def test_the_channels_of_latents_with_the_tile_of_the_heuristic(
    dtype: torch.dtype, channels: int, filters: int
) -> None:
    check(dtype, None, count=70, rows=61, halo=9, channels=channels, filters=filters)


@pytest.mark.parametrize("tile", [WHOLE, SPLIT], ids=["whole", "split"])
def test_one_row_one_tap_and_no_bias(tile: Tile) -> None:
    check(torch.float32, tile, count=1, rows=1, halo=None, channels=48, filters=5, bias=False)
    check(torch.float32, tile, count=5, rows=7, halo=None, channels=48, filters=5, taps=1)


def test_more_tiles_of_rows_than_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "_GROUP", 2)
    check(torch.float32, Tile(16, 16, 16, 4, 2), count=70, rows=30, halo=3, channels=8, filters=40, taps=2)


@pytest.mark.parametrize("splits", [1, 3])
def test_no_active_rows(splits: int) -> None:
    tile = Tile(16, 16, 16, 4, 2, splits=splits)
    check(torch.float32, tile, count=6, rows=0, halo=4, channels=8, filters=8)  # the halo alone
    check(torch.float32, tile, count=0, rows=5, halo=4, channels=8, filters=8)  # nothing to compute
    rows, bias = torch.empty(0, 8), torch.arange(8.0)
    table = torch.full((3, 9), -1, dtype=torch.int32)  # nothing inside the picture
    out = conv.conv2d_rows_triton(rows, None, torch.ones(8, 72), bias, table, tile)
    assert torch.equal(out, bias.expand(3, 8))


def test_strided_inputs() -> None:
    rows, weight = normal(9, 32, dtype=torch.float32, seed=0)[:, ::2], normal(72, 8, dtype=torch.float32, seed=1)
    table = torch.randint(-1, 9, (9, 8)).int()[:, :4]
    out = conv.conv2d_rows_triton(rows, None, weight[:64].t(), None, table)
    assert_close(out, conv2d_rows_reference(rows, None, weight[:64].t(), None, table).double())


def test_refuses_what_does_not_fit() -> None:
    rows, weight, table = torch.zeros(2, 8), torch.zeros(4, 72), torch.zeros(2, 9, dtype=torch.int32)
    with pytest.raises(ValueError, match="float16, float32"):
        conv.conv2d_rows_triton(rows.half(), None, weight, None, table)
    with pytest.raises(ValueError, match=r"give \[Cout, 72\]"):
        conv.conv2d_rows_triton(rows, None, weight[:, :9], None, table)
