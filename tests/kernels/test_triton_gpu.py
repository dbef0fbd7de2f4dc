"""The Triton kernels at the shapes of Stable Diffusion 2 at 768x768, on a GPU, against the references in fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.poison import poisoned

import fisedit_compile.kernels.ops  # noqa: F401  (registers torch.ops.fisedit)
from fisedit_compile.ir.taps import Taps
from fisedit_compile.kernels.attention.attention_rows import attention_cached_reference, attention_rows_reference
from fisedit_compile.kernels.attention.controlled_rows import controlled_rows_reference
from fisedit_compile.kernels.implicit_gemm.conv2d_rows import conv2d_rows_and_norm_reference, conv2d_rows_reference
from fisedit_compile.kernels.implicit_gemm.linear_rows import linear_rows_and_norm_reference, linear_rows_reference
from fisedit_compile.kernels.implicit_gemm.row_product_tiles import Tile
from fisedit_compile.kernels.indexing.copy_rows import RowCopies
from fisedit_compile.kernels.indexing.packed_rows import pack_rows_reference, unpack_rows_reference
from fisedit_compile.kernels.indexing.row_format import RowFormat
from fisedit_compile.kernels.norms.cat_norm_rows import cat_norm_rows_reference
from fisedit_compile.kernels.norms.group_norm_rows import (
    group_norm_rows_reference,
    group_norm_statistics_reference,
    group_norm_whole_reference,
)
from fisedit_compile.kernels.norms.layer_norm_rows import layer_norm_rows_reference
from fisedit_compile.masks.sample_masks import square_mask
from fisedit_compile.planning.edit_plan import row_of_pixels
from fisedit_compile.planning.neighbour_table import neighbour_table
from fisedit_compile.testing import assert_close

conv = pytest.importorskip("fisedit_compile.kernels.implicit_gemm.conv2d_rows_triton", reason="Triton is not installed")
linear = pytest.importorskip(
    "fisedit_compile.kernels.implicit_gemm.linear_rows_triton", reason="Triton is not installed"
)
pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHARES = (0.05, 0.15, 0.30, 1.0)
BATCH = 2
Op = Callable[..., torch.Tensor]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def active(share: float, side: int) -> torch.Tensor:
    """Bool [BATCH, side, side]: a square, in the second sample with some pixels of its own."""
    mask = square_mask(share, (side, side)).expand(BATCH, -1, -1).clone().cuda()
    mask[1] |= torch.rand(side, side, device="cuda") < 0.01
    return mask


def offsets_of(mask: torch.Tensor) -> torch.Tensor:
    counts = mask.flatten(1).sum(1).cumsum(0)
    return torch.cat([counts.new_zeros(1), counts]).int()


def check(op: Op, reference: Op, *arguments: Any) -> None:
    """Every element written, right within the dtype's tolerance, and the same bits in a second run."""
    with poisoned():
        out, again = op(*arguments), op(*arguments)
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    results = [(each,) if isinstance(each, torch.Tensor) else each for each in (out, again, reference(*wide))]
    for first, second, wanted in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert_close(first, wanted)


