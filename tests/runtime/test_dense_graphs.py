"""The dense graphs of a U-Net: recorded and controlled arithmetic are the same."""

from __future__ import annotations

import pytest
import torch
from support.unets import UNets

from fisedit_compile.runtime.control import Control

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guided", [False, True])
def test_a_controlled_call_with_the_base_s_own_words_repeats_its_noise_prediction(
    unets: UNets, dtype: torch.dtype, guided: bool
) -> None:
    sparse = unets.sparse("micro", dtype)
    call = unets.call(sparse, "micro", 2, (16, 16))
    samples = 1 if guided else 2
    out, maps = sparse.record(call, samples=samples, activations=False, attention=True)
    assert maps
    tokens = next(iter(maps.values())).shape[-1]
    keep = torch.ones(samples, tokens)
    again = sparse.controlled(call, maps, Control(torch.eye(tokens).expand(samples, tokens, tokens), keep))
    assert torch.equal(again, out)
    own = sparse.controlled(call, maps, Control(torch.zeros(samples, tokens, tokens), torch.zeros_like(keep)))
    assert torch.equal(own, out)
