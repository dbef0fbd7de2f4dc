"""Many copies in one launch: in Triton's interpreter, and the loop that stands for it without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.interpreter import MARKS
from support.random_rows import normal

from fisedit_compile.kernels.indexing.copy_rows import RowCopies
from fisedit_compile.kernels.indexing.copy_tensors import PartCopies, TensorCopies, launches

Run = Callable[[list[torch.Tensor], list[torch.Tensor | None], torch.Tensor, list[torch.Tensor]], None]


def loop(targets: list[torch.Tensor], indices: list, counts: torch.Tensor, sources: list[torch.Tensor]) -> None:
    copies = RowCopies(targets, indices, counts)
    copies.run(copies.addresses(sources))


def launch(targets: list[torch.Tensor], indices: list, counts: torch.Tensor, sources: list[torch.Tensor]) -> None:
    from fisedit_compile.kernels.indexing.copy_rows_triton import CopyLaunch

    copies = CopyLaunch(targets, indices, counts, [None] * len(targets))
    copies.run(copies.addresses(sources))


@pytest.fixture(params=[loop, pytest.param(launch, marks=MARKS)], ids=["loop", "launch"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.param


@pytest.mark.parametrize("shift", [0, 3])  # addresses that are no multiple of 16 bytes
def test_rows_and_whole_tensors_of_several_dtypes(run: Run, shift: int) -> None:
    def fresh(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        flat = torch.full((torch.Size(shape).numel() + shift,), -7, dtype=dtype)
        return flat[shift:].view(shape)

    sources = [
        normal(50, 40, dtype=torch.float16, seed=1),
        normal(7, 3, 300, dtype=torch.float32, seed=2),
        normal(2, 320, dtype=torch.float32, seed=3),
        normal(30, 4, dtype=torch.bfloat16, seed=4),
        normal(5, dtype=torch.float64, seed=5),
        normal(0, 16, dtype=torch.float32, seed=6),
    ]
    indices = [torch.tensor([0, 3, 49, 7, 7, 0, 0]), torch.tensor([6, 0]), None, None, torch.tensor([4]), None]
    counts = torch.tensor([5, 2, 2, 30, 0, 0], dtype=torch.int32)
    lengths = [len(s) if index is None else len(index) for s, index in zip(sources, indices, strict=True)]
    targets = [fresh(n, *s.shape[1:], dtype=s.dtype) for n, s in zip(lengths, sources, strict=True)]
    before = [source.clone() for source in sources]
    run(targets, indices, counts, sources)
    for target, source, index, count in zip(targets, sources, indices, counts.tolist(), strict=True):
        if index is None:
            assert torch.equal(target, source)
        else:
            assert torch.equal(target[:count], source[index[:count]])
            assert (target[count:] == -7).all()  # padding is left as it is
    assert all(map(torch.equal, sources, before))


def test_other_sources_and_counts_the_next_time() -> None:
    target, index, counts = torch.zeros(4, 8), torch.tensor([3, 2, 1, 0]), torch.tensor([4], dtype=torch.int32)
    copies = RowCopies([target], [index], counts)
    for seed, real in ((1, 4), (2, 2)):
        counts.fill_(real)
        source = normal(5, 8, dtype=torch.float32, seed=seed)
        copies.run(copies.addresses([source]))
        assert torch.equal(target[:real], source[index[:real]])


def test_refuses_what_does_not_fit() -> None:
    counts = torch.ones(1, dtype=torch.int32)
    copies = RowCopies([torch.zeros(2, 4)], [None], counts)
    for source in (torch.zeros(3, 4), torch.zeros(2, 5), torch.zeros(2, 4).double(), torch.zeros(4, 2).t()):
        with pytest.raises(ValueError, match="contiguous one that fits"):
            copies.addresses([source])
    with pytest.raises(ValueError, match="give one for each"):
        copies.addresses([])
    with pytest.raises(ValueError, match="not contiguous"):
        RowCopies([torch.zeros(4, 2).t()], [None], counts)
    with pytest.raises(ValueError, match="give as many of each"):
        RowCopies([], [None], counts)


SHAPES = [((3, 40), torch.float16), ((2, 5), torch.uint8), ((7,), torch.float32), ((0, 4), torch.float32)]


def copied_by_launches(sources: list[torch.Tensor]) -> list[torch.Tensor]:
    """As :class:`TensorCopies` copies on a GPU."""
    copies = TensorCopies(sources)
    first, memory = copies._memory(), copies._memory()
    for each, some in launches(copies._targets(first)):
        each.run(each.addresses([sources[i] for i in some]), moved=memory.data_ptr() - first.data_ptr())
    return copies._targets(memory)


def copied_by_loop(sources: list[torch.Tensor]) -> list[torch.Tensor]:
    copies = TensorCopies(sources)
    memory = copies.copy()
    assert memory.shape == (copies.nbytes,)
    return copies._targets(memory)


@pytest.mark.parametrize("copy", [copied_by_loop, pytest.param(copied_by_launches, marks=MARKS)])
def test_tensors_are_copied_into_one_piece(copy: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> None:
    sources = [torch.arange(torch.Size(shape).numel()).to(dtype).view(shape) for shape, dtype in SHAPES]
    made = copy(sources)
    assert all(map(torch.equal, made, sources))
    for each in sources:
        each.add_(1)
    assert not any(torch.equal(one, other) for one, other in zip(made, sources, strict=True) if len(one))
    assert all(map(torch.equal, copy(sources), sources))


def test_a_tensor_that_does_not_fit_is_copied_by_itself() -> None:
    for source in (torch.zeros(4, 4)[:, :2], torch.zeros(5)[1:]):
        with pytest.raises(ValueError, match="copy it by itself"):
            TensorCopies([source])


def parted_by_launches(targets: list[list[torch.Tensor]], sources: list[torch.Tensor]) -> None:
    """As :class:`PartCopies` copies on a GPU."""
    copies = PartCopies(targets)
    copies._launches = launches([part for parts in targets for part in parts])
    copies.run(copies.addresses(sources))


def parted_by_loop(targets: list[list[torch.Tensor]], sources: list[torch.Tensor]) -> None:
    copies = PartCopies(targets)
    copies.run(copies.addresses(sources))


@pytest.mark.parametrize("copy", [parted_by_loop, pytest.param(parted_by_launches, marks=MARKS)])
def test_parts_go_each_to_a_place_of_its_own(
    copy: Callable[[list[list[torch.Tensor]], list[torch.Tensor]], None],
) -> None:
    shapes = [((6, 40), torch.float16, 2), ((3, 5), torch.uint8, 3), ((7,), torch.float32, 1), ((0, 4), torch.int64, 1)]
    sources = [torch.arange(torch.Size(shape).numel()).to(dtype).view(shape) for shape, dtype, _ in shapes]
    rooms = [torch.full((len(source) + 4, *source.shape[1:]), 9, dtype=source.dtype) for source in sources]
    targets, wanted = [], []
    for source, room, (*_, parts) in zip(sources, rooms, shapes, strict=True):
        rows = len(source) // parts
        starts = [k * (rows + 1) for k in range(parts)]  # with a row between each two
        targets.append([room[start : start + rows] for start in starts])
        want = room.clone()
        for start, part in zip(starts, source.split(rows) if rows else [source], strict=True):
            want[start : start + rows] = part
        wanted.append(want)
    number, place = torch.tensor(3.0), torch.zeros(())
    copy([*targets, [place]], [*sources, number])
    assert all(map(torch.equal, [*rooms, place], [*wanted, number]))


@pytest.mark.parametrize(
    "source", [torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(4, 4).double(), torch.zeros(4, 8)[:, ::2]]
)
def test_a_source_that_does_not_fit_its_parts_is_refused(source: torch.Tensor) -> None:
    room = torch.zeros(8, 4)
    with pytest.raises(ValueError, match="contiguous one that fits"):
        PartCopies([[room[:2], room[4:6]]]).addresses([source])