def conv_inputs(
    share: float, side: int, channels: int, filters: int, dtype: torch.dtype, stride: int = 1
) -> tuple[torch.Tensor, ...]:
    mask, target = active(share, side), side // stride
    taps = Taps((side, side), (target, target), (3, 3), (stride, stride), (1, 1), (1, 1))
    targets = torch.nn.functional.adaptive_max_pool2d(mask.float(), target).flatten().nonzero().flatten()
    table, halo = neighbour_table(taps, targets, mask.flatten().nonzero().flatten(), BATCH)
    assert halo is not None
    weight = normal(filters, 9 * channels, dtype=dtype) / (9 * channels) ** 0.5
    rows = normal(int(mask.sum()), channels, dtype=dtype)
    return rows, normal(len(halo), channels, dtype=dtype), weight, normal(filters, dtype=dtype), table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    ("side", "channels", "filters"),
    [(96, 320, 320), (96, 960, 320), (96, 4, 320), (96, 320, 4), (48, 640, 640), (24, 1280, 1280)],
)
def test_convolution(dtype: torch.dtype, share: float, side: int, channels: int, filters: int) -> None:
    arguments = conv_inputs(share, side, channels, filters, dtype)
    check(torch.ops.fisedit.conv2d_rows, conv2d_rows_reference, *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution_of_stride_2_and_without_halo_or_bias(dtype: torch.dtype) -> None:
    rows, halo, weight, bias, table = conv_inputs(0.15, 96, 320, 320, dtype, stride=2)
    check(torch.ops.fisedit.conv2d_rows, conv2d_rows_reference, rows, halo, weight, bias, table)
    own = torch.where(table < len(rows), table, -1)
    check(torch.ops.fisedit.conv2d_rows, conv2d_rows_reference, rows, None, weight, None, own)
    for count in (0, 1):
        check(torch.ops.fisedit.conv2d_rows, conv2d_rows_reference, rows, halo, weight, bias, table[:count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    ("side", "channels", "shortcut_channels"),
    [(96, 320, 960), (96, 320, 640), (48, 640, 320), (48, 640, 1920), (24, 1280, 640), (24, 1280, 2560)],
)
def test_a_convolution_with_a_shortcut(
    dtype: torch.dtype, share: float, side: int, channels: int, shortcut_channels: int
) -> None:
    rows, halo, weight, bias, table = conv_inputs(share, side, channels, channels, dtype)
    shortcut = normal(len(table), shortcut_channels, dtype=dtype)
    side = (shortcut, normal(channels, shortcut_channels, dtype=dtype) / shortcut_channels**0.5)
    none = (None, None, None, None, None, None, "none")
    check(torch.ops.fisedit.conv2d_rows, conv2d_rows_reference, rows, halo, weight, bias, table, *none, *side)
    owner = (torch.arange(len(table), device="cuda") * 2 >= len(table)).long()
    norm = (None, owner, None, None, normal(BATCH, channels), normal(BATCH, channels), "silu")
    product = (rows, halo, weight, bias, table)
    check(torch.ops.fisedit.conv2d_rows_and_norm, conv2d_rows_and_norm_reference, *product, *norm, *side)


TILES = (
    Tile(16, 64, 128, 4, 5, across=True),
    Tile(64, 128, 64, 4, 4, splits=4, across=True),
    Tile(48, 128, 64, 4, 4),
    Tile(80, 128, 64, 4, 4, splits=2, across=True),
    Tile(144, 128, 64, 4, 3, splits=4, second_kernel=True, across=True),
    Tile(288, 128, 64, 8, 3, splits=4, second_kernel=True, across=True),
    Tile(288, 128, 64, 8, 3, across=True),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles_of_two_parts_and_across(dtype: torch.dtype, tile: Tile) -> None:
    rows, halo, weight, bias, table = conv_inputs(0.05, 48, 640, 640, dtype)
    shortcut, residual = normal(len(table), 328, dtype=dtype), normal(len(table), 640, dtype=dtype)
    shortcut_weight = normal(640, 328, dtype=dtype) / 328**0.5
    owner = (torch.arange(len(table), device="cuda") * 2 >= len(table)).long()
    epilogue = (owner, normal(BATCH, 640, dtype=dtype), residual, normal(BATCH, 640), normal(BATCH, 640), "silu")
    raw_too, one = (partial(op, tile=tile) for op in (conv.conv2d_rows_and_norm_triton, conv.conv2d_rows_triton))
    product = (rows, halo, weight, bias, table)
    check(raw_too, conv2d_rows_and_norm_reference, *product, None, *epilogue, shortcut, shortcut_weight)
    check(one, conv2d_rows_reference, *product)
    layer = partial(linear.linear_rows_triton, tile=tile)
    square = normal(640, 640, dtype=dtype) / 640**0.5
    check(layer, linear_rows_reference, residual, square, bias, None, None, None, residual)
    if not tile.more_rows:
        geglu = (normal(2560, 640, dtype=dtype) / 640**0.5, None, None, None, None, None, None, None, "geglu")
        check(layer, linear_rows_reference, residual, *geglu)


@pytest.mark.parametrize(("allowed", "least", "most"), [(False, 0.0, 5e-6), (True, 5e-6, 2e-3)])
def test_tf32_only_where_torch_allows_it(allowed: bool, least: float, most: float) -> None:
    rows, halo, weight, bias, table = conv_inputs(0.05, 96, 320, 320, torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        out = torch.ops.fisedit.conv2d_rows(rows, halo, weight, bias, table)
    finally:
        torch.set_float32_matmul_precision(before)
    expected = conv2d_rows_reference(*(t.double() for t in (rows, halo, weight, bias)), table)
    assert least < (out - expected).norm() / expected.norm() < most


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "channels"), [(96, 320), (96, 960), (48, 640), (24, 2560)])
def test_group_norm(dtype: torch.dtype, side: int, channels: int) -> None:
    sample = active(0.15, side).nonzero()[:, 0]
    rows = normal(len(sample), channels, dtype=dtype) * 2 + 3
    scale, shift = normal(BATCH, channels), normal(BATCH, channels)
    ops = torch.ops.fisedit
    for silu in (False, True):
        check(ops.group_norm_rows, group_norm_rows_reference, rows, sample, scale, shift, silu)
    left, right = rows[:, :128], rows[:, 128:]
    check(ops.cat_norm_rows, cat_norm_rows_reference, left, right, sample, scale, shift, True)
    weight, bias = normal(channels, dtype=dtype), normal(channels, dtype=dtype)
    check(ops.layer_norm_rows, layer_norm_rows_reference, rows, weight, bias, 1e-5)
    whole = normal(BATCH * side * side, channels, dtype=dtype) * 2 + 3
    check(ops.group_norm_whole, group_norm_whole_reference, whole, BATCH, 32, weight, bias, 1e-5, True)
    check(ops.group_norm_statistics, group_norm_statistics_reference, whole, BATCH, 32, weight, bias, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("side", "channels"), [(96, 320), (48, 640), (24, 1280)])
def test_linear_layers_and_every_epilogue(dtype: torch.dtype, share: float, side: int, channels: int) -> None:
    sample = active(share, side).nonzero()[:, 0].contiguous()
    rows, residual = (normal(len(sample), channels, dtype=dtype) for _ in range(2))
    bias, time = normal(8 * channels, dtype=dtype), normal(BATCH, channels, dtype=dtype)
    scale, shift = normal(BATCH, channels), normal(BATCH, channels)
    weight = normal(8 * channels, channels, dtype=dtype) / channels**0.5
    square = (weight[:channels], bias[:channels])
    ops = torch.ops.fisedit
    check(ops.linear_rows, linear_rows_reference, rows, weight[: 3 * channels], None)
    check(ops.linear_rows, linear_rows_reference, rows, *square, None, None, None, residual)
    geglu = (None, None, None, None, None, None, "geglu")
    check(ops.linear_rows, linear_rows_reference, rows, weight, bias, *geglu)
    epilogue = (None, sample, time, residual, scale, shift, "silu")
    check(ops.linear_rows_and_norm, linear_rows_and_norm_reference, rows, *square, *epilogue)
    rows, halo, weight, bias, table = conv_inputs(share, side, channels, channels, dtype)
    owner = (torch.arange(len(table), device="cuda") * 2 >= len(table)).long()
    epilogue = (None, owner, time, normal(len(table), channels, dtype=dtype), scale, shift, "silu")
    convolution = (rows, halo, weight, bias, table)
    check(ops.conv2d_rows_and_norm, conv2d_rows_and_norm_reference, *convolution, *epilogue)


@pytest.mark.parametrize("real", [0, 1, 700])
def test_padding_is_neither_computed_nor_read(real: int) -> None:
    rows, halo, weight, bias, table = conv_inputs(0.05, 96, 320, 320, torch.bfloat16)
    table[real:] = -1
    residual = normal(len(table), 320, dtype=torch.bfloat16)
    residual[real:] = torch.nan
    count = torch.tensor([real], dtype=torch.int32, device="cuda")
    arguments = (rows, halo, weight, bias, table, count, None, None, residual)
    with poisoned():
        out = torch.ops.fisedit.conv2d_rows(*arguments)
        linear = torch.ops.fisedit.linear_rows(residual, weight[:, :320], bias, count, None, None, residual)
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    assert_close(out[:real], conv2d_rows_reference(*wide)[:real])
    own = residual[:real].double()
    assert_close(linear[:real], linear_rows_reference(own, weight[:, :320].double(), bias.double()) + own)


def test_many_copies_in_one_launch() -> None:
    sources = [normal(500, 320, dtype=torch.bfloat16), normal(2, 77, 64), normal(18432, 4, dtype=torch.float16)]
    indices = [torch.randperm(500, device="cuda")[:300], None, torch.arange(0, 18432, 3, device="cuda")]
    lengths = [300, 2, 6144]
    targets = [s.new_empty(n, *s.shape[1:]) for n, s in zip(lengths, sources, strict=True)]
    counts = torch.tensor([200, 0, 6144], dtype=torch.int32, device="cuda")
    with poisoned():
        copies = RowCopies(targets, indices, counts)
        addresses = copies.addresses(sources)
        for target in targets:
            target.fill_(-7)
        copies.run(addresses)
    assert torch.equal(targets[0][:200], sources[0][indices[0][:200]])
    assert (targets[0][200:] == -7).all()
    assert torch.equal(targets[1], sources[1])
    assert torch.equal(targets[2], sources[2][::3])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_rows(dtype: torch.dtype, bits: int) -> None:
    rows = [normal(4608, 320, dtype=dtype), normal(999, 8, 40, dtype=dtype), normal(64, 130, dtype=dtype)]
    formats = [RowFormat(tuple(each.shape[1:]), dtype, bits) for each in rows]
    indices = [torch.randperm(4608, device="cuda")[:300], None, torch.arange(0, 64, 3, device="cuda")]
    targets = [
        each.new_empty(len(each) if index is None else len(index), *each.shape[1:])
        for each, index in zip(rows, indices, strict=True)
    ]
    counts = torch.tensor([200, 0, 22], dtype=torch.int32, device="cuda")
    with poisoned():
        packed = [torch.ops.fisedit.pack_rows(each, bits) for each in rows]
        copies = RowCopies(targets, indices, counts, formats)
        for target in targets:
            target.fill_(-7)
        copies.run(copies.addresses(packed))
    for each, form, source, index, target in zip(rows, formats, packed, indices, targets, strict=True):
        whole = unpack_rows_reference(source, form)
        expected = unpack_rows_reference(pack_rows_reference(each, bits), form)
        step = (each.float().amax() - each.float().amin()) / (2**bits - 1)
        off = (whole.float() - expected.float()).abs()
        assert off.max() <= 1.01 * step  # a quotient's last bit may tip a value to the next code
        assert (off > 0.01 * step).float().mean() < 1e-3
        taken = whole if index is None else whole[index]
        real = len(target) if index is None else int(counts[0] if len(index) == 300 else counts[2])
        torch.testing.assert_close(target[:real], taken[:real])
        assert (target[real:] == -7).all()


# (side, heads, head dim): self-attention of SD2 at 768, and the head dims of SD1.5
ATTENTION = ((96, 5, 64), (24, 20, 64), (64, 8, 40), (32, 8, 80), (16, 8, 160))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.05, 0.30, 1.0])
@pytest.mark.parametrize(("side", "heads", "head_dim"), ATTENTION)
def test_attention(dtype: torch.dtype, share: float, side: int, heads: int, head_dim: int) -> None:
    mask = active(share, side)
    index, offsets = mask.flatten().nonzero().flatten(), offsets_of(mask)
    q, k, v = (normal(len(index), heads, head_dim, dtype=dtype) for _ in range(3))
    check(torch.ops.fisedit.attention_rows, attention_rows_reference, q, k, v, offsets, offsets, None)
    text, text_offsets = normal(BATCH * 77, heads, head_dim, dtype=dtype), torch.tensor([0, 77, 154]).int().cuda()
    check(torch.ops.fisedit.attention_rows, attention_rows_reference, q, text, text, offsets, text_offsets, 0.2)
    base_k, base_v = (normal(mask.numel(), heads, head_dim, dtype=dtype) for _ in range(2))
    row_of = row_of_pixels(index, len(base_k))
    check(
        torch.ops.fisedit.attention_cached, attention_cached_reference, q, k, v, base_k, base_v, row_of, offsets, None
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.05, 1.0])
@pytest.mark.parametrize(("side", "heads", "head_dim"), ATTENTION)
@pytest.mark.parametrize("tokens", [16, 77])
def test_controlled_attention(
    dtype: torch.dtype, share: float, side: int, heads: int, head_dim: int, tokens: int
) -> None:
    """Of the second of two parts; the base's maps by their address, as in a CUDA graph, and by themselves."""
    mask = active(share, side)
    index, offsets = mask.flatten().nonzero().flatten(), offsets_of(mask)
    q = normal(len(index), heads, head_dim, dtype=dtype)
    k, v = (normal(BATCH * 77, heads, head_dim, dtype=dtype) for _ in range(2))
    maps = normal(side * side, heads, 77).softmax(-1)[..., :tokens].to(dtype).contiguous()
    mapper = torch.eye(77, device="cuda")[None].clone()
    mapper[0, :, 3] = mapper[0, :, 5]  # a word that takes another's map, and one that has its own
    mapper[0, :, 7] = 0
    weight = torch.rand(1, 77, device="cuda") * 2
    span = torch.tensor([tokens, 1, 2], dtype=torch.int32, device="cuda")
    control = (span, mapper, mapper.sum(1), weight, side * side, None)
    op = torch.ops.fisedit.controlled_rows
    check(op, controlled_rows_reference, q, k, v, offsets, index, maps, *control)
    by_address = op(q, k, v, offsets, index, torch.tensor([maps.data_ptr()], device="cuda"), *control)
    assert torch.equal(by_address, op(q, k, v, offsets, index, maps, *control))


