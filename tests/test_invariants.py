"""The invariants of the sparse step, on whole U-Nets: what it may compute anew, and what it has to leave alone.

Bits are compared where nothing may be computed (outside the mask, an empty mask), within the table of tolerances where
the same numbers are reached another way. Most tests run the smallest U-Net that has every kind of layer, in fp64, over
odd sizes and batches with their own masks; the Stable Diffusion shapes and the other dtypes follow at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_masks import masks, outside, same_bits
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.macs.counter import MacCounter
from fisedit_compile.sparse_unet import sparsify
from fisedit_compile.testing import assert_close

if TYPE_CHECKING:
    from support.unets import UNets

pytestmark = pytest.mark.usefixtures("one_thread")

#: (U-Net batch, samples with a mask of their own, latent size): guidance (n < B), odd and non-square sizes.
CASES = [(2, 1, (16, 16)), (1, 1, (13, 10)), (4, 2, (13, 10)), (3, 3, (17, 24))]
#: (attention, dense_below): everything sparse, or the lower resolution dense within.
REGIONS = [("full", 4), ("masked", 4), ("full", 10)]

#: Each case where everything is sparse; samples with masks of their own where attention is masked; an even and an odd
#: size where the lower resolution is dense.
PAIRS = [
    *((*REGIONS[0], *case) for case in CASES),
    *((*REGIONS[1], *case) for case in CASES[2:]),
    *((*REGIONS[2], *case) for case in CASES[::2]),
]

_NAMES = ("attention", "dense_below", "batch", "n", "size")
pairs = pytest.mark.parametrize(_NAMES, PAIRS)
pairs_of_full_attention = pytest.mark.parametrize(_NAMES, [pair for pair in PAIRS if pair[0] == "full"])
regions = pytest.mark.parametrize(("attention", "dense_below"), REGIONS)


def with_maps(cache: Mapping[CacheEntry, torch.Tensor], value: float) -> dict[CacheEntry, torch.Tensor]:
    """The cache with every map replaced by a constant; the statistics stay."""
    return {entry: torch.full_like(kept, value) if entry.kind == "map" else kept for entry, kept in cache.items()}


@pairs
def test_1_with_a_full_mask_the_sparse_graph_is_the_dense_unet(
    unets: UNets, attention: str, dense_below: int, batch: int, n: int, size: tuple[int, int]
) -> None:
    sparse = unets.sparse("micro", torch.float64, attention, dense_below)
    args, kwargs = unets.inputs("micro", batch, size)
    base = unets.recorded(sparse, "micro", batch, size)
    prepared = sparse.prepare(base.call, torch.ones(n, *size, dtype=torch.bool))
    out = sparse.step(base.call, with_maps(base.cache, torch.nan), prepared)
    assert_close(out, sparse.unet(*args, **kwargs).sample)


@pairs
def test_1_also_for_other_inputs_than_the_base_s(
    unets: UNets, attention: str, dense_below: int, batch: int, n: int, size: tuple[int, int]
) -> None:
    """Nothing of the base is left then, its norms' statistics neither."""
    sparse = unets.sparse("micro", torch.float64, attention, dense_below)
    base, edit = unets.recorded(sparse, "micro", batch, size), unets.call(sparse, "micro", batch, size, 1)
    args, kwargs = edit.split()
    prepared = sparse.prepare(edit, torch.ones(n, *size, dtype=torch.bool))
    out = sparse.step(edit, with_maps(base.cache, torch.nan), prepared)
    assert_close(out, sparse.unet(*args, **kwargs).sample)


@pairs_of_full_attention
def test_2_unchanged_inputs_reproduce_the_base(
    unets: UNets, attention: str, dense_below: int, batch: int, n: int, size: tuple[int, int]
) -> None:
    sparse = unets.sparse("micro", torch.float64, attention, dense_below)
    base = unets.recorded(sparse, "micro", batch, size)

    @given(masks(n, size))
    def reproduces(mask: torch.Tensor) -> None:
        assert_close(sparse.step(base.call, base.cache, sparse.prepare(base.call, mask)), base.out)

    reproduces()


