"""Bases in host memory: what is taken there is what was recorded, and what is brought back is what was taken."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fisedit_compile.cache.host_tier as host_tier
from fisedit_compile.cache.host_tier import HostMemory, Staging, brought_to_host
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.cache.tensors_in_memory import Place, tensors_in
from fisedit_compile.ir.call import Signature
from fisedit_compile.ir.requests import CacheEntry

CPU = torch.device("cpu")
SIGNATURE = Signature("", (((1, 4, 8, 8), torch.float32, CPU),))


def call(seed: int, rows: int = 100, device: torch.device | str = CPU) -> Recorded:
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return (100 * torch.rand(shape, generator=generator)).to(dtype).to(device)

    kept = {
        CacheEntry("a", "map"): made(rows, 33, dtype=torch.uint8),
        CacheEntry("a", "scale"): made(2, 5, dtype=torch.float32),
        CacheEntry("b", "map"): made(rows, 3, 7, dtype=torch.float16),
        CacheEntry("c", "value"): made(dtype=torch.float64),
        CacheEntry("d", "attention"): made(rows, 2, 4, dtype=torch.bfloat16),
    }
    recorded = Recorded(SIGNATURE, (torch.tensor(seed),), kept)
    recorded.model = object()
    return recorded


def plain_call(seed: int) -> Recorded:
    """One that can be pickled."""
    recorded = call(seed)
    recorded.model = None
    return recorded


def assert_same(one: Recorded, other: Recorded) -> None:
    assert list(one) == list(other)
    assert (one.signature, one.timesteps, one.model) == (other.signature, other.timesteps, other.model)
    for entry, tensor in other.items():
        assert one[entry].dtype is tensor.dtype
        assert torch.equal(one[entry].cpu(), tensor.cpu())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_tier, "_CHUNK", 8192)


@pytest.fixture
def everything_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets one device stand for two."""
    monkeypatch.setattr(Staging, "_is_away", lambda self, cache: True)


def memories(cache: Recorded) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in cache.values()}


@pytest.mark.usefixtures("small_chunks")
def test_a_pickle_has_no_more_than_the_call() -> None:
    """Calls lie in memory that others share."""
    memory = HostMemory(CPU)
    taken = [memory.take(plain_call(seed)) for seed in range(3)]
    assert all(tensor.untyped_storage().nbytes() >= 8192 for tensor in taken[1].values())
    pickled = pickle.dumps(taken[1])
    assert len(pickled) < 2 * sum(tensor.nbytes for tensor in taken[1].values()) + 4096
    for again in (pickle.loads(pickled), copy.deepcopy(taken[1])):
        for entry, tensor in taken[1].items():
            assert torch.equal(again[entry], tensor)


def test_what_is_taken_is_what_was_recorded_in_few_pieces_of_memory() -> None:
    calls, host = [call(seed) for seed in range(5)], HostMemory(CPU)
    taken = [host.take(each) for each in calls]
    host.finish()
    for one, other in zip(taken, calls, strict=True):
        assert_same(one, other)
        assert not memories(one) & memories(other)
    assert len(set().union(*map(memories, taken))) < 10


def test_a_tensor_may_be_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_tier, "_CHUNK", 256)
    recorded = call(0)
    assert_same(HostMemory(CPU).take(recorded), recorded)


@pytest.mark.usefixtures("small_chunks", "everything_is_away")
@pytest.mark.parametrize("taken", [True, False])  # False: as a copy has it, each tensor in memory of its own
def test_calls_are_brought_in_any_order(taken: bool) -> None:
    calls, host, staging = [call(seed, 60 + 20 * seed) for seed in range(4)], HostMemory(CPU), Staging(CPU)
    away = [host.take(each) for each in calls] if taken else [copy.deepcopy(each) for each in calls]
    for each, original in zip(away, calls, strict=True):
        each.model = original.model
    orders = [(0, 1, 2, 3), (0, 1, 2, 3), (3, 3, 0, 2, 2, 1), (1,), (1, 0)]
    for order in orders:
        for place, i in enumerate(order):
            following = order[place + 1] if place + 1 < len(order) else None
            brought = staging.bring(away[i], None if following is None else away[following])
            assert_same(brought, calls[i])
            assert not memories(brought) & memories(away[i])
    for i, other in ((0, 3), (1, 2)):  # what comes is not always what was announced
        staging.bring(away[i], away[other])
        assert_same(staging.bring(away[i]), calls[i])


