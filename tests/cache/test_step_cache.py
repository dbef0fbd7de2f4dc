"""A cache is held to what the sparse graph reads of it, once."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.errors import BaseMismatchError

if TYPE_CHECKING:
    from support.unets import UNets

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (13, 10)


@pytest.fixture
def made(unets: UNets) -> tuple[Any, Any, Recorded]:
    """The program of a micro U-Net, a call of it, and a cache of its own for each test."""
    sparse = unets.sparse("micro")
    call = unets.call(sparse, "micro", 2, SIZE)
    return sparse.program(call), call, sparse.record(call)[1]


def test_what_is_described_is_what_is_recorded(made: tuple[Any, Any, Recorded]) -> None:
    program, _, cache = made
    assert {entry: (kept.shape, kept.dtype) for entry, kept in cache.items()} == program.cache.shapes
    assert {entry.kind for entry in cache} == {"map", "scale", "shift", "value", "tiles"}


def test_a_recorded_cache_is_held_to_its_timestep_each_time(made: tuple[Any, Any, Recorded]) -> None:
    program, call, cache = made
    for _ in range(2):
        program.cache.check(cache, call.signature, (torch.tensor(500),))
        with pytest.raises(BaseMismatchError, match=r"at timestep 480, the recorded one was at 500: a sparse step"):
            program.cache.check(cache, call.signature, (torch.tensor(480),))
    program.cache.check(cache, call.signature, (None,))  # on a device: reading it would wait


def test_a_recorded_cache_cannot_be_written_to_and_survives_copies(made: tuple[Any, Any, Recorded]) -> None:
    program, call, cache = made
    entry = next(iter(cache))
    with pytest.raises(TypeError):
        cache[entry] = torch.zeros(1)  # type: ignore[index]
    program.cache.check(cache, call.signature, ())
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert twin.signature == cache.signature
        assert list(twin) == list(cache)
        assert all(torch.equal(twin[entry], cache[entry]) for entry in cache)
        program.cache.check(twin, call.signature, ())


def test_the_memory_of_a_call_is_known_before_it_is_recorded(made: tuple[Any, Any, Recorded]) -> None:
    program, _, cache = made
    nbytes = program.lowered.kept.record_nbytes(samples=1, activations=True, attention=False)
    assert nbytes == sum(kept.nbytes for kept in cache.values())


@pytest.mark.parametrize("kind", ["map", "scale", "shift", "value"])
def test_what_is_missing_or_of_another_form_is_named(made: tuple[Any, Any, Recorded], kind: str) -> None:
    program, call, cache = made
    entry = next(entry for entry in cache if entry.kind == kind)
    less = {each: kept for each, kept in cache.items() if each != entry}
    with pytest.raises(BaseMismatchError, match=rf"nothing for {entry.node} and 0 more: record the call with"):
        program.cache.check(less, call.signature, ())
    for other in (cache[entry].half(), cache[entry][:1]):
        with pytest.raises(BaseMismatchError, match=rf"the cache holds {entry.node} as .*, this call reads "):
            program.cache.check({**cache, entry: other}, call.signature, ())
    program.cache.check(dict(cache), call.signature, ())


def test_a_cache_of_another_batch_or_size_is_refused(unets: UNets, made: tuple[Any, Any, Recorded]) -> None:
    program, call, _ = made
    sparse = unets.sparse("micro")
    for batch, size in ((1, SIZE), (2, (16, 16))):
        _, other = sparse.record(unets.call(sparse, "micro", batch, size))
        with pytest.raises(BaseMismatchError, match=r"the cache is of a call with latents .*, not .*: record this one"):
            program.cache.check(other, call.signature, ())