@pairs
def test_3_an_empty_mask_is_the_base_bit_for_bit(
    unets: UNets, attention: str, dense_below: int, batch: int, n: int, size: tuple[int, int]
) -> None:
    sparse = unets.sparse("micro", torch.float64, attention, dense_below)
    base, edit = unets.recorded(sparse, "micro", batch, size), unets.call(sparse, "micro", batch, size, 1)
    prepared = sparse.prepare(edit, torch.zeros(n, *size, dtype=torch.bool))
    assert same_bits(sparse.step(edit, base.cache, prepared), base.out)


@pairs
def test_4_outside_the_mask_are_the_base_s_bits_and_inside_are_new_values(
    unets: UNets, attention: str, dense_below: int, batch: int, n: int, size: tuple[int, int]
) -> None:
    sparse = unets.sparse("micro", torch.float64, attention, dense_below)
    base, edit = unets.recorded(sparse, "micro", batch, size), unets.call(sparse, "micro", batch, size, 1)

    @given(masks(n, size))
    def leaves_the_outside(mask: torch.Tensor) -> None:
        out = sparse.step(edit, base.cache, sparse.prepare(edit, mask))
        kept = outside(mask, batch)
        assert out.shape == base.out.shape
        assert out.isfinite().all()
        assert same_bits(out.movedim(1, 3)[kept], base.out.movedim(1, 3)[kept])
        assert (out != base.out).movedim(1, 3)[~kept].all()

    leaves_the_outside()