@pytest.mark.usefixtures("everything_is_away")
def test_a_call_lies_where_it_was_brought_until_the_one_behind_the_next() -> None:
    calls, staging = [call(seed) for seed in range(3)], Staging(CPU)
    first = staging.bring(calls[0], calls[1])
    second = staging.bring(calls[1])
    assert_same(first, calls[0])
    assert_same(second, calls[1])
    staging.bring(calls[2])
    assert_same(second, calls[1])
    assert staging.bring(calls[1]) is second  # known again, so that addresses need not be found again


@pytest.mark.usefixtures("everything_is_away")
def test_edits_within_inference_mode_and_without() -> None:
    staging = Staging(CPU)
    with torch.inference_mode():
        made = call(0)
        taken = HostMemory(CPU).take(made)
        assert_same(staging.bring(taken, taken), made)
    other = call(1)
    assert_same(staging.bring(other), other)
    assert_same(staging.bring(taken), made)


def test_what_lies_on_the_device_is_left_there() -> None:
    recorded = call(0)
    assert Staging(CPU).bring(recorded) is recorded
    nothing = HostMemory(CPU).take(recorded.with_values({}))
    assert Staging(CPU).bring(nothing) is nothing


@pytest.mark.usefixtures("everything_is_away")
def test_no_base_is_kept_alive() -> None:
    recorded, staging = call(0), Staging(CPU)
    staging.bring(recorded)
    gone = weakref.ref(recorded)
    del recorded
    gc.collect()
    assert gone() is None
    other = call(1)
    assert_same(staging.bring(other), other)


@pytest.mark.gpu
def test_between_a_gpu_and_the_host() -> None:
    device = torch.device("cuda", 0)
    calls, host, staging = [call(seed, 20000, device) for seed in range(4)], HostMemory(device), Staging(device)
    away = [host.take(each) for each in calls]
    host.finish()
    assert all(tensor.is_pinned() for each in away for tensor in each.values())
    busy = torch.rand(4096, 4096, device=device)
    for _ in range(3):
        sums = []
        for i, each in enumerate(away):
            brought = staging.bring(each, away[i + 1] if i + 1 < len(away) else None)
            for _ in range(20):
                busy = (busy @ busy).clamp(-1, 1)  # the step is behind the copies of later ones
            sums.append({entry: tensor.clone() for entry, tensor in brought.items()})
        for kept, each in zip(sums, calls, strict=True):
            assert all(torch.equal(kept[entry], each[entry]) for entry in each)
    unpinned = copy.deepcopy(away[0])
    unpinned.model = calls[0].model
    assert_same(staging.bring(unpinned), calls[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tensors_are_brought_to_one_piece_of_host_memory(device: str) -> None:
    """Also while others launch on the device, from a thread of its own, as bases are written."""
    wide = torch.randn(300, 200)
    tensors = [
        wide.to(device),
        wide.to(device).t(),
        wide.to(device, torch.bfloat16),
        wide.to(device, torch.float8_e4m3fn),
        (wide > 0).to(device),
        torch.complex(wide, wide).to(device).conj(),
        wide,
        torch.tensor(3, device=device),
    ]
    tensors.sort(key=lambda each: -each.dtype.itemsize)
    places, size = [], 0
    for each in tensors:
        places.append(Place(size, each.dtype, tuple(each.shape)))
        size += each.nbytes
    if device == "cuda":
        torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as threads:
        made = [threads.submit(brought_to_host, tensors, places, size) for _ in range(20)]
        for _ in range(100):
            wide.to(device).square().sum()
        for each in made:
            memory = each.result()
            assert memory.shape == (size,)
            for got, tensor in zip(tensors_in(memory, places), tensors, strict=True):
                want = tensor.resolve_conj().cpu().contiguous()
                assert torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))
