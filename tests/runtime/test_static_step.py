"""The step at fixed sizes, on the CPU: padded rows, buffers of its own, plans and prompts that take turns.

On a GPU the same code captures a CUDA graph (``test_gpu.py``). Here the graph runs as it is, so that what is copied
into its buffers, and what is padding in them, is held to steps of the mask's own sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.poison import poisoned
from support.random_masks import masks, outside, same_bits

from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.masks.sample_masks import square_mask
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.runtime.program import Program
from fisedit_compile.sparse_unet import SparseUNet, sparsify
from fisedit_compile.testing import assert_close

if TYPE_CHECKING:
    from support.unets import UNets

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, SIZE = 2, (18, 16)
#: (dtype, attention, dense_below): everything by its mask, or the lower resolution whole.
REGIONS = [
    (torch.float64, "full", 4),
    (torch.float64, "masked", 4),
    (torch.float64, "full", 10),
    (torch.float32, "full", 10),
]


class Steps:
    """A micro U-Net whose steps have fixed sizes, the same one whose steps have their masks', and a base of it."""

    def __init__(self, unets: UNets, dtype: torch.dtype, attention: str, dense_below: int) -> None:
        self.unets = unets
        self.plain: SparseUNet = unets.sparse("micro", dtype, attention, dense_below)
        self.fixed = with_fixed_sizes(
            self.plain.unet, unets.call(self.plain, "micro", BATCH, SIZE), self.plain.sparsity
        )
        self.base = unets.recorded(self.plain, "micro", BATCH, SIZE)
        self.edits = [unets.call(self.plain, "micro", BATCH, SIZE, seed) for seed in (1, 2)]

    @property
    def program(self) -> Program:
        return self.fixed.program(self.base.call)

    def plan(self, mask: torch.Tensor, edit: int = 0) -> Prepared:
        return self.fixed.prepare(self.edits[edit], mask)

    def run(self, mask: torch.Tensor, edit: int = 0) -> torch.Tensor:
        return self.fixed.step(self.edits[edit], self.base.cache, self.plan(mask, edit))

    def expected(self, mask: torch.Tensor, edit: int = 0) -> torch.Tensor:
        call = self.edits[edit]
        return self.plain.step(call, self.base.cache, self.plain.prepare(call, mask))


def with_fixed_sizes(unet: torch.nn.Module, call: Any, config: Any) -> SparseUNet:
    sparse = sparsify(unet, config)
    sparse.program(call).fixed_sizes = True
    return sparse


@pytest.fixture(scope="module")
def steps_of(unets: UNets) -> Callable[..., Steps]:
    """Makes those of a region once."""
    return functools.cache(functools.partial(Steps, unets))


@pytest.fixture(scope="module", params=REGIONS, ids=lambda region: "-".join(map(str, region)))
def steps(steps_of: Callable[..., Steps], request: pytest.FixtureRequest) -> Steps:
    return steps_of(*request.param)


@pytest.fixture(scope="module")
def fp64(steps_of: Callable[..., Steps]) -> Steps:
    return steps_of(*REGIONS[0])


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """So that whatever reads padding, or a buffer that nothing was copied to, gives NaN."""
    with poisoned():
        yield


def square(share: float, samples: int = 1) -> torch.Tensor:
    return square_mask(share, SIZE).expand(samples, -1, -1).clone()


def test_a_step_has_the_sizes_of_its_bucket(steps: Steps) -> None:
    few, many = (steps.plan(square(share)) for share in (0.05, 0.6))
    for prepared in (few, many):
        assert prepared.bucket is not None
        assert prepared.packed is not None
        assert prepared.values == {}
        counts = prepared.plan.counts
        assert all(prepared.bucket.rows[size] >= count for size, count in counts.items())
        assert prepared.packed.tensors[PlanTensor("index", SIZE)].shape == (prepared.bucket.rows[SIZE],)
    assert few.bucket != many.bucket
    assert steps.plan(square(0.05)).bucket == few.bucket


def test_1_with_a_full_mask_it_is_the_dense_unet(steps: Steps) -> None:
    cache = {
        entry: torch.full_like(kept, torch.nan) if entry.kind == "map" else kept
        for entry, kept in steps.base.cache.items()
    }
    out = steps.fixed.step(steps.base.call, cache, steps.plan(torch.ones(1, *SIZE, dtype=torch.bool)))
    assert_close(out, steps.base.out)


