"""Calls of several bases in one place: what lies there is each base's, part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fisedit_compile.cache.joined_calls as joined_calls
from fisedit_compile import BaseMemoryError, BaseMismatchError
from fisedit_compile.cache.joined_calls import JoinedCalls
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.ir.call import Signature
from fisedit_compile.ir.requests import CacheEntry

CPU = torch.device("cpu")
MAP, PACKED, SCALE = CacheEntry("a", "map"), CacheEntry("b", "map"), CacheEntry("a", "scale")
STEP, TIME, WORDS = CacheEntry("c", "value"), CacheEntry("d", "value"), CacheEntry("e", "attention")
PIXELS = 6


def call(seed: int, samples: int, tokens: int = 4, timestep: int = 7) -> Recorded:
    """Of two parts; each sample's values are its own."""
    generator, batch = torch.Generator().manual_seed(seed), 2 * samples
    made = torch.Size([batch, 4, 2, 3])
    kept = {
        MAP: torch.rand(batch * PIXELS, 5, generator=generator),
        PACKED: torch.randint(256, (batch * PIXELS, 9), generator=generator).to(torch.uint8),
        SCALE: torch.rand(batch, 3, generator=generator),
        STEP: torch.rand(batch, 2, generator=generator),
        TIME: torch.tensor(float(timestep)),
        WORDS: torch.rand(samples * PIXELS, 2, tokens, generator=generator),
    }
    return Recorded(Signature("", ((tuple(made), torch.float32, CPU),)), (torch.tensor(timestep),), kept)


def place(samples: int) -> JoinedCalls:
    read = call(0, samples)
    specs = {entry: (tensor.shape, tensor.dtype) for entry, tensor in read.items() if entry.kind != "attention"}
    return JoinedCalls(read.signature, specs, 2, CPU)


def filled(made: JoinedCalls, calls: list[Recorded], **options: Any) -> Recorded:
    """By way of one place that each call is brought to."""
    scratch: dict[CacheEntry, torch.Tensor] = {}

    def bring(i: int) -> Recorded:
        for tensor in scratch.values():
            tensor.zero_()  # what was brought before is gone
        scratch.update({entry: tensor.clone() for entry, tensor in calls[i].items()})
        return calls[i].with_values(scratch)

    return made.fill(calls, bring, **options)


def part(tensor: torch.Tensor, index: int) -> torch.Tensor:
    return tensor.chunk(2)[index]


def test_the_parts_of_all_bases_lie_behind_each_other() -> None:
    calls, made = [call(1, 1), call(2, 2, tokens=8), call(3, 1)], place(4)
    before = [{entry: tensor.clone() for entry, tensor in each.items()} for each in calls]
    cache = filled(made, calls)
    for entry in (MAP, PACKED, SCALE, STEP):
        want = [part(each[entry], index) for index in (0, 1) for each in calls]
        assert torch.equal(cache[entry], torch.cat(want))
    assert cache[TIME] == 7
    first, second, third = cache[WORDS].split([PIXELS, 2 * PIXELS, PIXELS])
    assert torch.equal(second, calls[1][WORDS])
    for words, each in ((first, calls[0]), (third, calls[2])):
        assert torch.equal(words[..., :4], each[WORDS])
        assert not words[..., 4:].any()
    assert cache.timesteps == calls[0].timesteps
    for each, kept in zip(calls, before, strict=True):
        assert all(torch.equal(each[entry], tensor) for entry, tensor in kept.items())


def test_the_place_is_filled_again() -> None:
    made = place(2)
    first = filled(made, [call(1, 1), call(2, 1)])
    where = {entry: tensor.data_ptr() for entry, tensor in first.items()}
    later = [call(3, 1, timestep=5), call(4, 1, timestep=5)]
    second = filled(made, later)
    assert second is first
    assert {entry: tensor.data_ptr() for entry, tensor in second.items()} == where
    assert torch.equal(second[SCALE], torch.cat([part(each[SCALE], i) for i in (0, 1) for each in later]))
    assert second[TIME] == second.timesteps[0] == 5


def test_what_was_not_filled_is_not_there() -> None:
    made = place(2)
    calls = [call(1, 1), call(2, 1)]
    filled(made, calls)
    assert list(filled(made, calls, maps_alone=True)) == [WORDS]
    assert WORDS not in filled(made, [each.without("attention") for each in calls])


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = call(1, 1), call(2, 1)
    with pytest.raises(BaseMismatchError, match="one base keeps e of the call and another does not"):
        filled(place(2), [one, other.without("attention")])
    with pytest.raises(BaseMismatchError, match="recorded at timesteps 7 and 5"):
        filled(place(2), [one, call(2, 1, timestep=5)])
    with pytest.raises(BaseMismatchError, match="does not come to"):
        filled(place(3), [one, other])
    monkeypatch.setattr(joined_calls, "require_room", lambda *_: (_ for _ in ()).throw(BaseMemoryError("no room")))
    with pytest.raises(BaseMemoryError):
        filled(place(2), [one, other])
