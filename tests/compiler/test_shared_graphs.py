"""U-Nets that differ in the values of their weights alone share their graphs; any other difference makes new ones."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import embeddings
from diffusers.models.attention_processor import AttnProcessor
from support.changes import Weaker, adapters
from support.unets import UNets

from fisedit_compile import sparsify
from fisedit_compile.errors import BaseMismatchError, CaptureError
from fisedit_compile.masks.sample_masks import square_mask
from fisedit_compile.sparse_unet import SparseUNet
from fisedit_compile.utils.exchanged_functions import exchanged_functions

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {"dense_below": 4, "dense_above": 1.0}
SIZE = (16, 16)


def other(unets: UNets, change: Callable[[Any], object] = lambda unet: None) -> SparseUNet:
    """A U-Net of its own weights, changed before it is captured."""
    unet = unets.fresh("micro")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.25)
    change(unet)
    return sparsify(unet, CONFIG)


def weaker(unet: Any) -> None:
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(0.8)


def lowered(unets: UNets, sparse: SparseUNet) -> Any:
    args, kwargs = unets.inputs("micro", 2, SIZE, sparse.unet.dtype)
    return sparse.program(sparse.call(*args, **kwargs)).lowered


def edited(unets: UNets, sparse: SparseUNet, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A sparse step with all pixels active, and the dense U-Net's output for the same inputs."""
    _, cache = sparse.record(unets.call(sparse, "micro", 2, SIZE))
    call = unets.call(sparse, "micro", 2, SIZE, seed)
    full = torch.ones(1, *SIZE, dtype=torch.bool)
    args, kwargs = unets.inputs("micro", 2, SIZE, sparse.unet.dtype, seed)
    with torch.no_grad():
        dense = sparse.unet(*args, **kwargs).sample
    return sparse.step(call, cache, sparse.prepare(call, full)), dense


class TestOfOneForm:
    def test_they_share_graphs_and_each_computes_by_its_own_weights(self, unets: UNets) -> None:
        first, second = other(unets, weaker), other(unets)
        assert lowered(unets, first) is lowered(unets, second)
        steps = []
        for sparse in (first, second):
            step, dense = edited(unets, sparse)
            torch.testing.assert_close(step, dense)
            steps.append(step)
        assert not torch.allclose(*steps, rtol=1e-2)
        torch.testing.assert_close(edited(unets, first)[0], steps[0])  # the second has left the first as it was

    def test_so_do_those_whose_statistics_follow(self, unets: UNets) -> None:
        first, second = other(unets, weaker), other(unets)
        assert lowered(unets, first).following is not None
        assert lowered(unets, first).following is lowered(unets, second).following

    def test_the_graphs_keep_no_unet_alive(self, unets: UNets) -> None:
        sparse = other(unets)
        shared = lowered(unets, sparse)
        edited(unets, sparse)
        gone = [weakref.ref(sparse.unet), *(weakref.ref(each) for each in sparse.unet.parameters())]
        del sparse
        gc.collect()
        assert [each() for each in gone] == [None] * len(gone)
        assert lowered(unets, other(unets)) is shared

    def test_what_one_prepared_is_not_the_other_s(self, unets: UNets) -> None:
        first, second = unets.sparse("micro"), other(unets)
        call = unets.call(second, "micro", 2, SIZE)
        _, cache = second.record(call)
        prepared = first.prepare(unets.call(first, "micro", 2, SIZE), square_mask(0.1, SIZE))
        assert first.program(call).owns(prepared)
        assert not second.program(call).owns(prepared)
        with pytest.raises(BaseMismatchError, match="another one than it was prepared for"):
            second.step(call, cache, prepared)

    def test_weights_that_are_replaced_or_written_to_later_count(self, unets: UNets) -> None:
        first, second = unets.sparse("micro"), other(unets)
        before, _ = edited(unets, second)
        with torch.no_grad():
            second.unet.conv_in.weight.mul_(2)
        second.unet.conv_out.weight = torch.nn.Parameter(first.unet.conv_out.weight.detach() * 3)
        step, dense = edited(unets, second)
        torch.testing.assert_close(step, dense)
        assert not torch.allclose(step, before, rtol=1e-2)
        assert torch.equal(first.unet.conv_out.weight * 3, second.unet.conv_out.weight)


