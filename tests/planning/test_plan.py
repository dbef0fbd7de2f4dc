"""Plans against dense convolutions: rows and halo rows read through a table give what F.conv2d gives there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fisedit_compile.errors import MaskError
from fisedit_compile.ir.layout import Size
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.taps import Taps
from fisedit_compile.planning.apsc import expand_to_tiles
from fisedit_compile.planning.edit_plan import EditPlan, plan_edit, row_of_pixels
from fisedit_compile.testing import assert_close


def output_size(read: Size, kernel: Size, stride: Size, padding: Size, dilation: Size) -> Size:
    """From torch itself, on the meta device."""
    x, w = torch.empty(1, 1, *read, device="meta"), torch.empty(1, 1, *kernel, device="meta")
    out = F.conv2d(x, w, stride=stride, padding=padding, dilation=dilation)
    return out.shape[2], out.shape[3]


@st.composite
def geometries(draw: st.DrawFn) -> Taps:
    side = st.integers(1, 17)
    source = draw(side), draw(side)
    upsampled = draw(st.sampled_from(["no", "no", "twice", "odd"]))
    read = source
    if upsampled == "twice":
        read = 2 * source[0], 2 * source[1]
    elif upsampled == "odd":  # as 7 -> 13: what a U-Net does whose size is not a multiple of its factor
        read = max(1, 2 * source[0] - 1), draw(st.integers(source[1], 3 * source[1]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 3)]))
    one_or_two = st.sampled_from([(1, 1), (2, 2), (2, 1)])
    stride, padding, dilation = draw(one_or_two), draw(st.sampled_from([(0, 0), (1, 1), (0, 1)])), draw(one_or_two)
    for axis in (0, 1):  # grow the padding until there is an output at all
        missing = dilation[axis] * (kernel[axis] - 1) + 1 - read[axis] - 2 * padding[axis]
        if missing > 0:
            grown = padding[axis] + (missing + 1) // 2
            padding = (grown, padding[1]) if axis == 0 else (padding[0], grown)
    target = output_size(read, kernel, stride, padding, dilation)
    dense = draw(st.booleans())
    return Taps(source, target, kernel, stride, padding, dilation, None if read == source else read, dense)


@st.composite
def masks(draw: st.DrawFn, n: int, size: Size) -> torch.Tensor:
    """bool [n, h, w], each sample random at its own density, empty, full or one pixel."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    samples = []
    for _ in range(n):
        density = draw(st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0, None]))
        sample = torch.rand(*size, generator=generator) < (density or 0.0)
        if density is None:
            sample[draw(st.integers(0, size[0] - 1)), draw(st.integers(0, size[1] - 1))] = True
        samples.append(sample)
    return torch.stack(samples)


