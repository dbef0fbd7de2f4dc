"""Tensors that lie in one piece of memory."""

from __future__ import annotations

import pytest
import torch

from fisedit_compile.cache.tensors_in_memory import Place, tensors_in


def test_tensors_are_where_they_lie_and_share_the_memory() -> None:
    memory = torch.zeros(1000, dtype=torch.uint8)[64:]
    places = [
        Place(0, torch.float32, (2, 3)),
        Place(32, torch.bfloat16, ()),
        Place(48, torch.uint8, (3, 0, 2)),
        Place(48, torch.int64, (5, 1, 2)),
        Place(144, torch.float8_e4m3fn, (7,)),
    ]
    tensors = tensors_in(memory, places)
    assert [(each.dtype, tuple(each.shape)) for each in tensors] == [(each.dtype, each.shape) for each in places]
    assert all(each.is_contiguous() for each in tensors)
    for number, (tensor, place) in enumerate(zip(tensors, places, strict=True)):
        tensor.fill_(number + 1)
        there = memory[place.start : place.start + tensor.nbytes]
        assert torch.equal(there, tensor.reshape(-1).view(torch.uint8))
        assert tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


def test_memory_that_is_no_multiple_of_an_element_is_used_to_its_end() -> None:
    memory = torch.arange(24, dtype=torch.uint8)
    first, last = tensors_in(memory[:19], [Place(0, torch.int64, (2,)), Place(16, torch.uint8, (3,))])
    assert torch.equal(last, memory[16:19])
    assert torch.equal(first.view(torch.uint8), memory[:16])


def test_nothing_lies_beyond_the_memory() -> None:
    storage = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="out of bounds"):
        tensors_in(storage, [Place(32, torch.float32, (100,))])
