"""The invariants of the sparse step, on whole U-Nets: what it may compute anew, and what it has to leave alone.

Bits are compared where nothing may be computed (outside the mask, an empty mask), within the table of tolerances where
the same numbers are reached another way. Most tests run the smallest U-Net that has every kind of layer, in fp64, over
odd sizes and batches with their own masks; the Stable Diffusion shapes and the other dtypes follow at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fisedit_compile.passes.requests import CacheEntry
from fisedit_compile.sparse_unet import sparsify
from fisedit_compile.testing import assert_close

if TYPE_CHECKING:
    from conftest import UNets

#: (U-Net batch, samples with a mask of their own, latent size): guidance (n < B), odd and non-square sizes.
CASES = [(2, 1, (16, 16)), (1, 1, (13, 10)), (4, 2, (13, 10)), (3, 3, (17, 24))]
#: (attention, dense_below): everything sparse, or the lower resolution dense within.
REGIONS = [("full", 4), ("masked", 4), ("full", 10)]

cases = pytest.mark.parametrize(("batch", "n", "size"), CASES)
regions = pytest.mark.parametrize(("attention", "dense_below"), REGIONS)
full_attention = pytest.mark.parametrize(
    ("attention", "dense_below"), [region for region in REGIONS if region[0] == "full"]
)


def masks(n: int, size: tuple[int, int]) -> st.SearchStrategy[torch.Tensor]:
    """bool [n, h, w]; each sample its own: random at some density, one pixel, a block, full or empty."""
    height, width = size

    def sample(kind: str, seed: int, density: float, corners: list[tuple[float, float]]) -> torch.Tensor:
        (y, x), (y_end, x_end) = ((int(v * height), int(u * width)) for v, u in corners)
        mask = torch.zeros(height, width, dtype=torch.bool)
        if kind == "random":
            mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < density
        elif kind == "pixel":
            mask[y, x] = True
        elif kind == "block":
            mask[min(y, y_end) : max(y, y_end) + 1, min(x, x_end) : max(x, x_end) + 1] = True
        elif kind == "full":
            mask[:] = True
        return mask

    unit = st.floats(0, 1, exclude_max=True)
    kinds = st.sampled_from(["random", "pixel", "block", "full", "empty"])
    corners = st.lists(st.tuples(unit, unit), min_size=2, max_size=2)
    one = st.builds(sample, kinds, st.integers(0, 2**31), unit, corners)
    return st.lists(one, min_size=n, max_size=n).map(torch.stack)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Stricter than ``torch.equal``: -0.0 is not 0.0."""
    as_bytes = [tensor.flatten().contiguous().view(torch.uint8) for tensor in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*as_bytes)