def pooled_by_hand(mask: torch.Tensor, size: Size) -> torch.Tensor:
    """Any-pool: a target pixel covers the source pixels from floor(i n / m) to ceil((i + 1) n / m)."""
    n, h, w = mask.shape
    out = torch.zeros(n, *size, dtype=torch.bool)
    for y in range(size[0]):
        for x in range(size[1]):
            rows = slice(y * h // size[0], -(-(y + 1) * h // size[0]))
            cols = slice(x * w // size[1], -(-(x + 1) * w // size[1]))
            out[:, y, x] = mask[:, rows, cols].flatten(1).any(1)
    return out


def pixels(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B*H*W, C]"""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def test_every_pixel_finds_its_row() -> None:
    index = torch.tensor([1, 4, 5, 11])
    row_of = row_of_pixels(index, 12)
    assert row_of.dtype == torch.int32
    assert row_of.tolist() == [-1, 0, -1, -1, 1, 2, -1, -1, -1, -1, -1, 3]
    assert row_of_pixels(index[:0], 3).tolist() == [-1, -1, -1]


def requests_of(taps: Taps) -> list[PlanTensor]:
    of_size = [PlanTensor(kind, taps.target) for kind in ("index", "sample", "offsets")]
    of_taps = [PlanTensor("table", taps)]
    if not taps.dense:
        of_size.append(PlanTensor("index", taps.source))
        of_taps.append(PlanTensor("halo", taps))
    return of_size + of_taps


def check_convolution(plan: EditPlan, taps: Taps) -> None:
    """The dense convolution at the active target pixels, from what the plan says is read; and no halo row too many."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(plan.batch, 3, *taps.source, dtype=torch.float64, generator=generator)
    weight = torch.randn(2, 3, *taps.kernel, dtype=torch.float64, generator=generator)

    def conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if taps.upsampled:
            x = F.interpolate(x, size=taps.upsampled, mode="nearest")
        return F.conv2d(x, weight, stride=taps.stride, padding=taps.padding, dilation=taps.dilation)

    target_index = plan.tensor(PlanTensor("index", taps.target))
    expected = pixels(conv(x, weight))[target_index]
    table = plan.tensor(PlanTensor("table", taps))
    assert table.dtype == torch.int32
    assert table.shape == (len(target_index), taps.kernel[0] * taps.kernel[1])

    stored = pixels(x)
    if not taps.dense:
        source_index, halo = plan.tensor(PlanTensor("index", taps.source)), plan.tensor(PlanTensor("halo", taps))
        stored = torch.cat((stored[source_index], stored[halo]))
        # Independent of the table: what has a gradient from an active output is read.
        ones = torch.ones(plan.batch, 1, *taps.source, dtype=torch.float64, requires_grad=True)
        out = conv(ones, torch.ones(1, 1, *taps.kernel, dtype=torch.float64))
        (grad,) = torch.autograd.grad(pixels(out)[target_index].sum(), ones)
        read = grad[:, 0] > 0
        assert halo.dtype == torch.int64
        assert torch.equal(halo, (read & ~plan.active(taps.source)).flatten().nonzero().squeeze(1))
    assert ((table >= -1) & (table < len(stored))).all()
    gathered = torch.cat((stored, stored.new_zeros(1, 3)))[table.long()]  # entry -1 reads the last row, zero
    assert_close(torch.einsum("mkc,ock->mo", gathered, weight.flatten(2)), expected)


@given(st.data(), geometries())
@settings(max_examples=200, deadline=None)
def test_tables_and_halos_reproduce_dense_convolutions(data: st.DataObject, taps: Taps) -> None:
    n = data.draw(st.integers(1, 3))
    mask = data.draw(masks(n, data.draw(st.sampled_from([taps.target, taps.source, (17, 12)]))))
    plan = plan_edit(
        mask,
        requests_of(taps),
        batch=n * data.draw(st.integers(1, 2)),
        blocks=data.draw(st.sampled_from(["pixel", "paper"])),
    )
    check_convolution(plan, taps)


@given(st.data(), st.tuples(st.integers(1, 17), st.integers(1, 17)), st.tuples(st.integers(1, 17), st.integers(1, 17)))
@settings(deadline=None)
def test_rows_of_a_resolution(data: st.DataObject, mask_size: Size, size: Size) -> None:
    n, copies = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    mask = data.draw(masks(n, mask_size))
    index, sample, offsets = (PlanTensor(kind, size) for kind in ("index", "sample", "offsets"))
    plan = plan_edit(mask, [index, sample, offsets], batch=n * copies)

    active = torch.cat([pooled_by_hand(mask, size)] * copies)
    where = active.nonzero()  # [M, 3], sorted by (sample, y, x)
    assert torch.equal(plan.active(size), active)
    assert torch.equal(plan.tensor(index), (where[:, 0] * size[0] + where[:, 1]) * size[1] + where[:, 2])
    assert torch.equal(plan.tensor(sample), where[:, 0])
    assert plan.tensor(offsets).dtype == torch.int32
    assert plan.tensor(offsets).tolist() == [0, *active.flatten(1).sum(1).cumsum(0).tolist()]
    assert plan.counts == {size: len(where)}


def test_a_batch_is_its_samples_one_after_the_other() -> None:
    taps = Taps((8, 6), (8, 6), (3, 3), (1, 1), (1, 1), (1, 1))
    table, halo, index = (PlanTensor("table", taps), PlanTensor("halo", taps), PlanTensor("index", (8, 6)))
    mask = torch.zeros(3, 8, 6, dtype=torch.bool)
    mask[0, 2:5, 1:3] = True
    mask[2, 7, 5] = True  # sample 1 stays empty
    together = plan_edit(mask, [table, halo, index], batch=3)
    alone = [plan_edit(m[None], [table, halo, index], batch=1) for m in mask]
    for request in (index, halo):
        ids = [plan.tensor(request) + b * 48 for b, plan in enumerate(alone)]
        assert torch.equal(together.tensor(request), torch.cat(ids))
    assert [len(plan.tensor(table)) for plan in alone] == [6, 0, 1]

    read = torch.cat((together.tensor(index), together.tensor(halo), torch.tensor([-1])))[together.tensor(table).long()]
    for b, plan in enumerate(alone):
        ids = torch.cat((plan.tensor(index) + b * 48, plan.tensor(halo) + b * 48, torch.tensor([-1])))
        own = together.tensor(index) // 48 == b
        assert torch.equal(read[own], ids[plan.tensor(table).long()])


@pytest.mark.parametrize("full", [False, True])
def test_empty_and_full_masks(full: bool) -> None:
    taps = Taps((7, 5), (4, 3), (3, 3), (2, 2), (1, 1), (1, 1))
    dense = Taps((7, 5), (7, 5), (3, 3), (1, 1), (1, 1), (1, 1), dense=True)
    plan = plan_edit(torch.full((1, 7, 5), full), [*requests_of(taps), *requests_of(dense)], batch=2)
    rows = 2 * 35 if full else 0
    assert plan.counts == {(4, 3): 24 if full else 0, (7, 5): rows}
    assert len(plan.tensor(PlanTensor("halo", taps))) == 0
    assert plan.tensor(PlanTensor("table", taps)).shape == (24 if full else 0, 9)
    assert plan.tensor(PlanTensor("table", dense)).shape == (rows, 9)
    check_convolution(plan, taps)
    check_convolution(plan, dense)


def test_paper_blocks_grow_the_rows_and_are_reported() -> None:
    mask = torch.zeros(2, 12, 12, dtype=torch.bool)
    mask[0, 3, 3] = True
    mask[1, 8:10, 0] = True
    requests = [PlanTensor("index", size) for size in ((12, 12), (6, 6))]
    exact, paper = plan_edit(mask, requests, batch=4), plan_edit(mask, requests, batch=4, blocks="paper")
    assert exact.counts == {(12, 12): 6, (6, 6): 4}
    assert exact.paper_choices == {}
    assert exact.pixel_counts == exact.counts
    assert paper.pixel_counts == exact.counts
    assert paper.counts == {(12, 12): 16, (6, 6): 16}  # one 2x2 tile a sample
    for size, choice in paper.paper_choices.items():
        assert torch.equal(paper.active(size), expand_to_tiles(exact.active(size), choice.chosen.tile))
    assert "12x12: 16 of 576 rows (2.8%), block 4x4 (tile 2x2), 10 over pixel-exact (+166.7%)" in paper.report()
    assert "12x12: 6 of 576 rows (1.0%)" in exact.report().splitlines()


def test_report_of_halos_and_of_an_empty_mask() -> None:
    taps = Taps((6, 6), (12, 12), (3, 3), (1, 1), (1, 1), (1, 1), upsampled=(12, 12))
    mask = torch.zeros(1, 12, 12, dtype=torch.bool)
    empty = plan_edit(mask, [PlanTensor("table", taps)], batch=1, blocks="paper")
    assert "0 of 144 rows (0.0%)" in empty.report()
    mask[0, 4:6, 4:6] = True
    report = plan_edit(mask, [PlanTensor("table", taps)], batch=1).report()
    assert "6x6 upsampled to 12x12 -> 12x12, kernel 3x3, stride 1x1, padding 1x1, dilation 1x1: 8 halo rows" in report


def test_to_moves_every_tensor() -> None:
    taps = Taps((8, 8), (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))
    plan = plan_edit(torch.ones(1, 8, 8, dtype=torch.bool), requests_of(taps), batch=1).to("meta")
    assert plan.mask.is_meta
    assert plan.active((8, 8)).is_meta
    assert all(plan.tensor(request).is_meta for request in requests_of(taps))


@pytest.mark.parametrize(
    ("mask", "batch", "message"),
    [
        (torch.zeros(1, 8, 8), 1, "dtype torch.float32; give a bool tensor"),
        (np.zeros((1, 8, 8), dtype=bool), 1, "ndarray; give a bool tensor"),
        (torch.zeros(8, 8, dtype=torch.bool), 1, r"shape \[8, 8\]; give \[samples, height, width\]"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.bool), 1, "give .samples, height, width"),
        (torch.zeros(0, 8, 8, dtype=torch.bool), 2, "none of them zero"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), 4, "batch of 4 is not a multiple of the 3 masks"),
        (torch.zeros(1, 8, 8, dtype=torch.bool), 0, "batch of 0 is not a multiple"),
    ],
)
def test_bad_masks(mask: torch.Tensor, batch: int, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        plan_edit(mask, [PlanTensor("index", (8, 8))], batch=batch)


def test_bad_requests() -> None:
    mask, taps = torch.ones(1, 8, 8, dtype=torch.bool), Taps((8, 8), (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))
    with pytest.raises(ValueError, match="blocks is 'tiles'"):
        plan_edit(mask, [], batch=1, blocks="tiles")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind is 'rows'"):
        PlanTensor("rows", (8, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"PlanTensor\('table'\) needs Taps"):
        PlanTensor("table", (8, 8))
    with pytest.raises(ValueError, match=r"PlanTensor\('index'\) needs a resolution"):
        PlanTensor("index", taps)
    with pytest.raises(ValueError, match="dense source has no halo"):
        PlanTensor("halo", Taps((8, 8), (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), dense=True))
    plan = plan_edit(mask, [PlanTensor("index", (8, 8))], batch=1)
    with pytest.raises(ValueError, match="was not planned; add it to the requests"):
        plan.tensor(PlanTensor("sample", (4, 4)))
    with pytest.raises(ValueError, match=r"resolution \(4, 4\) was not planned; planned are \[\(8, 8\)\]"):
        plan.active((4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": (8, 7)}, r"gives \(8, 8\); give the convolution's output size"),
        ({"upsampled": (16, 16)}, r"over \(16, 16\).*gives \(16, 16\)"),
        ({"stride": (0, 1)}, "Taps.stride is .0, 1.; give .height, width., each at least 1"),
        ({"padding": (-1, 1)}, "each at least 0"),
        ({"kernel": (3,)}, "Taps.kernel"),
    ],
)
def test_taps_that_fit_no_convolution(change: dict[str, Size], message: str) -> None:
    geometry = {"source": (8, 8), "target": (8, 8), "kernel": (3, 3), "stride": (1, 1)}
    with pytest.raises(ValueError, match=message):
        Taps(**{**geometry, "padding": (1, 1), "dilation": (1, 1), **change})


def sd2_requests() -> list[PlanTensor]:
    """What a Stable Diffusion 2 U-Net at 768x768 asks for, sparse down to 24x24 with 12x12 dense."""
    pair, once, twice = (3, 3), (1, 1), (2, 2)
    taps = [Taps((n, n), (n, n), pair, once, once, once) for n in (96, 48, 24)]
    taps += [Taps((n, n), (n // 2, n // 2), pair, twice, once, once) for n in (96, 48)]
    taps += [Taps((n, n), (2 * n, 2 * n), pair, once, once, once, (2 * n, 2 * n), dense=n == 12) for n in (48, 24, 12)]
    taps.append(Taps((96, 96), (96, 96), pair, once, once, once, dense=True))
    return [request for t in taps for request in requests_of(t)]


def test_real_sized_plan_reproduces_dense_convolutions() -> None:
    mask = torch.zeros(1, 96, 96, dtype=torch.bool)
    mask[0, 20:50, 31:60] = True
    mask[0, 0, 95] = True
    plan = plan_edit(mask, sd2_requests(), batch=2, blocks="paper")
    for taps in dict.fromkeys(request.where for request in sd2_requests()):
        if isinstance(taps, Taps):
            check_convolution(plan, taps)