def test_2_unchanged_inputs_reproduce_the_base(steps: Steps) -> None:
    if steps.plain.sparsity.attention == "masked":
        pytest.skip("masked attention does not")

    @given(masks(1, SIZE) | masks(BATCH, SIZE))
    def reproduces(mask: torch.Tensor) -> None:
        assert_close(steps.fixed.step(steps.base.call, steps.base.cache, steps.plan(mask)), steps.base.out)

    reproduces()


def test_3_an_empty_mask_is_the_base_bit_for_bit(steps: Steps) -> None:
    assert same_bits(steps.run(torch.zeros(1, *SIZE, dtype=torch.bool)), steps.base.out)


def test_4_and_5_outside_are_the_base_s_bits_and_inside_what_the_plain_step_gives(steps: Steps) -> None:
    """One mask for the batch, or each sample its own."""

    @given(masks(1, SIZE) | masks(BATCH, SIZE), st.integers(0, 1))
    def agrees(mask: torch.Tensor, edit: int) -> None:
        out, kept = steps.run(mask, edit), outside(mask, BATCH)
        assert same_bits(out.movedim(1, 3)[kept], steps.base.out.movedim(1, 3)[kept])
        assert_close(out, steps.expected(mask, edit))

    agrees()


def test_6_plans_and_prompts_take_turns_and_nothing_is_written_to(steps: Steps) -> None:
    given_tensors = [*steps.base.cache.values(), steps.base.out, *(t for call in steps.edits for t in call.tensors)]
    clones = [tensor.clone() for tensor in given_tensors]

    @settings(max_examples=5)
    @given(masks(BATCH, SIZE), st.floats(0.02, 1), st.lists(st.tuples(st.booleans(), st.booleans()), max_size=8))
    def turns_do_not_matter(mask: torch.Tensor, share: float, turns: list[tuple[bool, bool]]) -> None:
        chosen = [mask, square(share, BATCH)]
        plans = [steps.plan(each, edit) for edit, each in enumerate(chosen)]
        # A plan for each edit, as two images in the making have; and now and then one plan for both prompts.
        alone = [[steps.fixed.step(steps.edits[e], steps.base.cache, steps.plan(m)) for e in (0, 1)] for m in chosen]
        results = []
        for which, other_prompt in turns:
            edit = which ^ other_prompt
            results.append((steps.fixed.step(steps.edits[edit], steps.base.cache, plans[which]), alone[which][edit]))
        for out, expected in results:  # compared at the end: a later step must not write to an earlier one's result
            assert same_bits(out, expected)
        assert all(map(same_bits, given_tensors, clones))

    turns_do_not_matter()


def test_a_result_belongs_to_the_caller(fp64: Steps) -> None:
    mask = square(0.2)
    prepared = fp64.plan(mask)
    first = fp64.fixed.step(fp64.edits[0], fp64.base.cache, prepared)
    kept = first.clone()
    second = fp64.fixed.step(fp64.edits[1], fp64.base.cache, prepared)
    assert same_bits(first, kept)
    second.fill_(torch.nan)
    assert same_bits(fp64.fixed.step(fp64.edits[0], fp64.base.cache, prepared), kept)


def test_the_caches_of_several_bases_take_turns(fp64: Steps) -> None:
    """Also of bases whose cache is a plain mapping: moved from a disk, or halved by a user."""
    other = fp64.unets.recorded(fp64.plain, "micro", BATCH, SIZE, 2)
    mask = square(0.2)
    prepared, plain = fp64.plan(mask), fp64.plain.prepare(fp64.edits[0], mask)
    for cache in (fp64.base.cache, other.cache, dict(other.cache), fp64.base.cache, dict(fp64.base.cache)):
        expected = fp64.plain.step(fp64.edits[0], cache, plain)
        assert_close(fp64.fixed.step(fp64.edits[0], cache, prepared), expected)


def test_one_cache_serves_programs_that_read_other_parts_of_it(unets: UNets, fp64: Steps) -> None:
    whole = Steps(unets, *REGIONS[2])  # reads none of the lower resolution's maps
    cache, mask = fp64.base.cache, square(0.2)
    for of in (fp64, whole, fp64):
        expected = of.plain.step(of.edits[0], cache, of.plain.prepare(of.edits[0], mask))
        assert_close(of.fixed.step(of.edits[0], cache, of.plan(mask)), expected)


