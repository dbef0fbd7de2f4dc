"""conv2d_rows against F.conv2d of the dense map in fp64, through tables built here pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support.random_rows import DTYPES, masks, normal, pixel_ids

import fisedit_compile.kernels.ops  # noqa: F401  (registers torch.ops.fisedit)
from fisedit_compile.kernels.implicit_gemm import conv2d_rows
from fisedit_compile.testing import assert_close


@dataclass(frozen=True)
class Convolution:
    """``upsampled`` maps the source's height and width to the size that it is nearest-upsampled to first."""

    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    upsampled: tuple[int, int] | None = None  # added to twice the source's size

    def resize(self, maps: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> upsampled [B, C, H', W']."""
        if self.upsampled is None:
            return maps
        size = [2 * side + more for side, more in zip(maps.shape[2:], self.upsampled, strict=True)]
        return F.interpolate(maps, size=size, mode="nearest")


CONVOLUTIONS = (
    Convolution(),
    Convolution(kernel=(1, 1), padding=0),
    Convolution(kernel=(3, 1)),
    Convolution(stride=2),
    Convolution(stride=2, padding=0),
    Convolution(padding=2, dilation=2),
    Convolution(upsampled=(0, 0)),
    Convolution(upsampled=(1, -1)),
)


def brute_force_table(
    mask: torch.Tensor, targets: torch.Tensor, conv: Convolution
) -> tuple[torch.Tensor, torch.Tensor]:
    """Table int32 [M, K] for the pixels of ``targets`` [B, H', W'] and halo [Hh], pixel by pixel and tap by tap."""
    batch, height, width = mask.shape
    ids = conv.resize(torch.arange(batch * height * width, dtype=torch.float64).view(batch, 1, height, width))[
        :, 0
    ].long()
    reads: list[list[int]] = []
    for sample, y, x in targets.nonzero().tolist():
        taps = []
        for ky in range(conv.kernel[0]):
            for kx in range(conv.kernel[1]):
                source_y = y * conv.stride - conv.padding + ky * conv.dilation
                source_x = x * conv.stride - conv.padding + kx * conv.dilation
                inside = 0 <= source_y < ids.shape[1] and 0 <= source_x < ids.shape[2]
                taps.append(int(ids[sample, source_y, source_x]) if inside else -1)
        reads.append(taps)
    active = pixel_ids(mask).tolist()
    halo = sorted({pixel for taps in reads for pixel in taps} - set(active) - {-1})
    entry = {pixel: position for position, pixel in enumerate([*active, *halo])} | {-1: -1}
    table = torch.tensor([[entry[pixel] for pixel in taps] for taps in reads], dtype=torch.int32)
    return table.view(len(reads), conv.kernel[0] * conv.kernel[1]), torch.tensor(halo, dtype=torch.int64)


def check_against_dense(
    mask: torch.Tensor,
    conv: Convolution,
    dtype: torch.dtype,
    seed: int,
    bias: bool,
    same: bool,
    shortcut_channels: int = 0,
) -> None:
    """With ``shortcut_channels``, plus a 1x1 convolution of another map, of the output's size and so many channels."""
    channels, filters = 5, 4
    batch, height, width = mask.shape
    x = normal(batch, channels, height, width, dtype=dtype, seed=seed)
    weight = normal(filters, channels, *conv.kernel, dtype=dtype, seed=seed + 1)
    shift = normal(filters, dtype=dtype, seed=seed + 2) if bias else None

    resized = conv.resize(x.double())
    reach = [conv.dilation * (taps - 1) + 1 - 2 * conv.padding for taps in conv.kernel]
    if any(side < least for side, least in zip(resized.shape[2:], reach, strict=True)):
        hypothesis.reject()  # a map that is smaller than the kernel has no output
    dense = F.conv2d(
        resized, weight.double(), None if shift is None else shift.double(), conv.stride, conv.padding, conv.dilation
    )
    other = normal(batch, shortcut_channels, *dense.shape[2:], dtype=dtype, seed=seed + 3)
    shortcut_weight = normal(filters, shortcut_channels, 1, 1, dtype=dtype, seed=seed + 4)
    if shortcut_channels:
        dense = dense + F.conv2d(other.double(), shortcut_weight.double())
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(batch, *dense.shape[2:], generator=generator) < 0.4
    if same and dense.shape[2:] == mask.shape[1:]:
        targets = mask
    table, halo = brute_force_table(mask, targets, conv)

    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
    flat = weight.permute(0, 2, 3, 1).reshape(filters, -1)
    halo_rows = pixels[halo] if len(halo) or seed % 2 else None  # an empty halo is None or [0, Cin]
    given = {"shortcut": other.permute(0, 2, 3, 1)[targets], "shortcut_weight": shortcut_weight.flatten(1)}
    out = torch.ops.fisedit.conv2d_rows(
        pixels[pixel_ids(mask)], halo_rows, flat, shift, table, **(given if shortcut_channels else {})
    )
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, dense.permute(0, 2, 3, 1)[targets])


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
@hypothesis.settings(max_examples=30)
@hypothesis.given(masks(), st.sampled_from(DTYPES), st.integers(0, 99), st.booleans(), st.booleans())
def test_equals_the_dense_convolution(
    conv: Convolution, mask: torch.Tensor, dtype: torch.dtype, seed: int, bias: bool, same: bool
) -> None:
    check_against_dense(mask, conv, dtype, seed, bias, same)


