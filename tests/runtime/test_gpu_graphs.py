"""CUDA graphs of the sparse step: captured once for each bucket, and the same step on any stream and in any order."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

from fisedit_compile.architectures import build_unet, unet_inputs
from fisedit_compile.masks.sample_masks import square_mask
from fisedit_compile.sparse_unet import SparseUNet, sparsify
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.gpu

SHAPES = {"tiny": 512, "sd2": 768}
archs = pytest.mark.parametrize("arch", list(SHAPES))


class Bases:
    """A U-Net in bf16 on the GPU, two bases of it and a call of an edit of each: other latents, another prompt."""

    def __init__(self, arch: str, attention: str = "full", batch: int = 2, device: str = "cuda") -> None:
        unet = build_unet(arch, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        self.sparse: SparseUNet = sparsify(unet, {"attention": attention, "dense_above": 1.0})
        self.calls = [self.call(arch, batch, seed) for seed in range(4)]
        self.outs, self.caches = zip(*(self.sparse.record(call) for call in self.calls[:2]), strict=True)
        self.edits = self.calls[2:]
        self.program = self.sparse.program(self.calls[0])
        self.size: tuple[int, int] = self.program.signature.sample_shape[2:]  # type: ignore[assignment]

    def call(self, arch: str, batch: int, seed: int) -> Any:
        args, kwargs = unet_inputs(self.sparse.unet, batch=batch, height=SHAPES[arch], width=SHAPES[arch], seed=seed)
        return self.sparse.call(*args, **kwargs)

    def mask(self, share: float, down: int = 0) -> torch.Tensor:
        """A square, ``down`` rows below the middle."""
        return square_mask(share, self.size).roll(down, -2)

    def plan(self, mask: torch.Tensor) -> Any:
        return self.sparse.prepare(self.calls[0], mask)

    def step(self, prepared: Any, edit: int = 0, base: int = 0) -> torch.Tensor:
        return self.sparse.step(self.edits[edit], self.caches[base], prepared)


@cache
def bases(arch: str) -> Bases:
    return Bases(arch)


@contextlib.contextmanager
def without_host_syncs() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@archs
def test_calls_that_lie_alike_are_each_read_where_they_lie(arch: str) -> None:
    many = bases(arch)
    first, second = many.caches
    assert first.piece.layout is second.piece.layout
    assert first.piece.memory.data_ptr() != second.piece.memory.data_ptr()
    prepared = many.plan(many.mask(0.1))
    apart = [many.sparse.step(many.edits[0], copy.deepcopy(cache), prepared) for cache in (first, second)]
    assert torch.equal(many.step(prepared, base=0), apart[0])
    assert torch.equal(many.step(prepared, base=1), apart[1])
    assert not torch.equal(*apart)


@archs
def test_7_twenty_masks_record_nothing_once_their_buckets_are_known(arch: str) -> None:
    of = bases(arch)
    plans = [of.plan(of.mask(0.03 + 0.04 * number, number - 10)) for number in range(20)]
    buckets = {prepared.bucket: prepared for prepared in plans}
    for prepared in buckets.values():
        of.step(prepared)
    captures = of.program.captures
    assert len(buckets) <= captures  # those of other tests as well
    results = [of.step(prepared) for prepared in plans]
    assert of.program.captures == captures
    assert all(result.isfinite().all() for result in results)
    assert not any(torch.equal(a, b) for a, b in pairwise(results))


@archs
def test_a_step_does_not_wait_for_the_device(arch: str) -> None:
    """Nor do the first step of another edit, of another base, and the copies that they need."""
    of = bases(arch)
    first, second = of.plan(of.mask(0.1)), of.plan(of.mask(0.1, 3))
    assert first.bucket == second.bucket
    expected = of.step(first)
    with without_host_syncs():
        again = of.step(first)
        others = [of.step(second, edit, base) for edit in (0, 1) for base in (0, 1)]
    assert torch.equal(again, expected)
    assert all(other.isfinite().all() for other in others)


@archs
def test_a_step_on_another_stream_is_the_same(arch: str) -> None:
    of, side = bases(arch), torch.cuda.Stream()
    plans = [of.plan(of.mask(share)) for share in (0.1, 0.4)]
    expected = [of.step(prepared, edit) for edit, prepared in enumerate(plans)]
    results = []
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(3):  # on both in turn, with nothing of the caller's between
        for edit, prepared in enumerate(plans):
            with torch.cuda.stream(side if edit else torch.cuda.current_stream()):
                results.append((of.step(prepared, edit), expected[edit]))
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in results)


@archs
def test_6_edits_of_two_bases_take_turns(arch: str) -> None:
    of = bases(arch)
    masks = [of.mask(0.1), of.mask(0.12, 4), of.mask(0.45)]
    plans = [of.plan(mask) for mask in masks]
    keys = [(p, e, b) for p in range(3) for e in (0, 1) for b in (0, 1)]
    alone = {(p, e, b): of.step(of.plan(masks[p]), e, b) for p, e, b in keys}
    order = [keys[(7 * i) % len(keys)] for i in range(2 * len(keys))]
    results = [(of.step(plans[p], e, b), alone[p, e, b]) for p, e, b in order]
    assert all(torch.equal(*pair) for pair in results)  # each again, and none written to by a later step


@archs
def test_nothing_of_a_base_is_written_to(arch: str) -> None:
    of = bases(arch)
    held = [*of.caches[0].values(), of.outs[0], *of.edits[0].tensors]
    clones = [tensor.clone() for tensor in held]
    of.step(of.plan(of.mask(0.2)))
    assert all(map(torch.equal, held, clones))


def test_5_a_batch_of_four_edits_with_four_masks_gives_what_each_gives_alone() -> None:
    together, alone = Bases("tiny", batch=4), Bases("tiny", batch=1)
    masks = torch.cat(
        [
            together.mask(share, down).view(1, *together.size)
            for share, down in ((0.05, 9), (0.2, 0), (0.5, -6), (0.1, -20))
        ]
    )
    edited = together.step(together.plan(masks))
    alone.sparse.unet.load_state_dict(together.sparse.unet.state_dict())
    for i, mask in enumerate(masks):
        base, edit = (
            alone.sparse.call(*(t[i : i + 1] if t.ndim else t for t in together.calls[seed].tensors)) for seed in (0, 2)
        )
        _, kept = alone.sparse.record(base)
        assert_close(edited[i : i + 1], alone.sparse.step(edit, kept, alone.sparse.prepare(edit, mask[None])))


@pytest.mark.parametrize("moved", [False, True])
def test_a_changed_weight_counts_in_recorded_graphs(moved: bool) -> None:
    of = Bases("tiny")
    of.caches = tuple(map(dict, of.caches))  # plain mappings, which do not say which model they were recorded by
    old = of.step(of.plan(of.mask(0.2)))
    weights = [each.weight for each in of.sparse.unet.modules() if isinstance(each, torch.nn.Conv2d | torch.nn.Linear)]
    for weight in weights:
        if moved:
            weight.data = weight.data * 1.25
        else:
            weight.data *= 1.25
    new = of.step(of.plan(of.mask(0.2)))
    fresh = sparsify(of.sparse.unet, of.sparse.sparsity)
    expected = fresh.step(of.edits[0], of.caches[0], fresh.prepare(of.edits[0], of.mask(0.2)))
    assert not torch.equal(new, old)
    assert torch.equal(new, expected)


def test_a_device_other_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device: torch.cuda.device_count() is 1")
    assert torch.cuda.current_device() == 0
    here, there = Bases("tiny"), Bases("tiny", device="cuda:1")
    there.sparse.unet.load_state_dict(here.sparse.unet.state_dict())
    results = []
    for of in (here, there, here, there):
        results.append(of.step(of.plan(of.mask(0.2))))
    assert [result.device.index for result in results] == [0, 1, 0, 1]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert torch.cuda.current_device() == 0


def peak(run: Any) -> int:
    """Bytes that a call takes at most, beyond what is allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        out = run()
    torch.cuda.synchronize()
    del out
    return torch.cuda.max_memory_allocated() - before


def test_a_step_takes_less_memory_than_a_dense_call() -> None:
    """The first step of a bucket, which allocates its buffers and runs twice, as well as those after it."""
    of = Bases("sd2", attention="masked")
    dense = [peak(lambda: of.sparse.unet(**of.edits[0].kwargs).sample) for _ in range(2)][-1]
    prepared = of.plan(of.mask(0.05))
    first, later = peak(lambda: of.step(prepared)), peak(lambda: of.step(prepared))
    assert later <= first < dense