def outside(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """bool [B, h, w]: the pixels that an edit must not touch; sample b is edited by ``mask[b % n]``."""
    return ~mask.repeat(batch // len(mask), 1, 1)


def with_maps(cache: Mapping[CacheEntry, torch.Tensor], value: float) -> dict[CacheEntry, torch.Tensor]:
    """The cache with every map replaced by a constant; the statistics stay."""
    return {entry: torch.full_like(kept, value) if entry.kind == "map" else kept for entry, kept in cache.items()}


@cases
@regions
def test_1_with_a_full_mask_the_sparse_graph_is_the_dense_unet(
    unets: UNets, attention: str, dense_below: int, batch: int, n: int, size: tuple[int, int]
) -> None:
    sparse = unets.sparse("micro", torch.float64, attention, dense_below)
    args, kwargs = unets.inputs("micro", batch, size)
    base = unets.recorded(sparse, "micro", batch, size)
    prepared = sparse.plan(base.call, torch.ones(n, *size, dtype=torch.bool))
    out = sparse.step(base.call, with_maps(base.cache, torch.nan), prepared)
    assert_close(out, sparse.unet(*args, **kwargs).sample)


@cases
@full_attention
def test_2_unchanged_inputs_reproduce_the_base(
    unets: UNets, attention: str, dense_below: int, batch: int, n: int, size: tuple[int, int]
) -> None:
    sparse = unets.sparse("micro", torch.float64, attention, dense_below)
    base = unets.recorded(sparse, "micro", batch, size)

    @given(masks(n, size))
    def reproduces(mask: torch.Tensor) -> None:
        assert_close(sparse.step(base.call, base.cache, sparse.plan(base.call, mask)), base.out)

    reproduces()


@cases
@regions
def test_3_an_empty_mask_is_the_base_bit_for_bit(
    unets: UNets, attention: str, dense_below: int, batch: int, n: int, size: tuple[int, int]
) -> None:
    sparse = unets.sparse("micro", torch.float64, attention, dense_below)
    base, edit = unets.recorded(sparse, "micro", batch, size), unets.call(sparse, "micro", batch, size, 1)
    prepared = sparse.plan(edit, torch.zeros(n, *size, dtype=torch.bool))
    assert same_bits(sparse.step(edit, base.cache, prepared), base.out)


@cases
@regions
def test_4_outside_the_mask_are_the_base_s_bits_and_inside_are_new_values(
    unets: UNets, attention: str, dense_below: int, batch: int, n: int, size: tuple[int, int]
) -> None:
    sparse = unets.sparse("micro", torch.float64, attention, dense_below)
    base, edit = unets.recorded(sparse, "micro", batch, size), unets.call(sparse, "micro", batch, size, 1)

    @given(masks(n, size))
    def leaves_the_outside(mask: torch.Tensor) -> None:
        out = sparse.step(edit, base.cache, sparse.plan(edit, mask))
        kept = outside(mask, batch)
        assert out.shape == base.out.shape
        assert out.isfinite().all()
        assert same_bits(out.movedim(1, 3)[kept], base.out.movedim(1, 3)[kept])
        assert (out != base.out).movedim(1, 3)[~kept].all()

    leaves_the_outside()


@cases
@regions
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
        prepared = sparse.plan(edit, mask)
        assert same_bits(sparse.step(edit, poisoned, prepared), sparse.step(edit, base.cache, prepared))

    ignores_active_pixels()


@regions
@pytest.mark.parametrize(("batch", "n", "size"), [case for case in CASES if case[1] > 1])
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
        together = sparse.step(edit, base.cache, sparse.plan(edit, mask))
        for b, (call, kept) in enumerate(zip(edits, caches, strict=True)):
            assert_close(together[b : b + 1], sparse.step(call, kept, sparse.plan(call, mask[b % n][None])))

    samples_are_independent()


@cases
@regions
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
            [sparse.step(edit, base.cache, sparse.plan(edit, mask)) for edit in edits] for mask in chosen
        ]  # a plan for each
        shared = [sparse.plan(edits[0], mask) for mask in chosen]
        for plan, edit in turns:
            out = sparse.step(edits[edit], base.cache, shared[plan])
            assert same_bits(out, alone[plan][edit])
            out.fill_(torch.nan)  # a result belongs to the caller
        assert all(map(same_bits, before, clones))
        assert all(map(same_bits, chosen, (first, second)))

    turns_do_not_matter()


def test_a_prompt_written_to_in_place_is_seen(unets: UNets) -> None:
    sparse, size = unets.sparse("micro", torch.float64, "full", 4), (13, 10)
    base = unets.recorded(sparse, "micro", 1, size)
    (sample, timestep, text), _ = unets.inputs("micro", 1, size, torch.float64, 1)
    text = text.clone()
    call = sparse.call(sample, timestep, text)
    mask = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)) < 0.3
    prepared = sparse.plan(call, mask)
    first = sparse.step(call, base.cache, prepared)
    text.mul_(2)
    second = sparse.step(call, base.cache, prepared)
    assert not torch.equal(first, second)
    assert same_bits(second, sparse.step(call, base.cache, sparse.plan(call, mask)))


def test_outside_editing_the_unet_is_the_dense_one(unets: UNets) -> None:
    sparse = unets.sparse("micro", torch.float64, "full", 4)
    args, kwargs = unets.inputs("micro", 2, (16, 16))
    base = unets.recorded(sparse, "micro", 2, (16, 16))
    sparse.step(base.call, base.cache, sparse.plan(base.call, torch.ones(1, 16, 16, dtype=torch.bool)))
    dense = unets.dense("micro", torch.float64)(*args, **kwargs)
    assert same_bits(sparse(*args, **kwargs).sample, dense.sample)
    assert same_bits(sparse(*args, **kwargs, return_dict=False)[0], dense.sample)
    assert_close(base.out, dense.sample)
    assert (sparse.config, sparse.dtype) == (sparse.unet.config, torch.float64)


