"""The Triton kernels at the shapes of Stable Diffusion 2 at 768x768, on a GPU, against the references in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from poison import poisoned

import fisedit_compile.kernels.ops  # noqa: F401  (registers torch.ops.fisedit)
from fisedit_compile.kernels.attention_rows import attention_cached_reference, attention_rows_reference
from fisedit_compile.kernels.conv2d_rows import conv2d_rows_reference
from fisedit_compile.kernels.group_norm_rows import group_norm_rows_reference
from fisedit_compile.neighbour_table import Taps, neighbour_table
from fisedit_compile.sample_masks import square_mask
from fisedit_compile.testing import assert_close

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
    assert torch.equal(out, again)
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    assert_close(out, reference(*wide))


def conv_inputs(
    share: float, side: int, channels: int, filters: int, dtype: torch.dtype, stride: int = 1
) -> tuple[torch.Tensor, ...]:
    mask, target = active(share, side), side // stride
    taps = Taps((side, side), (target, target), (3, 3), (stride, stride), (1, 1), (1, 1))
    targets = torch.nn.functional.adaptive_max_pool2d(mask.float(), target).flatten().nonzero().flatten()
    table, halo = neighbour_table(taps, targets, mask, BATCH)
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


@pytest.mark.parametrize(("allowed", "least", "most"), [(False, 0.0, 5e-6), (True, 5e-6, 2e-3)])
def test_tf32_only_where_torch_allows_it(
    allowed: bool, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    rows, halo, weight, bias, table = conv_inputs(0.05, 96, 320, 320, torch.float32)
    out = torch.ops.fisedit.conv2d_rows(rows, halo, weight, bias, table)
    expected = conv2d_rows_reference(*(t.double() for t in (rows, halo, weight, bias)), table)
    assert least < (out - expected).norm() / expected.norm() < most


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "channels"), [(96, 320), (96, 960), (48, 640), (24, 2560)])
def test_group_norm(dtype: torch.dtype, side: int, channels: int) -> None:
    sample = active(0.15, side).nonzero()[:, 0]
    rows = normal(len(sample), channels, dtype=dtype) * 2 + 3
    mean, rstd = normal(BATCH, 32) + 3, normal(BATCH, 32).abs() + 0.5
    weight, bias = normal(channels, dtype=dtype), normal(channels, dtype=dtype)
    check(torch.ops.fisedit.group_norm_rows, group_norm_rows_reference, rows, sample, mean, rstd, weight, bias)


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
    check(torch.ops.fisedit.attention_cached, attention_cached_reference, q, k, v, base_k, base_v, index, offsets, None)


@pytest.mark.parametrize("counts", [(0, 300), (300, 0), (1, 0), (1, 299)])
def test_attention_with_samples_of_few_rows(counts: tuple[int, int]) -> None:
    pixels, heads, head_dim, dtype = 576, 20, 64, torch.bfloat16
    index = torch.cat([b * pixels + torch.randperm(pixels)[:n].sort().values for b, n in enumerate(counts)]).cuda()
    offsets = torch.tensor([0, counts[0], sum(counts)]).int().cuda()
    q, k, v = (normal(len(index), heads, head_dim, dtype=dtype) for _ in range(3))
    base_k, base_v = (normal(BATCH * pixels, heads, head_dim, dtype=dtype) for _ in range(2))
    check(torch.ops.fisedit.attention_rows, attention_rows_reference, q, k, v, offsets, offsets, None)
    check(torch.ops.fisedit.attention_cached, attention_cached_reference, q, k, v, base_k, base_v, index, offsets, None)


def test_no_operator_waits_for_the_device_and_all_replay_in_a_graph() -> None:
    rows, halo, weight, bias, table = conv_inputs(0.05, 48, 64, 64, torch.bfloat16)
    mask = active(0.05, 48)
    index, offsets = mask.flatten().nonzero().flatten(), offsets_of(mask)
    sample, statistics = mask.nonzero()[:, 0].contiguous(), normal(BATCH, 32)
    q = normal(len(index), 2, 32, dtype=torch.bfloat16)
    base = normal(mask.numel(), 2, 32, dtype=torch.bfloat16)
    x = q.flatten(1)
    ops = torch.ops.fisedit

    def call() -> list[torch.Tensor]:
        return [
            ops.conv2d_rows(rows, halo, weight, bias, table),
            ops.group_norm_rows(x, sample, statistics, statistics, None, None),
            ops.attention_rows(q, q, q, offsets, offsets, None),
            ops.attention_cached(q, q, q, base, base, index, offsets, None),
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
