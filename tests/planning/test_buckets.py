"""Padding to buckets: a padded plan names the pixels that the plan names, and none of its padding is ever read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.random_masks import masks
from torch import Tensor

from fisedit_compile.ir.layout import Size
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.taps import Taps
from fisedit_compile.masks.sample_masks import square_mask
from fisedit_compile.planning.buckets import MULTIPLE, RAGGEDNESS, Bucket, Buckets, pad_plan
from fisedit_compile.planning.edit_plan import EditPlan, plan_edit

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(16, 16), (13, 10), (1, 1), (33, 7), (40, 24)]


def unet_requests(latents: Size, levels: int, dense_below: int) -> list[PlanTensor]:
    """What the sparse graph of a U-Net asks of a plan: convolutions within, down and up each level, and the first."""
    same: dict[str, Any] = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    sizes = [latents]
    for _ in range(levels - 1):
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))  # type: ignore[arg-type]
    taps = [Taps(latents, latents, dense=True, **same)]
    taps += [Taps(size, size, **same) for size in sizes]
    taps += [Taps(large, small, **{**same, "stride": (2, 2)}) for large, small in pairwise(sizes)]
    taps += [Taps(small, large, upsampled=large, **same) for large, small in pairwise(sizes)]
    requests = [PlanTensor(kind, size) for size in sizes for kind in ("index", "sample", "offsets", "count")]  # type: ignore[arg-type]
    for each in dict.fromkeys(taps):
        requests.append(PlanTensor("table", each))
        if not each.dense and min(each.source) >= dense_below:
            requests.append(PlanTensor("halo", each))
    return list(dict.fromkeys(requests))


def planned(
    mask: Tensor, copies: int = 1, levels: int = 3, dense_below: int = 1
) -> tuple[EditPlan, Buckets, list[PlanTensor]]:
    latents = (mask.shape[1], mask.shape[2])
    requests, batch = unet_requests(latents, levels, dense_below), copies * len(mask)
    plan = plan_edit(mask, requests, batch=batch, dense_below=dense_below)
    return plan, Buckets(requests, batch=batch, latents=latents, dense_below=dense_below), requests


def halos(plan: EditPlan, requests: Sequence[PlanTensor]) -> dict[Any, int]:
    return {request.where: len(plan.tensor(request)) for request in requests if request.kind == "halo"}


def chequered(height: int, width: int) -> Tensor:
    return (torch.arange(height)[:, None] + torch.arange(width))[None] % 2 == 0


@st.composite
def plans(draw: st.DrawFn) -> tuple[EditPlan, Buckets, list[PlanTensor]]:
    size = draw(st.sampled_from(SIZES))
    mask = draw(masks(draw(st.integers(1, 3)), size) | st.just(chequered(*size)))
    return planned(mask, draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 9])))


@given(plans())
def test_the_bucket_of_a_plan_holds_it_and_has_sizes_of_few_kinds(
    made: tuple[EditPlan, Buckets, list[PlanTensor]],
) -> None:
    plan, buckets, requests = made
    bucket = buckets.choose(plan)
    assert all(count <= bucket.rows[size] for size, count in plan.counts.items())
    assert all(count <= bucket.halo[taps] for taps, count in halos(plan, requests).items())
    for each in [*buckets.ladder, bucket]:
        sizes = {**each.rows, **each.halo}
        for where, room in sizes.items():
            height, width = where.source if isinstance(where, Taps) else where
            pixels = plan.batch * height * width
            assert room == pixels or (room % MULTIPLE == 0 and room < pixels)


@given(plans())
def test_a_padded_plan_names_the_same_pixels(made: tuple[EditPlan, Buckets, list[PlanTensor]]) -> None:
    plan, buckets, requests = made
    bucket = buckets.choose(plan)
    padded = pad_plan(plan, bucket, requests)
    assert list(padded) == requests
    for request, tensor in padded.items():
        assert tensor.dtype == plan.tensor(request).dtype
        if request.kind in ("offsets", "count"):
            assert torch.equal(tensor, plan.tensor(request))
        elif request.kind == "table":
            _names_the_same(plan, bucket, padded, request.where)
        else:
            real = plan.tensor(request)
            room = bucket.halo[request.where] if request.kind == "halo" else bucket.rows[request.where]  # type: ignore[index]
            assert len(tensor) == room
            assert torch.equal(tensor[: len(real)], real)
            assert not tensor[len(real) :].any()  # pixel 0 of sample 0: it may be gathered, whatever it holds


def _names_the_same(plan: EditPlan, bucket: Bucket, padded: dict[PlanTensor, Tensor], taps: Any) -> None:
    before, after = plan.tensor(PlanTensor("table", taps)).long(), padded[PlanTensor("table", taps)].long()
    real = len(before)
    assert after.shape == (bucket.rows[taps.target], before.shape[1])
    assert (after[real:] == -1).all()
    if taps.dense:
        assert torch.equal(after[:real], before)
        return
    index, halo = (padded.get(PlanTensor(*each)) for each in (("index", taps.source), ("halo", taps)))
    assert index is not None
    stored = index if halo is None else torch.cat([index, halo])  # as a convolution reads them
    known = plan.tensor(PlanTensor("halo", taps))
    original = torch.cat([plan.tensor(PlanTensor("index", taps.source)), known, torch.tensor([-1])])
    assert torch.equal(torch.cat([stored, torch.tensor([-1])])[after[:real]], original[before])
    rows = plan.counts[taps.source]
    behind = bucket.rows[taps.source]
    is_row, is_halo = after < rows, (after >= behind) & (after < behind + len(known))
    assert (is_row | is_halo).all()  # -1 is among the first: no entry names padding
    if halo is None:
        assert not is_halo.any()


def largest(buckets: Buckets) -> Bucket:
    return max(buckets.ladder, key=lambda bucket: sum(bucket.rows.values()))


def test_the_whole_picture_and_nothing_at_all_are_on_the_ladder() -> None:
    for size in SIZES:
        for samples in (1, 3):
            for value in (True, False):
                plan, buckets, _ = planned(torch.full((samples, *size), value))
                ladder, bucket = buckets.ladder, buckets.choose(plan)
                assert (bucket.rows == plan.counts) or not value
                assert sum(bucket.rows.values()) == min(sum(each.rows.values()) for each in ladder) or value


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("latents", "levels"), [((96, 96), 4), ((64, 64), 4), ((128, 96), 3)])
def test_rectangles_are_compact(latents: Size, levels: int, seed: int) -> None:
    """Rectangles, of a few per cent to most of the picture, anywhere: as users draw them."""
    random = torch.Generator().manual_seed(seed)
    height, width = (int(side * (0.1 + 0.8 * float(torch.rand((), generator=random)))) for side in latents)
    top, left = (
        int((side - n) * float(torch.rand((), generator=random)))
        for side, n in zip(latents, (height, width), strict=True)
    )
    mask = torch.zeros(1, *latents, dtype=torch.bool)
    mask[:, top : top + height, left : left + width] = True
    plan, buckets, _ = planned(mask, copies=2, levels=levels, dense_below=16)
    assert buckets.choose(plan).name.endswith("compact")


def test_the_last_bucket_has_room_for_any_mask() -> None:
    plan, buckets, _ = planned(square_mask(0.1, (40, 24))[0][None], copies=2)
    last = buckets.ladder[-1]
    assert last.rows == {size: plan.batch * size[0] * size[1] for size in last.rows}
    assert last.halo == {taps: plan.batch * taps.source[0] * taps.source[1] for taps in last.halo}


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3, 0.6])
def test_isolated_pixels_have_room_for_little_more_than_they_need(share: float) -> None:
    """Noise at latent resolution, which any-pooling makes four times as much a level."""
    mask = torch.rand(1, 96, 96, generator=torch.Generator().manual_seed(0)) < share
    plan, buckets, _ = planned(mask, copies=2, levels=4, dense_below=16)
    rows = buckets.choose(plan).rows
    assert sum(rows.values()) <= 1.7 * sum(plan.counts.values())


@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(0, 8))
def test_a_plan_that_needs_more_never_takes_a_smaller_bucket(seed: int, side: int, more: int) -> None:
    random = torch.Generator().manual_seed(seed)
    small = torch.zeros(1, 40, 24, dtype=torch.bool)
    top, left = (int(torch.randint(0, n - 16, (), generator=random)) for n in (40, 24))
    small[:, top : top + side, left : left + side] = True
    large = small.clone()
    large[:, top : top + side + more, left : left + side + more] = True
    rooms = []
    for mask in (small, large):  # each with a ladder of its own
        plan, buckets, requests = planned(mask, copies=2)
        rooms.append((sum(buckets.choose(plan).rows.values()), {**plan.counts, **halos(plan, requests)}))
    (room, need), (larger_room, larger_need) = rooms
    if all(count <= larger_need[where] for where, count in need.items()):
        assert room <= larger_room


def test_what_one_bucket_holds_a_larger_one_holds() -> None:
    _, buckets, _ = planned(square_mask(0.1, (40, 24))[0][None], copies=2)
    for raggedness in RAGGEDNESS:
        of_class = [bucket for bucket in buckets.ladder if bucket.name.endswith(raggedness)]
        for small, large in pairwise(of_class):
            assert large.holds(small)
    assert not buckets.ladder[0].holds(largest(buckets))


def test_whole_levels_have_their_pixels_in_every_bucket() -> None:
    plan, buckets, _ = planned(square_mask(0.05, (40, 24))[0][None], copies=2, dense_below=16)
    whole = [size for size in plan.counts if min(size) < 16]
    assert whole == [(20, 12), (10, 6)]
    for bucket in buckets.ladder:
        assert all(bucket.rows[size] == 2 * size[0] * size[1] for size in whole)
    down = next(taps for taps in buckets.ladder[0].halo if taps.target == (20, 12))
    assert buckets.ladder[0].halo[down] == 2 * 40 * 24  # what the level reads above is the base's, nearly all of it