@pytest.mark.parametrize("arch", ["tiny-sd15", "tiny", "tiny-sdxl"])
@pytest.mark.parametrize("attention", ["full", "masked"])
def test_stable_diffusion_shapes(unets: UNets, arch: str, attention: str) -> None:
    """Invariants 1 to 4 for SD 1.5, SD 2 and SDXL: three resolutions, fp32, a height that is odd on the way down."""
    batch, n, size = 2, 1, (18, 12)
    sparse = unets.sparse(arch, torch.float32, attention, 3)
    args, kwargs = unets.inputs(arch, batch, size, torch.float32)
    base, edit = unets.recorded(sparse, arch, batch, size), unets.call(sparse, arch, batch, size, 1)
    everything = sparse.plan(base.call, torch.ones(n, *size, dtype=torch.bool))
    out = sparse.step(base.call, with_maps(base.cache, torch.nan), everything)
    assert_close(out, sparse.unet(*args, **kwargs).sample)

    @settings(max_examples=8)
    @given(masks(n, size))
    def holds(mask: torch.Tensor) -> None:
        prepared, kept = sparse.plan(base.call, mask), outside(mask, batch)
        if attention == "full":
            assert_close(sparse.step(base.call, base.cache, prepared), base.out)
        edited = sparse.step(edit, base.cache, prepared)
        assert same_bits(edited.movedim(1, 3)[kept], base.out.movedim(1, 3)[kept])

    holds()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["full", "masked"])
def test_dtypes(unets: UNets, dtype: torch.dtype, attention: str) -> None:
    """Invariants 1 to 4 in the dtypes that people run, against the same weights and inputs in fp64 where it is numeric."""
    batch, n, size = 2, 2, (13, 10)
    sparse = unets.sparse("micro", dtype, attention, 4)
    base, edit = unets.recorded(sparse, "micro", batch, size), unets.call(sparse, "micro", batch, size, 1)
    exact = unets.fresh("micro", dtype).double()
    args, _ = unets.inputs("micro", batch, size, dtype)
    reference = exact(*(arg.double() if arg.is_floating_point() else arg for arg in args)).sample

    everything = sparse.plan(base.call, torch.ones(n, *size, dtype=torch.bool))
    out = sparse.step(base.call, with_maps(base.cache, torch.nan), everything)
    assert out.dtype == dtype
    assert_close(out, reference)

    @settings(max_examples=8)
    @given(masks(n, size))
    def holds(mask: torch.Tensor) -> None:
        prepared, kept = sparse.plan(base.call, mask), outside(mask, batch)
        if attention == "full":
            assert_close(sparse.step(base.call, base.cache, prepared), reference)
        edited = sparse.step(edit, base.cache, prepared)
        assert same_bits(edited.movedim(1, 3)[kept], base.out.movedim(1, 3)[kept])
        assert edited.isfinite().all()

    holds()


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["full", "masked"])
def test_on_cuda(unets: UNets, attention: str) -> None:
    batch, size = 2, (13, 10)
    sparse = sparsify(unets.fresh("micro").cuda(), {"attention": attention, "dense_below": 4})
    args, edited = (
        [tensor.cuda() for tensor in unets.inputs("micro", batch, size, torch.float64, s)[0]] for s in (0, 1)
    )
    base, edit = sparse.call(*args), sparse.call(*edited)
    out, kept = sparse.record(base)
    everything = sparse.plan(base, torch.ones(1, *size, dtype=torch.bool))
    assert_close(sparse.step(base, with_maps(kept, torch.nan), everything), sparse.unet(*args).sample)
    mask = torch.rand(batch, *size, generator=torch.Generator().manual_seed(0)) < 0.3
    prepared = sparse.plan(base, mask)
    if attention == "full":
        assert_close(sparse.step(base, kept, prepared), out)
    left = outside(mask, batch).cuda()
    assert same_bits(sparse.step(edit, kept, prepared).movedim(1, 3)[left], out.movedim(1, 3)[left])
