"""Operations of one thread run alone, and other threads keep their number."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from fisedit_compile.utils.single_thread import single_thread

Result = TypeVar("Result")


def in_a_new_thread(function: Callable[[], Result]) -> Result:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_the_calling_thread_alone_is_set_and_set_back() -> None:
    with single_thread():
        assert torch.get_num_threads() == 1
        assert in_a_new_thread(torch.get_num_threads) == 2  # new to torch: starts with the number of all
        with single_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), single_thread():
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_thread_that_is_new_to_torch_keeps_its_number_afterwards() -> None:
    def use() -> tuple[int, int]:
        with single_thread():
            inside = torch.get_num_threads()
        return inside, torch.get_num_threads()

    assert in_a_new_thread(use) == (1, 2)