@pytest.mark.parametrize("counts", [(0, 300), (300, 0), (1, 0), (1, 299)])
def test_attention_with_samples_of_few_rows(counts: tuple[int, int]) -> None:
    pixels, heads, head_dim, dtype = 576, 20, 64, torch.bfloat16
    index = torch.cat([b * pixels + torch.randperm(pixels)[:n].sort().values for b, n in enumerate(counts)]).cuda()
    offsets = torch.tensor([0, counts[0], sum(counts)]).int().cuda()
    q, k, v = (normal(len(index), heads, head_dim, dtype=dtype) for _ in range(3))
    base_k, base_v = (normal(BATCH * pixels, heads, head_dim, dtype=dtype) for _ in range(2))
    check(torch.ops.fisedit.attention_rows, attention_rows_reference, q, k, v, offsets, offsets, None)
    row_of = row_of_pixels(index, len(base_k))
    check(
        torch.ops.fisedit.attention_cached, attention_cached_reference, q, k, v, base_k, base_v, row_of, offsets, None
    )


def test_no_operator_waits_for_the_device_and_all_replay_in_a_graph() -> None:
    rows, halo, weight, bias, table = conv_inputs(0.05, 48, 64, 64, torch.bfloat16)
    mask = active(0.05, 48)
    index, offsets = mask.flatten().nonzero().flatten(), offsets_of(mask)
    sample, statistics = mask.nonzero()[:, 0].contiguous(), normal(BATCH, 64)
    q = normal(len(index), 2, 32, dtype=torch.bfloat16)
    base = normal(mask.numel(), 2, 32, dtype=torch.bfloat16)
    x, row_of = q.flatten(1), row_of_pixels(index, mask.numel())
    ops = torch.ops.fisedit

    def call() -> list[torch.Tensor]:
        return [
            ops.conv2d_rows(rows, halo, weight, bias, table),
            ops.linear_rows(x, weight[:, :64], bias),
            ops.linear_rows(x, weight[:, :64], bias, None, None, None, x),
            ops.group_norm_rows(x, sample, statistics, statistics),
            ops.group_norm_whole(base.flatten(1), BATCH, 8, None, None, 1e-5),
            ops.layer_norm_rows(x, None, None, 1e-5),
            ops.cat_norm_rows(x[:, :32], x[:, 32:], sample, statistics, statistics)[1],
            ops.scatter_rows(x, base.flatten(1), index, [BATCH, 64, 48, 48], [0, 2, 3, 1], 3, offsets[-1:]),
            ops.attention_rows(q, q, q, offsets, offsets, None),
            ops.attention_cached(q, q, q, base, base, row_of, offsets, None),
        ]

    expected = call()  # compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        again = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    torch.cuda.synchronize()
    for first, second, third in zip(expected, again, captured, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