def test_masks_in_many_buckets_take_turns(fp64: Steps) -> None:
    """From large to small and back: they share the memory that is fetched to."""
    shares = [0.02, 0.9, 0.1, 0.4, 0.02, 1.0, 0.25]
    plans = {share: fp64.plan(square(share)) for share in shares}
    assert len({prepared.bucket for prepared in plans.values()}) >= 4
    for share in [*shares, *reversed(shares)]:
        out = fp64.fixed.step(fp64.edits[0], fp64.base.cache, plans[share])
        assert_close(out, fp64.expected(square(share)))


def test_isolated_pixels_have_a_bucket_of_their_own(fp64: Steps) -> None:
    board = (torch.arange(SIZE[0])[:, None] + torch.arange(SIZE[1]))[None] % 2 == 0
    assert_close(fp64.run(board), fp64.expected(board))


def test_a_prompt_written_to_in_place_is_seen(fp64: Steps) -> None:
    sample, timestep, text = (tensor.clone() for tensor in fp64.edits[0].tensors)
    call, mask = fp64.fixed.call(sample, timestep, text), square(0.2)
    prepared = fp64.fixed.prepare(call, mask)
    first = fp64.fixed.step(call, fp64.base.cache, prepared)
    text.mul_(2)
    sample.add_(1)
    second = fp64.fixed.step(call, fp64.base.cache, prepared)
    assert not torch.equal(first, second)
    assert_close(second, fp64.plain.step(call, fp64.base.cache, fp64.plain.prepare(call, mask)))


def test_a_call_at_another_timestep_is_refused(fp64: Steps) -> None:
    sample, _, text = fp64.edits[0].tensors
    call = fp64.fixed.call(sample, torch.tensor(499), text)
    with pytest.raises(BaseMismatchError, match=r"at timestep 499, the recorded one was at 500: a sparse step"):
        fp64.fixed.step(call, fp64.base.cache, fp64.fixed.prepare(call, square(0.2)))


def _written(weight: torch.nn.Parameter) -> None:
    weight.data += 0.1  # as a LoRA is fused


def _moved(weight: torch.nn.Parameter) -> None:
    weight.data = weight.data + 0.1


@pytest.mark.parametrize("change", [_written, _moved])
def test_changed_weights_count_from_the_next_plan_on(
    unets: UNets, fp64: Steps, change: Callable[[torch.nn.Parameter], None]
) -> None:
    """A convolution's, packed in the stage ``constant``; one of the prompt's; one that the step reads as it is."""
    unet = unets.fresh("micro")
    block = unet.down_blocks[0]
    weights = {
        "conv1": block.resnets[0].conv1.weight,
        "to_k": block.attentions[0].transformer_blocks[0].attn2.to_k.weight,
        "proj_out": block.attentions[0].proj_out.weight,
    }
    call, config = fp64.edits[0], fp64.plain.sparsity
    cache = dict(fp64.base.cache)  # a plain mapping, which does not say which model it was recorded by
    fixed, masks = with_fixed_sizes(unet, call, config), (square(0.1), square(0.5))
    before = [fixed.step(call, cache, fixed.prepare(call, mask)).clone() for mask in masks]
    for layer, weight in weights.items():
        change(weight)
        fresh = sparsify(unet, config)
        after = [fresh.step(call, cache, fresh.prepare(call, mask)) for mask in masks]
        for mask, old, expected in zip(masks, before, after, strict=True):
            assert (expected - old).abs().max() > 1e-6, layer
            assert_close(fixed.step(call, cache, fixed.prepare(call, mask)), expected)
        before = after


def test_a_plan_from_before_the_weights_moved_is_refused(unets: UNets, fp64: Steps) -> None:
    """Two edits are in the making; a LoRA is loaded, and a third begins."""
    unet, call, cache = unets.fresh("micro"), fp64.edits[0], dict(fp64.base.cache)
    fixed = with_fixed_sizes(unet, call, fp64.plain.sparsity)
    few, many = fixed.prepare(call, square(0.05)), square(0.7)
    fixed.step(call, cache, few)
    _moved(unet.down_blocks[0].resnets[0].conv1.weight)
    assert fixed.step(call, cache, fixed.prepare(call, many)).isfinite().all()
    with pytest.raises(BaseMismatchError, match="conv1"):
        fixed.step(call, cache, few)