@pytest.mark.parametrize("conv", [CONVOLUTIONS[0], *CONVOLUTIONS[3:5], CONVOLUTIONS[-1]], ids=str)
@pytest.mark.parametrize("shortcut_channels", [1, 7])
@hypothesis.given(masks(), st.sampled_from(DTYPES), st.integers(0, 99), st.booleans(), st.booleans())
def test_equals_the_sum_with_a_pointwise_convolution_beside_it(
    conv: Convolution,
    shortcut_channels: int,
    mask: torch.Tensor,
    dtype: torch.dtype,
    seed: int,
    bias: bool,
    same: bool,
) -> None:
    check_against_dense(mask, conv, dtype, seed, bias, same, shortcut_channels)


def test_several_blocks_of_columns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv2d_rows, "COLUMNS_BYTES", 3 * 45 * 8)  # three rows of fp64 columns at a time
    mask = torch.ones(2, 5, 4, dtype=torch.bool)
    for shortcut_channels in (0, 7):
        check_against_dense(mask, Convolution(), torch.float64, 3, True, True, shortcut_channels)


def test_a_row_larger_than_a_block_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv2d_rows, "COLUMNS_BYTES", 1)
    check_against_dense(torch.ones(1, 2, 3, dtype=torch.bool), Convolution(), torch.float64, 4, True, True)


def test_nothing_inside_the_picture_gives_the_bias() -> None:
    table, bias = torch.full((3, 9), -1, dtype=torch.int32), torch.tensor([1.0, -2.0])
    for halo in (None, torch.empty(0, 4)):
        out = torch.ops.fisedit.conv2d_rows(torch.empty(0, 4), halo, torch.randn(2, 36), bias, table)
        assert torch.equal(out, bias.expand(3, 2))
        assert torch.equal(
            torch.ops.fisedit.conv2d_rows(torch.empty(0, 4), halo, torch.randn(2, 36), None, table), torch.zeros(3, 2)
        )


def test_nothing_inside_the_picture_gives_the_shortcut_beside_it() -> None:
    table, shortcut = torch.full((3, 9), -1, dtype=torch.int32), normal(3, 5, dtype=torch.float64, seed=0)
    weight, shortcut_weight = normal(2, 36 + 5, dtype=torch.float64, seed=1).tensor_split([36], 1)
    conv = partial(torch.ops.fisedit.conv2d_rows, halo=None, weight=weight, bias=None, shortcut_weight=shortcut_weight)
    assert_close(conv(shortcut.new_empty(0, 4), table=table, shortcut=shortcut), shortcut @ shortcut_weight.t())
    nothing = conv(shortcut[:, :4], table=table[:0], shortcut=shortcut[:0])
    assert nothing.shape == (0, 2)


