"""Dense calls by operations on rows: what they give, record and control is what the dense graphs do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.unets import UNets

from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.cache.tensors_in_memory import Piece
from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.runtime.control import Control
from fisedit_compile.sparse_unet import SparseUNet, sparsify
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, SAMPLES, TOKENS = (18, 16), 1, 4


class Both:
    """A U-Net whose dense calls run by their own graphs, and the same one by rows."""

    def __init__(self, unets: UNets, arch: str) -> None:
        self.dense: SparseUNet = sparsify(unets.dense(arch), {"dense_below": 8})
        self.rows: SparseUNet = sparsify(unets.dense(arch), {"dense_below": 8})
        self.calls = [unets.call(self.dense, arch, 2, SIZE, seed) for seed in range(3)]
        self.rows.program(self.calls[0]).dense_as_rows = True

    def record(self, sparse: SparseUNet, call: Any) -> tuple[torch.Tensor, Any]:
        return sparse.record(call, samples=SAMPLES, attention=True, tokens=TOKENS)


@pytest.fixture(scope="module", params=["micro", "tiny-sdxl"])
def both(unets: UNets, request: pytest.FixtureRequest) -> Both:
    return Both(unets, request.param)


@torch.no_grad()
def test_the_plain_call(both: Both) -> None:
    for call in both.calls:
        assert_close(both.rows.program(call).dense(call), both.dense.dense(call))


@torch.no_grad()
def test_what_is_recorded(both: Both) -> None:
    out, kept = both.record(both.dense, both.calls[0])
    by_rows, kept_by_rows = both.record(both.rows, both.calls[0])
    assert_close(by_rows, out)
    assert list(kept_by_rows) == list(kept)
    for entry, value in kept.items():
        assert kept_by_rows[entry].dtype == value.dtype
        assert kept_by_rows[entry].is_contiguous()
        assert_close(kept_by_rows[entry], value)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, TOKENS, None])
def test_maps_of_any_number_of_tokens_are_made_by_one_graph(both: Both, tokens: int | None) -> None:
    both.record(both.rows, both.calls[0])
    whole = both.rows.program(both.calls[0])._whole
    graphs = dict(whole._steps)
    (_, want), (_, kept) = (
        each.record(both.calls[0], samples=SAMPLES, attention=True, tokens=tokens) for each in (both.dense, both.rows)
    )
    assert whole._steps == graphs
    for entry, value in want.items():
        assert kept[entry].shape == value.shape
        assert kept[entry].is_contiguous()
        if entry.kind == "attention":  # let go of before the rest
            assert kept[entry].untyped_storage().nbytes() == kept[entry].nbytes
        assert_close(kept[entry], value)


@torch.no_grad()
def test_a_later_call_changes_nothing_that_was_recorded(both: Both) -> None:
    out, kept = both.record(both.rows, both.calls[0])
    before = [out.clone(), *(value.clone() for value in kept.values())]
    both.record(both.rows, both.calls[1])
    assert all(map(torch.equal, before, [out, *kept.values()]))


@torch.no_grad()
def test_calls_say_where_they_lie_in_a_piece_of_memory(both: Both) -> None:
    (_, one), (_, other) = (both.record(both.rows, call) for call in both.calls[:2])
    assert one.piece is not None
    assert other.piece is not None
    assert one.piece.layout.places == other.piece.layout.places
    for kept in (one, other):
        for entry, value in kept.items():
            place = kept.piece.layout.places.get(entry)
            assert (place is None) == (entry.kind == "attention")
            if place is not None:
                assert value.data_ptr() == kept.piece.memory.data_ptr() + place.start
                assert (value.shape, value.dtype) == (torch.Size(place.shape), place.dtype)
    assert copy.deepcopy(one).piece is None
    assert one.without("attention").piece is None
    assert both.record(both.dense, both.calls[0])[1].piece is None


@torch.no_grad()
def test_a_call_that_lies_as_one_that_fits_does_is_held_to_its_timestep_all_the_same(both: Both) -> None:
    rows, base, edit = both.rows, *both.calls[:2]
    (_, one), (_, kept) = (both.record(rows, call) for call in (base, base))
    assert one.piece is not None
    assert kept.piece is not None
    other = Recorded(kept.signature, kept.timesteps, dict(kept), Piece(kept.piece.memory, one.piece.layout))
    other.model = kept.model
    mask = torch.zeros(1, *SIZE, dtype=torch.bool)
    mask[:, 3:7, 4:9] = True
    prepared = rows.prepare(base, mask)
    first = rows.step(edit, one, prepared)
    assert one.piece.layout in rows.program(base).cache._fitting
    assert_close(rows.step(edit, other, prepared), first)
    later = rows.call(**{**edit.kwargs, "timestep": edit.kwargs["timestep"] + 1})
    with pytest.raises(BaseMismatchError, match="timestep"):
        rows.step(later, other, prepared)


@torch.no_grad()
def test_control(both: Both) -> None:
    length = both.calls[0].kwargs["encoder_hidden_states"].shape[1]
    mapper = torch.eye(length)[None]
    mapper[0, 1] = 0
    control = Control(mapper, mapper.sum(1))
    _, kept = both.record(both.dense, both.calls[0])
    for call in both.calls[1:]:
        controlled = both.rows.controlled(call, kept, control)
        assert_close(controlled, both.dense.controlled(call, kept, control))
        assert (controlled - both.dense.dense(call)).abs().max() > 1e-4


@torch.no_grad()
def test_a_sparse_step_reads_what_was_recorded_by_rows(both: Both) -> None:
    (base, edit, _), rows = both.calls, both.rows
    _, kept = both.record(rows, base)
    mask = torch.ones(1, *SIZE, dtype=torch.bool)
    again = rows.step(base, kept, rows.prepare(base, mask & False))
    assert_close(again, both.dense.dense(base))
    length = base.kwargs["encoder_hidden_states"].shape[1]
    control = Control(torch.eye(length)[None], torch.ones(1, length))
    plain, controlled = (rows.step(edit, kept, rows.prepare(edit, mask), each) for each in (None, control))
    assert (controlled - plain).abs().max() > 1e-5


@torch.no_grad()
def test_weights_written_to_are_followed(unets: UNets) -> None:
    unet = unets.fresh("micro")
    sparse = sparsify(unet, {"dense_below": 8})
    call = unets.call(sparse, "micro", 2, SIZE)
    sparse.program(call).dense_as_rows = True
    before, _ = sparse.record(call)
    assert_close(before, sparse.dense(call))
    for parameter in unet.parameters():
        parameter.mul_(1.01)
    after, _ = sparse.record(call)
    assert_close(after, sparse.dense(call))
    assert not torch.equal(after, before)


@torch.inference_mode()
def test_in_inference_mode_first_and_without_it_later(unets: UNets) -> None:
    sparse = sparsify(unets.dense("micro"), {"dense_below": 8, "dense_above": 1.0})
    call = unets.call(sparse, "micro", 2, SIZE)
    sparse.program(call).dense_as_rows = sparse.program(call).fixed_sizes = True
    length = call.kwargs["encoder_hidden_states"].shape[1]
    control = Control(torch.eye(length)[None], torch.ones(1, length))
    _, kept = sparse.record(call, samples=SAMPLES, attention=True, tokens=TOKENS)
    prepared = sparse.prepare(call, torch.ones(1, *SIZE, dtype=torch.bool))

    def results() -> list[torch.Tensor]:
        return [sparse.controlled(call, kept, control), sparse.step(call, kept, prepared, control)]

    first = results()
    with torch.inference_mode(False), torch.no_grad():
        assert all(map(torch.equal, results(), first))
        assert all(map(torch.equal, results(), first))


@torch.no_grad()
@pytest.mark.parametrize("changed", [0, 1, 3], ids=["mapper", "keep", "weight"])
def test_control_that_is_written_to_is_followed(both: Both, changed: int) -> None:
    (base, edit, _), rows = both.calls, both.rows
    _, kept = both.record(both.dense, base)
    length = base.kwargs["encoder_hidden_states"].shape[1]
    control = Control(torch.eye(length)[None].clone(), torch.ones(1, length), -1, torch.ones(1, length))
    before = rows.controlled(edit, kept, control)
    control[changed][..., 2] = 0
    after = rows.controlled(edit, kept, control)
    assert_close(after, both.dense.controlled(edit, kept, control))
    assert not torch.equal(after, before)


def test_weights_written_to_after_a_recording_in_inference_mode(unets: UNets) -> None:
    unet = unets.fresh("micro")
    sparse = sparsify(unet, {"dense_below": 8})
    call = unets.call(sparse, "micro", 2, SIZE)
    sparse.program(call).dense_as_rows = True
    with torch.inference_mode():
        sparse.record(call)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.01)
        after, _ = sparse.record(call)
        assert_close(after, sparse.dense(call))
