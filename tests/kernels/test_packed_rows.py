"""Rows in few bits a value: the reference, the kernels in Triton's interpreter, and what a step reads of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.interpreter import MARKS
from support.random_rows import normal

from fisedit_compile.kernels.indexing.copy_rows import RowCopies
from fisedit_compile.kernels.indexing.packed_rows import mean_of_tiles, pack_rows_reference, unpack_rows_reference
from fisedit_compile.kernels.indexing.row_format import RowFormat

Pack = Callable[[torch.Tensor, int], torch.Tensor]
CHANNELS = [(320,), (960,), (5, 64), (8, 40), (2, 160), (96,), (8,), (3,), (1,), (129,), (2, 5)]


def triton_pack(rows: torch.Tensor, bits: int) -> torch.Tensor:
    from fisedit_compile.kernels.indexing.pack_rows_triton import pack_rows_triton

    return pack_rows_triton(rows, bits)


@pytest.fixture(params=[pack_rows_reference, pytest.param(triton_pack, marks=MARKS)], ids=["reference", "triton"])
def pack(request: pytest.FixtureRequest) -> Pack:
    return request.param


def half_step(rows: torch.Tensor, form: RowFormat) -> torch.Tensor:
    """Half of the step of each value's group, and what rounding the step to the rows' dtype may add."""
    flat = rows.reshape(len(rows), -1).float()
    halves = []
    for group in flat.split(form.group, 1):
        step = (group.amax(1) - group.amin(1)) / (2**form.bits - 1)
        halves.append((step * (0.5 + 2**form.bits * torch.finfo(rows.dtype).eps))[:, None].expand_as(group))
    rounding = torch.finfo(rows.dtype).eps * flat.abs()
    return (torch.cat(halves, 1) + rounding + 1e-6).view(rows.shape)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_no_value_is_off_by_more_than_half_a_step(
    pack: Pack, channels: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    rows = normal(19, *channels, dtype=dtype, seed=0)
    form = RowFormat(channels, dtype, bits)
    packed = pack(rows, bits)
    assert packed.shape == (19, form.nbytes)
    assert packed.dtype is torch.uint8
    again = unpack_rows_reference(packed, form)
    assert again.dtype is dtype
    assert again.shape == rows.shape
    assert ((again.float() - rows.float()).abs() <= half_step(rows, form)).all()


def test_sizes() -> None:
    half = torch.float16
    assert RowFormat((320,), half, 4).nbytes == 3 * 4 + 160  # 4.3 bits a value
    assert RowFormat((5, 64), half, 4).nbytes == 5 * 4 + 160
    assert RowFormat((320,), half, 2).nbytes == 3 * 4 + 80


@pytest.mark.parametrize("bits", [2, 4])
def test_ends_and_equal_values_are_exact(pack: Pack, bits: int) -> None:
    rows = torch.tensor([[1.5] * 8, [0.0] * 8, [-3.0, 5.0, 5.0, -3.0] * 2])
    form = RowFormat((8,), torch.float32, bits)
    torch.testing.assert_close(unpack_rows_reference(pack(rows, bits), form), rows)


def test_a_group_that_is_not_finite_is_not_a_number(pack: Pack) -> None:
    rows = normal(4, 256, dtype=torch.float32, seed=0)
    rows[1, 3], rows[2, 200] = float("nan"), float("inf")
    again = unpack_rows_reference(pack(rows, 4), RowFormat((256,), torch.float32, 4))
    assert again[1, :128].isnan().all()
    assert again[2, 128:].isnan().all()
    assert again[1, 128:].isfinite().all()
    assert again[[0, 3]].isfinite().all()


def test_a_slice_of_a_wider_product(pack: Pack) -> None:
    wide = normal(11, 3 * 64, dtype=torch.float16, seed=0)
    rows = wide[:, 64:128].unflatten(1, (2, 32))
    assert torch.equal(pack(rows, 4), pack(rows.contiguous(), 4))


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)])
def test_tiles(size: tuple[int, int]) -> None:
    form = RowFormat((2, 8), torch.float32, 4, size)
    pixels = 3 * size[0] * size[1]
    rows = normal(pixels, 2, 8, dtype=torch.float32, seed=0)
    means = mean_of_tiles(rows, size)
    assert len(means) == form.rows_of(pixels) == 3 * -(-size[0] // 2) * -(-size[1] // 2)
    row_of = form.row_of_each_pixel(pixels)
    assert row_of is not None
    expected = torch.stack([rows[row_of == i].mean(0) for i in range(len(means))])
    torch.testing.assert_close(means, expected)
    place = row_of.view(3, *size)
    assert (place[:, :2, :2] == place[:, :1, :1]).all()  # one tile


def test_no_rows(pack: Pack) -> None:
    assert pack(normal(0, 64, dtype=torch.float32, seed=0), 4).shape == (0, RowFormat((64,), torch.float32, 4).nbytes)


def loop(*arguments: object) -> Callable[[list[torch.Tensor]], None]:
    copies = RowCopies(*arguments)
    return lambda sources: copies.run(copies.addresses(sources))


def launch(targets: list, indices: list, counts: torch.Tensor, formats: list) -> Callable[[list[torch.Tensor]], None]:
    from fisedit_compile.kernels.indexing.copy_rows_triton import CopyLaunch
    from fisedit_compile.kernels.indexing.unpack_rows_triton import UnpackLaunch

    plain, packed = (each(targets, indices, counts, formats) for each in (CopyLaunch, UnpackLaunch))

    def run(sources: list[torch.Tensor]) -> None:
        addresses = plain.addresses(sources)
        plain.run(addresses)
        packed.run(addresses)

    return run


@pytest.mark.parametrize("kind", [loop, pytest.param(launch, marks=MARKS)], ids=["loop", "launch"])
@pytest.mark.parametrize("bits", [2, 4])
def test_copies_unpack(kind: Callable[..., Callable[[list[torch.Tensor]], None]], bits: int) -> None:
    rows = [
        normal(50, 320, dtype=torch.float16, seed=1),
        normal(40, 2, 40, dtype=torch.float16, seed=2),
        normal(30, 7, dtype=torch.float32, seed=3),
        normal(20, 16, dtype=torch.float32, seed=4),
    ]
    indices = [torch.tensor([0, 3, 49, 7, 0]), None, torch.tensor([29, 1, 1]), None]
    counts = torch.tensor([4, 40, 2, 20], dtype=torch.int32)
    formats: list[RowFormat | None] = [RowFormat(tuple(each.shape[1:]), each.dtype, bits) for each in rows]
    formats[3] = None
    sources = [
        each if form is None else pack_rows_reference(each, bits) for each, form in zip(rows, formats, strict=True)
    ]
    targets = [
        torch.full((len(each) if index is None else len(index), *each.shape[1:]), -7, dtype=each.dtype)
        for each, index in zip(rows, indices, strict=True)
    ]
    kind(targets, indices, counts, formats)(sources)
    for target, source, index, count, form in zip(targets, sources, indices, counts.tolist(), formats, strict=True):
        whole = source if form is None else unpack_rows_reference(source, form)
        if index is None:
            torch.testing.assert_close(target, whole)
        else:
            torch.testing.assert_close(target[:count], whole[index[:count]])
            assert (target[count:] == -7).all()


def test_refuses_rows_of_another_format() -> None:
    form = RowFormat((8,), torch.float32, 4)
    copies = RowCopies([torch.zeros(2, 8)], [None], torch.ones(1, dtype=torch.int32), [form])
    for source in (torch.zeros(2, 8), torch.zeros(2, form.nbytes + 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="contiguous one that fits"):
            copies.addresses([source])
