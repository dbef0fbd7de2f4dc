"""Bases that keep maps in few bits a value: a step reads what was packed, by whichever way it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.random_masks import outside, same_bits

from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.kernels.indexing.packed_rows import mean_of_tiles, pack_rows_reference, unpack_rows_reference
from fisedit_compile.masks.sample_masks import square_mask
from fisedit_compile.sparse_unet import SparseUNet, sparsify
from fisedit_compile.testing import assert_close

if TYPE_CHECKING:
    from support.unets import UNets

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, BATCH = (18, 16), 2


class Packed:
    """A U-Net whose bases are packed, the same one whose bases are not, and a base of each."""

    def __init__(self, unets: UNets, cache: str, attention: str) -> None:
        options: dict[str, Any] = {"dense_below": 4, "attention": attention}
        dense = unets.dense("micro", torch.float32)
        self.exact: SparseUNet = sparsify(dense, {**options, "cache": "exact"})
        self.packed: SparseUNet = sparsify(dense, {**options, "cache": cache})
        self.call = unets.call(self.packed, "micro", BATCH, SIZE)
        self.edit = unets.call(self.packed, "micro", BATCH, SIZE, 1)
        self.out, self.base = self.packed.record(self.call, attention=True)
        _, self.exact_base = self.exact.record(self.call, attention=True)
        self.formats = self.packed.program(self.call).lowered.kept.formats
        self.mask = square_mask(0.2, SIZE)

    def step(self, sparse: SparseUNet, cache: Any) -> torch.Tensor:
        return sparse.step(self.edit, cache, sparse.prepare(self.edit, self.mask))


@pytest.fixture(scope="module", params=["balanced-full", "small-full", "balanced-masked"])
def packed(unets: UNets, request: pytest.FixtureRequest) -> Packed:
    return Packed(unets, *request.param.split("-"))


def test_maps_are_packed_and_nothing_else(packed: Packed) -> None:
    lowered = packed.packed.program(packed.call).lowered
    assert packed.formats
    assert lowered.output is not None
    assert lowered.output[0] not in packed.formats
    for entry, kept in packed.base.items():
        assert (kept.dtype is torch.uint8) == (entry in packed.formats)
    maps = {entry for entry in packed.base if entry.kind == "map"}
    assert maps - set(packed.formats) == {lowered.output[0]}
    small, large = (sum(cache[entry].nbytes for entry in maps) for cache in (packed.base, packed.exact_base))
    assert small < 0.4 * large
    assert sum(kept.nbytes for kept in packed.base.values()) == lowered.kept.record_nbytes(
        samples=BATCH, activations=True, attention=True
    )


def test_a_step_reads_the_packed_values(packed: Packed) -> None:
    """The step of an exact graph on values that went through packing is that of the packed base, bit for bit."""
    kept = dict(packed.exact_base)
    for entry, form in packed.formats.items():
        rows = kept[entry] if form.size is None else mean_of_tiles(kept[entry], form.size)
        assert torch.equal(packed.base[entry], pack_rows_reference(rows, form.bits))
        row_of = form.row_of_each_pixel(len(kept[entry]))
        kept[entry] = unpack_rows_reference(packed.base[entry], form)
        if row_of is not None:
            kept[entry] = kept[entry][row_of]
    assert torch.equal(packed.step(packed.packed, packed.base), packed.step(packed.exact, kept))


def test_the_base_outside_is_exact(packed: Packed) -> None:
    out = packed.step(packed.packed, packed.base)
    kept = outside(packed.mask, BATCH)[:, None].expand_as(out)
    assert same_bits(out[kept], packed.out[kept])


def test_a_step_is_near_that_of_an_exact_base(packed: Packed) -> None:
    exact = packed.step(packed.exact, packed.exact_base)
    error = (packed.step(packed.packed, packed.base) - exact).abs().max() / exact.abs().max()
    assert error < (0.3 if packed.packed.sparsity.cache == "small" else 0.05)


def test_at_fixed_sizes_and_by_rows(packed: Packed, unets: UNets) -> None:
    fixed = sparsify(packed.packed.unet, packed.packed.sparsity)
    program = fixed.program(packed.call)
    program.fixed_sizes = program.dense_as_rows = True
    _, base = fixed.record(packed.call, attention=True)
    for entry, form in packed.formats.items():
        one, other = (unpack_rows_reference(cache[entry], form) for cache in (base, packed.base))
        step = (other.amax() - other.amin()) / (2**form.bits - 1)
        assert (one - other).abs().max() <= 1.01 * step  # rounding may tip a value to the next code
    expected = packed.step(packed.packed, base)
    assert_close(packed.step(fixed, base), expected)
    smaller = square_mask(0.05, SIZE)  # another plan in the same buffers
    plans = [sparse.prepare(packed.edit, smaller) for sparse in (fixed, packed.packed)]
    assert_close(fixed.step(packed.edit, base, plans[0]), packed.packed.step(packed.edit, base, plans[1]))


def test_a_base_that_is_kept_otherwise_is_refused(packed: Packed) -> None:
    for sparse, cache in ((packed.exact, packed.base), (packed.packed, packed.exact_base)):
        with pytest.raises(BaseMismatchError, match="record the base with inputs of this batch, size and dtype"):
            packed.step(sparse, dict(cache))
        assert isinstance(cache, Recorded)


def test_no_more_than_auto_on_a_cpu(unets: UNets) -> None:
    sparse = sparsify(unets.dense("micro", torch.float32), {"dense_below": 4})
    assert not sparse.program(unets.call(sparse, "micro", BATCH, SIZE)).lowered.kept.formats