def test_the_epilogue_comes_behind_the_shortcut() -> None:
    table, rows = torch.tensor([[0], [1]], dtype=torch.int32), normal(2, 3, dtype=torch.float64, seed=0)
    shortcut, residual = normal(2, 5, dtype=torch.float64, seed=1), normal(2, 4, dtype=torch.float64, seed=2)
    weight, bias = normal(4, 8, dtype=torch.float64, seed=3), normal(4, dtype=torch.float64, seed=4)
    scale, shift = normal(1, 4, dtype=torch.float64, seed=5), normal(1, 4, dtype=torch.float64, seed=6)
    epilogue = {"sample": torch.zeros(2).long(), "residual": residual, "scale": scale, "shift": shift}
    side = {"shortcut": shortcut, "shortcut_weight": weight[:, 3:]}
    raw, normed = torch.ops.fisedit.conv2d_rows_and_norm(
        rows, None, weight[:, :3], bias, table, **epilogue, activation="silu", **side
    )
    total = torch.cat([rows, shortcut], 1) @ weight.t() + bias + residual
    assert_close(raw, total)
    assert_close(normed, F.silu(total * scale + shift))


def test_halo_alone_feeds_a_target_without_active_pixels() -> None:
    halo, weight = normal(9, 4, dtype=torch.float64, seed=0), normal(2, 36, dtype=torch.float64, seed=1)
    table = torch.arange(9, dtype=torch.int32).view(1, 9)
    out = torch.ops.fisedit.conv2d_rows(halo[:0], halo, weight, None, table)
    assert_close(out, (weight @ halo.flatten())[None])


def test_zero_padding_is_zero_beside_rows_that_are_not_finite() -> None:
    """A padded tap must not multiply a row by zero: NaN in one row stays out of the outputs that do not read it."""
    rows = torch.tensor([[float("nan")], [1.0]])
    table = torch.tensor([[-1, 1], [0, 1]], dtype=torch.int32)
    out = torch.ops.fisedit.conv2d_rows(rows, None, torch.ones(1, 2), None, table)
    assert out[0].item() == 1.0
    assert out[1].isnan().all()


def test_an_entry_past_the_halo_is_an_error() -> None:
    table = torch.tensor([[5]], dtype=torch.int32)
    with pytest.raises((IndexError, RuntimeError)):
        torch.ops.fisedit.conv2d_rows(torch.randn(2, 3), torch.randn(1, 3), torch.randn(4, 3), None, table)


def test_weights_of_other_channels_are_an_error() -> None:
    table = torch.tensor([[0]], dtype=torch.int32)
    with pytest.raises(RuntimeError):
        torch.ops.fisedit.conv2d_rows(torch.randn(2, 3), None, torch.randn(4, 5), None, table)


@pytest.mark.parametrize(
    ("shortcut", "weight", "said"),
    [
        ((2, 4), (4, 5), r"does not fit .*; give \[4, 4\]"),
        ((2, 5), (3, 5), r"does not fit .*; give \[4, 5\]"),
        ((1, 5), (4, 5), "1 rows of a shortcut for a convolution of 2; give one for each output row"),
        ((3, 5), (4, 5), "3 rows of a shortcut for a convolution of 2; give one for each output row"),
        ((2, 5), None, "belong together"),
        (None, (4, 5), "belong together"),
    ],
)
def test_a_shortcut_that_does_not_fit_is_an_error(
    shortcut: tuple[int, int] | None, weight: tuple[int, int] | None, said: str
) -> None:
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    given = {
        name: None if size is None else torch.randn(size)
        for name, size in (("shortcut", shortcut), ("shortcut_weight", weight))
    }
    with pytest.raises(ValueError, match=said):
        torch.ops.fisedit.conv2d_rows(torch.randn(2, 3), None, torch.randn(4, 3), None, table, **given)
