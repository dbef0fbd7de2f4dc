"""Products of rows for the tests in Triton's interpreter: their arguments, their epilogues, and how they are held."""

from __future__ import annotations

from typing import Any

import torch
from support.poison import poisoned
from support.random_rows import normal

from fisedit_compile.kernels.implicit_gemm.row_product_tiles import Library, Tile
from fisedit_compile.kernels.launch.semaphores import semaphores
from fisedit_compile.testing import assert_close

Arguments = dict[str, Any]

EPILOGUES: dict[str, set[str]] = {
    "none": set(),
    "time": {"sample_bias"},
    "residual": {"residual"},
    "norm": {"scale", "shift"},
    "all": {"sample_bias", "residual", "scale", "shift", "silu"},
    "silu": {"silu"},
    "geglu": {"geglu"},
}


def epilogue(parts: set[str], count: int, width: int, dtype: torch.dtype) -> Arguments:
    """The arguments of an epilogue for ``count`` rows of three samples."""
    given: Arguments = {}
    if parts & {"sample_bias", "scale"}:
        given["sample"] = torch.arange(count) * 3 // max(count, 1)
    if "sample_bias" in parts:
        given["sample_bias"] = normal(3, width, dtype=dtype, seed=11)
    if "residual" in parts:
        given["residual"] = normal(count, width, dtype=dtype, seed=12)
    if "scale" in parts:
        given["scale"], given["shift"] = (normal(3, width, dtype=torch.float32, seed=seed) for seed in (13, 14))
    for activation in parts & {"silu", "geglu"}:
        given["activation"] = activation
    return given


def conv_arguments(
    dtype: torch.dtype,
    count: int,
    rows: int,
    halo: int | None,
    channels: int,
    filters: int,
    taps: int = 9,
    shortcut_channels: int = 0,
) -> Arguments:
    """Of a convolution of ``rows`` rows at ``count``; ``shortcut_channels``: of its shortcut, 0 for none."""
    x, halo_rows = (None if n is None else normal(n, channels, dtype=dtype, seed=n) for n in (rows, halo))
    depth = taps * channels + shortcut_channels
    weight, shortcut_weight = (normal(filters, depth, dtype=dtype, seed=2) / depth**0.5).tensor_split(
        [taps * channels], 1
    )
    table = torch.randint(-1, rows + (halo or 0), (count, taps), generator=torch.Generator().manual_seed(count)).int()
    given: Arguments = {}
    if shortcut_channels:
        given = {"shortcut": normal(count, shortcut_channels, dtype=dtype, seed=4), "shortcut_weight": shortcut_weight}
    return given | {
        "rows": x,
        "halo": halo_rows,
        "weight": weight,
        "bias": normal(filters, dtype=dtype, seed=3),
        "table": table,
    }


def linear_arguments(dtype: torch.dtype, count: int, channels: int, filters: int) -> Arguments:
    """Of a linear layer of ``count`` rows."""
    weight = normal(filters, channels, dtype=dtype, seed=2) / channels**0.5
    bias = normal(filters, dtype=dtype, seed=3)
    return {"rows": normal(count, channels, dtype=dtype, seed=1), "weight": weight, "bias": bias}


def wide(arguments: Arguments) -> Arguments:
    """The same in fp64."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def check(
    launch: Any, reference: Any, arguments: Arguments, tile: Tile | Library | None, real: int | None = None
) -> None:
    """Right within the tolerance, twice the same bits, and the counters zero again; ``real`` rows are compared.

    A tile without splits runs once: the interpreter runs its programs one after another, and nothing but the counters,
    which it has none of, is left of a launch for the next one.
    """
    with poisoned():
        first = again = launch(**arguments, tile=tile)
        if not isinstance(tile, Tile) or tile.splits > 1:
            again = launch(**arguments, tile=tile)
    wanted = reference(**wide(arguments))
    for out, same, right in zip(*(t if isinstance(t, tuple) else (t,) for t in (first, again, wanted)), strict=True):
        assert out.dtype == arguments["rows"].dtype
        assert torch.equal(out[:real], same[:real])
        assert_close(out[:real], right[:real])
    assert not semaphores(torch.device("cpu"), 1).any()