@pairs
def test_maps_are_not_read_where_they_are_computed_anew(
    unets: UNets, attention: str, dense_below: int, batch: int, n: int, size: tuple[int, int]
) -> None:
    """Of a base's map only what lies outside the mask of its own resolution counts, so a halo of it is enough."""
    sparse = unets.sparse("micro", torch.float64, attention, dense_below)
    base, edit = unets.recorded(sparse, "micro", batch, size), unets.call(sparse, "micro", batch, size, 1)
    sizes = {batch * h * w: (h, w) for h, w in (size, (-(-size[0] // 2), -(-size[1] // 2)))}

    @given(masks(n, size))
    def ignores_active_pixels(mask: torch.Tensor) -> None:
        poisoned = dict(base.cache)
        for entry, kept in base.cache.items():
            if entry.kind == "map":
                pooled = F.adaptive_max_pool2d(mask[:, None].double(), sizes[len(kept)])
                active = pooled.bool().repeat(batch // n, 1, 1, 1).flatten()
                poisoned[entry] = kept.masked_fill(active.view(-1, *[1] * (kept.ndim - 1)), torch.nan)
        prepared = sparse.prepare(edit, mask)
        assert same_bits(sparse.step(edit, poisoned, prepared), sparse.step(edit, base.cache, prepared))

    ignores_active_pixels()


@pytest.mark.parametrize(_NAMES, [pair for pair in PAIRS if pair[3] > 1])
def test_5_a_batch_of_different_masks_gives_what_each_sample_gives_alone(
    unets: UNets, attention: str, dense_below: int, batch: int, n: int, size: tuple[int, int]
) -> None:
    sparse = unets.sparse("micro", torch.float64, attention, dense_below)
    base, edit = unets.recorded(sparse, "micro", batch, size), unets.call(sparse, "micro", batch, size, 1)

    def alone(b: int, seed: int) -> Any:
        (sample, timestep, text), _ = unets.inputs("micro", batch, size, torch.float64, seed)
        return sparse.call(sample[b : b + 1], timestep, text[b : b + 1])

    caches = [sparse.record(alone(b, 0))[1] for b in range(batch)]
    edits = [alone(b, 1) for b in range(batch)]

    @settings(max_examples=6)
    @given(masks(n, size))
    def samples_are_independent(mask: torch.Tensor) -> None:
        together = sparse.step(edit, base.cache, sparse.prepare(edit, mask))
        for b, (call, kept) in enumerate(zip(edits, caches, strict=True)):
            assert_close(together[b : b + 1], sparse.step(call, kept, sparse.prepare(call, mask[b % n][None])))

    samples_are_independent()


@pairs
def test_6_plans_and_prompts_of_one_base_take_turns_and_nothing_is_written_to(
    unets: UNets, attention: str, dense_below: int, batch: int, n: int, size: tuple[int, int]
) -> None:
    sparse = unets.sparse("micro", torch.float64, attention, dense_below)
    base = unets.recorded(sparse, "micro", batch, size)
    edits = [unets.call(sparse, "micro", batch, size, seed) for seed in (1, 2)]
    before = [*base.cache.values(), base.out, *(tensor for edit in edits for tensor in edit.tensors)]
    clones = [tensor.clone() for tensor in before]

    @settings(max_examples=5)
    @given(masks(n, size), masks(n, size), st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=6))
    def turns_do_not_matter(first: torch.Tensor, second: torch.Tensor, turns: list[tuple[int, int]]) -> None:
        chosen = [first, second]
        alone = [
            [sparse.step(edit, base.cache, sparse.prepare(edit, mask)) for edit in edits] for mask in chosen
        ]  # a plan for each
        shared = [sparse.prepare(edits[0], mask) for mask in chosen]
        for plan, edit in turns:
            out = sparse.step(edits[edit], base.cache, shared[plan])
            assert same_bits(out, alone[plan][edit])
            out.fill_(torch.nan)  # a result belongs to the caller
        assert all(map(same_bits, before, clones))
        assert all(map(same_bits, chosen, (first, second)))

    turns_do_not_matter()


@pytest.mark.parametrize(("batch", "n", "size"), CASES[1:3])
def test_whole_blocks_keep_the_invariants_outside_their_union(
    unets: UNets, batch: int, n: int, size: tuple[int, int]
) -> None:
    """``blocks="paper"`` recomputes more than the mask; what lies outside that too is the base's."""
    whole = unets.sparse("micro", torch.float64, "full", 4)
    sparse = sparsify(whole.unet, dataclasses.replace(whole.sparsity, blocks="paper"))
    base, edit = unets.recorded(whole, "micro", batch, size), unets.call(whole, "micro", batch, size, 1)

    @settings(max_examples=8)
    @given(masks(n, size))
    def holds(mask: torch.Tensor) -> None:
        prepared = sparse.prepare(edit, mask)
        kept = ~prepared.plan.active(size)
        assert not kept[~outside(mask, batch)].any()
        assert_close(sparse.step(base.call, base.cache, prepared), base.out)
        out = sparse.step(edit, base.cache, prepared)
        assert same_bits(out.movedim(1, 3)[kept], base.out.movedim(1, 3)[kept])
        assert (out != base.out).movedim(1, 3)[~kept].all()

    holds()


def test_a_prompt_written_to_in_place_is_seen(unets: UNets) -> None:
    sparse, size = unets.sparse("micro", torch.float64, "full", 4), (13, 10)
    base = unets.recorded(sparse, "micro", 1, size)
    (sample, timestep, text), _ = unets.inputs("micro", 1, size, torch.float64, 1)
    text = text.clone()
    call = sparse.call(sample, timestep, text)
    mask = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)) < 0.3
    prepared = sparse.prepare(call, mask)
    first = sparse.step(call, base.cache, prepared)
    text.mul_(2)
    second = sparse.step(call, base.cache, prepared)
    assert not torch.equal(first, second)
    assert same_bits(second, sparse.step(call, base.cache, sparse.prepare(call, mask)))


def test_outside_editing_the_unet_is_the_dense_one(unets: UNets) -> None:
    sparse = unets.sparse("micro", torch.float64, "full", 4)
    args, kwargs = unets.inputs("micro", 2, (16, 16))
    base = unets.recorded(sparse, "micro", 2, (16, 16))
    sparse.step(base.call, base.cache, sparse.prepare(base.call, torch.ones(1, 16, 16, dtype=torch.bool)))
    dense = unets.dense("micro", torch.float64)(*args, **kwargs)
    assert same_bits(sparse(*args, **kwargs).sample, dense.sample)
    assert same_bits(sparse(*args, **kwargs, return_dict=False)[0], dense.sample)
    assert_close(base.out, dense.sample)
    assert (sparse.config, sparse.dtype) == (sparse.unet.config, torch.float64)


#: Attention of SD 2 differs from that of SDXL by the number of layers alone.
SHAPES = [(arch, attention) for arch in ("tiny-sd15", "tiny", "tiny-sdxl") for attention in ("full", "masked")]
SHAPES.remove(("tiny", "masked"))


@pytest.mark.parametrize(("arch", "attention"), SHAPES)
def test_stable_diffusion_shapes(unets: UNets, arch: str, attention: str) -> None:
    """Invariants 1 to 4 for SD 1.5, SD 2 and SDXL: three resolutions, fp32, a height that is odd on the way down."""
    batch, n, size = 2, 1, (18, 12)
    sparse = unets.sparse(arch, torch.float32, attention, 3)
    args, kwargs = unets.inputs(arch, batch, size, torch.float32)
    base, edit = unets.recorded(sparse, arch, batch, size), unets.call(sparse, arch, batch, size, 1)
    everything = sparse.prepare(base.call, torch.ones(n, *size, dtype=torch.bool))
    out = sparse.step(base.call, with_maps(base.cache, torch.nan), everything)
    assert_close(out, sparse.unet(*args, **kwargs).sample)

    @settings(max_examples=8)
    @given(masks(n, size))
    def holds(mask: torch.Tensor) -> None:
        prepared, kept = sparse.prepare(base.call, mask), outside(mask, batch)
        if attention == "full":
            assert_close(sparse.step(base.call, base.cache, prepared), base.out)
        edited = sparse.step(edit, base.cache, prepared)
        assert same_bits(edited.movedim(1, 3)[kept], base.out.movedim(1, 3)[kept])

    holds()


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [  # masked attention in fp32 is above
        *(("full", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        *(("masked", dtype) for dtype in (torch.float16, torch.bfloat16)),
    ],
    ids=str,
)
def test_dtypes(unets: UNets, dtype: torch.dtype, attention: str) -> None:
    """Invariants 1 to 4 in the dtypes that people run; numbers are held to the same U-Net in fp64."""
    batch, n, size = 2, 2, (13, 10)
    sparse = unets.sparse("micro", dtype, attention, 4)
    base, edit = unets.recorded(sparse, "micro", batch, size), unets.call(sparse, "micro", batch, size, 1)
    exact = unets.fresh("micro", dtype).double()
    args, _ = unets.inputs("micro", batch, size, dtype)
    reference = exact(*(arg.double() if arg.is_floating_point() else arg for arg in args)).sample

    everything = sparse.prepare(base.call, torch.ones(n, *size, dtype=torch.bool))
    out = sparse.step(base.call, with_maps(base.cache, torch.nan), everything)
    assert out.dtype == dtype
    assert_close(out, reference)

    @settings(max_examples=8)
    @given(masks(n, size))
    def holds(mask: torch.Tensor) -> None:
        prepared, kept = sparse.prepare(base.call, mask), outside(mask, batch)
        if attention == "full":
            assert_close(sparse.step(base.call, base.cache, prepared), reference)
        edited = sparse.step(edit, base.cache, prepared)
        assert same_bits(edited.movedim(1, 3)[kept], base.out.movedim(1, 3)[kept])
        assert edited.isfinite().all()

    holds()


class TestCompiled:
    """Invariant 7. Dynamo's guards decide on recompiling whatever the code generator, so none is run."""

    SIZE = (16, 16)

    @pytest.fixture(scope="class")
    def compiled(self, unets: UNets) -> Iterator[tuple[Callable[[torch.Tensor], torch.Tensor], Any, Any]]:
        """(a step for a mask, the same step uncompiled, the counter of compiled graphs), after a warm-up of 4 masks."""
        counter = CompileCounterWithBackend("aot_eager")
        eager = unets.sparse("micro", torch.float64, "full", 4)
        base, edit = (unets.recorded(eager, "micro", 2, self.SIZE), unets.call(eager, "micro", 2, self.SIZE, 1))
        torch._dynamo.reset()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", partial(torch.compile, backend=counter))
            sparse = sparsify(eager.unet, dataclasses.replace(eager.sparsity, compile=True))
            sparse.program(edit)

        def step(of: Any, mask: torch.Tensor) -> torch.Tensor:
            return of.step(edit, base.cache, of.prepare(edit, mask))

        for density in (0.01, 0.05, 0.3, 0.6):  # small and large ones, which have graphs of their own
            step(sparse, self.random(density, 0))
        yield partial(step, sparse), partial(step, eager), counter
        torch._dynamo.reset()

    def random(self, density: float, seed: int) -> torch.Tensor:
        return torch.rand(2, *self.SIZE, generator=torch.Generator().manual_seed(seed)) < density

    def test_7_twenty_masks_recompile_nothing_after_warm_up(self, compiled: Any) -> None:
        step, eager, counter = compiled
        graphs = counter.frame_count
        assert graphs > 0
        chosen = [self.random(0.03 + 0.04 * number, number) for number in range(16)]
        for corner in range(4):  # blocks, the same for all samples or of one sample alone
            block = torch.zeros(1 + corner % 2, *self.SIZE, dtype=torch.bool)
            block[-1, corner : 4 + 2 * corner, 2:9] = True
            chosen.append(block)
        for mask in chosen:
            assert_close(step(mask), eager(mask))
        assert counter.frame_count == graphs

    def test_7_nor_do_masks_without_rows_or_without_a_halo(self, compiled: Any) -> None:
        step, eager, counter = compiled
        graphs = counter.frame_count
        empty = torch.zeros(2, *self.SIZE, dtype=torch.bool)
        pixel = empty.clone()
        pixel[0, 3, 3] = True
        for mask in (empty, ~empty, pixel):
            assert_close(step(mask), eager(mask))
        assert counter.frame_count == graphs


@regions
def test_macs_grow_with_the_mask_up_to_those_of_the_dense_unet(unets: UNets, attention: str, dense_below: int) -> None:
    sparse, size = unets.sparse("micro", torch.float64, attention, dense_below), (13, 10)
    call = unets.call(sparse, "micro", 4, size)
    counter = MacCounter(sparse.program(call).lowered, check=False)

    def macs(mask: torch.Tensor) -> int:
        return counter.step(sparse.prepare(call, mask).plan).total

    whole = macs(torch.ones(2, *size, dtype=torch.bool))
    assert whole + counter.prompt.total + counter.timestep.total == counter.dense.total

    @given(masks(2, size), masks(2, size))
    def grow(mask: torch.Tensor, other: torch.Tensor) -> None:
        assert macs(mask & other) <= macs(mask) <= macs(mask | other) <= counter.dense.total
        if attention == "full" and (mask | other).sum() > mask.sum():
            assert macs(mask) < macs(mask | other)

    grow()


def _scale(weight: torch.nn.Parameter) -> None:
    weight.mul_(1.5)


def _scale_data(weight: torch.nn.Parameter) -> None:
    weight.data.mul_(1.5)  # as PEFT and diffusers fuse a LoRA


def _new_data(weight: torch.nn.Parameter) -> None:
    weight.data = weight.data * 1.5


@pytest.mark.parametrize("change", [_scale, _scale_data, _new_data])
def test_a_weight_that_is_written_to_counts_from_the_next_plan_on(
    unets: UNets, change: Callable[[torch.nn.Parameter], None]
) -> None:
    unet, size = unets.fresh("micro"), (13, 10)
    sparse, (args, _) = sparsify(unet, {"dense_below": 4, "dense_above": 1.0}), unets.inputs("micro", 1, size)
    call, everything = sparse.call(*args), torch.ones(1, *size, dtype=torch.bool)
    before = sparse.step(call, sparse.record(call)[1], sparse.prepare(call, everything))
    with torch.no_grad():
        change(unet.down_blocks[0].resnets[0].conv1.weight)
    out, kept = sparse.record(call)
    assert_close(out, unet(*args).sample)
    assert (out != before).all()
    assert_close(sparse.step(call, kept, sparse.prepare(call, everything)), out)


@pytest.mark.parametrize("what", ["parameter", "module", "load_state_dict"])
def test_a_weight_that_is_replaced_counts_too(unets: UNets, what: str) -> None:
    """``load_lora_weights`` wraps layers, ``load_state_dict(assign=True)`` gives new parameters."""
    unet, size = unets.fresh("micro"), (13, 10)
    sparse, (args, _) = sparsify(unet, {"dense_below": 4, "dense_above": 1.0}), unets.inputs("micro", 1, size)
    sparse.record(sparse.call(*args))
    resnet = unet.down_blocks[0].resnets[0]
    if what == "parameter":
        resnet.conv1.weight = torch.nn.Parameter(resnet.conv1.weight * 1.5, requires_grad=False)
    elif what == "module":
        resnet.conv1 = torch.nn.Conv2d(16, 16, 3, padding=1, dtype=torch.float64)
    else:
        unet.load_state_dict({name: value * 1.5 for name, value in unet.state_dict().items()}, assign=True)
    with torch.no_grad():
        assert_close(sparse.record(sparse.call(*args))[0], unet(*args).sample)


@pytest.mark.parametrize(
    "memory_format",
    [
        torch.contiguous_format,
        torch.channels_last,
    ],
    ids=str,
)
def test_what_record_returns_belongs_to_the_caller(unets: UNets, memory_format: torch.memory_format) -> None:
    sparse, size = sparsify(unets.fresh("micro").to(memory_format=memory_format), {"dense_below": 4}), (13, 10)
    sample, *rest = unets.inputs("micro", 1, size)[0]
    call = sparse.call(sample.clone(memory_format=memory_format), *rest)
    out, kept = sparse.record(call)
    clones = {entry: tensor.clone() for entry, tensor in kept.items()}
    out.fill_(torch.nan)
    call.tensors[0].fill_(torch.nan)
    assert all(same_bits(kept[entry], clone) for entry, clone in clones.items())


def test_a_mask_of_text_tokens_that_hides_nothing_changes_nothing(unets: UNets) -> None:
    """``encoder_attention_mask`` keeps cross-attention dense. It costs time, never correctness."""
    sparse, batch, size = unets.sparse("micro", torch.float64, "full", 4), 2, (16, 16)
    visible = torch.ones(batch, 77, dtype=torch.bool)
    mask = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)) < 0.3
    edited = []
    for given_mask in ({}, {"encoder_attention_mask": visible}):
        base, edit = (
            sparse.call(*unets.inputs("micro", batch, size, torch.float64, seed)[0], **given_mask) for seed in (0, 1)
        )
        edited.append(sparse.step(edit, sparse.record(base)[1], sparse.prepare(edit, mask)))
    assert_close(*edited)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["full", "masked"])
def test_on_cuda(unets: UNets, attention: str) -> None:
    batch, size = 2, (13, 10)
    sparse = sparsify(unets.fresh("micro").cuda(), {"attention": attention, "dense_below": 4, "dense_above": 1.0})
    args, edited = (
        [tensor.cuda() for tensor in unets.inputs("micro", batch, size, torch.float64, s)[0]] for s in (0, 1)
    )
    base, edit = sparse.call(*args), sparse.call(*edited)
    out, kept = sparse.record(base)
    everything = sparse.prepare(base, torch.ones(1, *size, dtype=torch.bool))
    assert_close(sparse.step(base, with_maps(kept, torch.nan), everything), sparse.unet(*args).sample)
    mask = torch.rand(batch, *size, generator=torch.Generator().manual_seed(0)) < 0.3
    prepared = sparse.prepare(base, mask)
    if attention == "full":
        assert_close(sparse.step(base, kept, prepared), out)
    left = outside(mask, batch).cuda()
    assert same_bits(sparse.step(edit, kept, prepared).movedim(1, 3)[left], out.movedim(1, 3)[left])