def widened(unet: Any) -> None:
    """Another number of channels between two linear layers, with the same config."""
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    inner = block.ff.net[2].in_features
    block.ff.net[0].proj = torch.nn.Linear(block.ff.net[0].proj.in_features, 4 * inner, dtype=torch.float64)
    block.ff.net[2] = torch.nn.Linear(2 * inner, block.ff.net[2].out_features, dtype=torch.float64)


def tied(unet: Any) -> None:
    """Two layers of equal shapes that share a weight."""
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.to_k.weight = attention.to_q.weight


class ScaledByATensor(AttnProcessor):
    """Holds a tensor that is no parameter of the U-Net."""

    def __init__(self, share: float, as_number: bool = False) -> None:
        self.share, self.as_number = torch.tensor(share, dtype=torch.float64), as_number

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        share = self.share.item() if self.as_number else self.share
        return super().__call__(*args, **kwargs) * share


DIFFERENCES: dict[str, Callable[[Any], object]] = {
    "channels": widened,
    "tied weights": tied,
    "dtype": lambda unet: unet.float(),
    "memory format": lambda unet: unet.to(memory_format=torch.channels_last),
    "processor": lambda unet: unet.set_attn_processor(Weaker(0.5)),
    "tensor of a processor": lambda unet: unet.set_attn_processor(ScaledByATensor(0.5)),
    "LoRA": lambda unet: adapters(unet, "snow"),
    "hook": lambda unet: unet.mid_block.register_forward_hook(lambda module, args, out: out * 1.5),
    "scale": lambda unet: setattr(unet.down_blocks[0].resnets[0], "output_scale_factor", 1.5),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_makes_graphs_of_its_own(unets: UNets, name: str) -> None:
    sparse = other(unets, DIFFERENCES[name])
    assert lowered(unets, sparse) is not lowered(unets, unets.sparse("micro"))
    step, dense = edited(unets, sparse)
    torch.testing.assert_close(step, dense)


def test_a_function_of_a_library_that_is_exchanged_makes_graphs_of_its_own(
    unets: UNets, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = other(unets)
    shared = lowered(unets, first)
    embedding = embeddings.get_timestep_embedding

    @functools.wraps(embedding)
    def weaker_embedding(*args: Any, **kwargs: Any) -> torch.Tensor:
        return embedding(*args, **kwargs) * 0.5

    monkeypatch.setattr(embeddings, "get_timestep_embedding", weaker_embedding)
    second = other(unets)
    assert lowered(unets, second) is not shared
    assert lowered(unets, second) is not lowered(unets, other(unets))  # whatever the function closes over
    step, dense = edited(unets, second)
    torch.testing.assert_close(step, dense)
    monkeypatch.undo()
    assert lowered(unets, other(unets)) is shared


def test_a_function_of_torch_that_is_exchanged_is_refused(unets: UNets, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls it again and again while it exports: what it adds would be in the graph several times."""
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda *args, **kwargs: 0.5 * interpolate(*args, **kwargs))
    with pytest.raises(CaptureError, match=r"torch\.nn\.functional\.interpolate is another function than torch's own"):
        lowered(unets, other(unets))


def test_nothing_is_exchanged_as_libraries_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exchanged_functions() == []
    monkeypatch.setattr(torch, "load", lambda *args: None)  # as many do, and no model calls it
    assert exchanged_functions() == []


@pytest.mark.parametrize("as_number", [False, True])
def test_graphs_that_hold_a_tensor_are_not_shared(unets: UNets, as_number: bool) -> None:
    """Nor its value, which is a number in the graph where the processor takes it as one."""
    first, second = (
        other(unets, lambda unet, share=share: unet.set_attn_processor(ScaledByATensor(share, as_number)))
        for share in (0.5, 0.25)
    )
    for sparse in (first, second):
        step, dense = edited(unets, sparse)
        torch.testing.assert_close(step, dense)
    assert lowered(unets, first) is not lowered(unets, second)


def test_another_size_or_config_makes_graphs_of_its_own(unets: UNets) -> None:
    sparse, masked = unets.sparse("micro"), unets.sparse("micro", attention="masked")
    graphs = [
        lowered(unets, sparse),
        lowered(unets, masked),
        sparse.program(unets.call(sparse, "micro", 2, (12, 16))).lowered,
        sparse.program(unets.call(sparse, "micro", 1, SIZE)).lowered,
    ]
    assert len(set(map(id, graphs))) == len(graphs)
