"""Whether weights are the ones that something was made with: digests, and a watch by value and address."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fisedit_compile.runtime.fingerprint import Weights, WeightWatch, fingerprint

SAME, WRITTEN, MOVED = Weights.SAME, Weights.WRITTEN, Weights.MOVED


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8, 5), nn.Conv2d(2, 2, 1)
        return nn.Sequential(*layers).to(dtype)


@pytest.fixture
def watched() -> tuple[nn.Sequential, WeightWatch]:
    net = model()
    watch = WeightWatch(net)
    assert watch.look() is MOVED  # there is nothing to compare with yet
    assert watch.look() is SAME
    return net, watch


def _add_data(weight: torch.Tensor) -> None:
    weight.data += 0.1  # a LoRA is fused so; the version counter stays


def _add_in_place(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.add_(0.1)


def _scale_by_view(weight: torch.Tensor) -> None:
    weight.detach().view(-1).mul_(2)


@pytest.mark.parametrize("write", [_add_data, _add_in_place, _scale_by_view])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "2.weight", "3.bias"])
def test_a_weight_that_is_written_to(
    watched: tuple[nn.Sequential, WeightWatch], name: str, write: Callable[[torch.Tensor], None]
) -> None:
    net, watch = watched
    version = net.get_parameter(name)._version
    write(net.get_parameter(name))
    assert watch.look() is WRITTEN
    assert watch.look() is SAME
    if write is _add_data:
        assert net.get_parameter(name)._version == version


def test_a_weight_in_other_memory(watched: tuple[nn.Sequential, WeightWatch]) -> None:
    net, watch = watched
    net[0].weight.data = net[0].weight.data.clone()
    assert watch.look() is MOVED  # with the same values
    assert watch.look() is SAME
    net[0].weight.data += 1
    assert watch.look() is WRITTEN  # seen at the new address


def test_a_model_in_another_dtype_or_layout_has_moved(watched: tuple[nn.Sequential, WeightWatch]) -> None:
    net, watch = watched
    net.half()
    assert watch.look() is MOVED
    net.to(memory_format=torch.channels_last)
    assert watch.look() is MOVED
    assert watch.look() is SAME


def test_written_and_moved_is_moved(watched: tuple[nn.Sequential, WeightWatch]) -> None:
    net, watch = watched
    net[0].weight.data = net[0].weight.data + 1
    net[2].weight.data += 1
    assert watch.look() is MOVED
    assert watch.look() is SAME


def test_what_is_written_and_taken_back_is_the_same(watched: tuple[nn.Sequential, WeightWatch]) -> None:
    net, watch = watched
    kept = net[2].weight.detach().clone()
    net[2].weight.data += 1
    net[2].weight.data.copy_(kept)
    assert watch.look() is SAME


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_watched_and_several_in_one_model(dtype: torch.dtype) -> None:
    net = model()
    net[2].to(dtype)
    watch = WeightWatch(net)
    watch.look()
    assert watch.look() is SAME
    net[2].weight.data *= 2
    assert watch.look() is WRITTEN
    net[0].weight.data *= 2
    assert watch.look() is WRITTEN


@pytest.fixture
def elements_made(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many elements ``reshape`` and ``contiguous`` have copied."""
    copied = 0
    reshape = torch.Tensor.reshape

    def counted(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        nonlocal copied
        out = reshape(tensor, *shape)
        copied += out.numel() * (out.data_ptr() != tensor.data_ptr())
        return out

    monkeypatch.setattr(torch.Tensor, "reshape", counted)
    return lambda: copied


def test_a_channels_last_model_is_sampled_where_it_lies(elements_made: Callable[[], int]) -> None:
    """Copying every weight of a large U-Net for a few samples would take longer than the step."""
    net = model().to(memory_format=torch.channels_last)
    assert not net[0].weight.is_contiguous()
    watch = WeightWatch(net)
    watch.look()
    assert watch.look() is SAME
    assert elements_made() == 0
    net[0].weight.data += 0.1
    assert watch.look() is WRITTEN
    assert elements_made() == 0


def test_a_weight_that_is_no_block_of_memory_is_watched_too() -> None:
    net = nn.Linear(6, 4)
    net.weight = nn.Parameter(torch.randn(4, 12, generator=torch.Generator().manual_seed(0))[:, ::2])
    watch = WeightWatch(net)
    watch.look()
    assert watch.look() is SAME
    net.weight.data += 1
    assert watch.look() is WRITTEN


def test_a_model_without_weights_is_the_same() -> None:
    watch = WeightWatch(nn.SiLU())
    assert watch.look() is SAME


def test_a_digest_copies_no_weight(elements_made: Callable[[], int]) -> None:
    fingerprint(model().to(memory_format=torch.channels_last))
    assert elements_made() == 0


def test_a_digest_is_of_values_names_shapes_dtypes_and_config() -> None:
    net = model()
    digest = fingerprint(net)
    assert digest == fingerprint(model())
    assert len(digest) == 32
    assert digest == fingerprint(model().to(memory_format=torch.channels_last))  # as bases are made on a GPU
    others = [model(torch.float16), nn.Sequential(*model()[:3]), nn.ModuleDict({"net": model()})]
    written = model()
    written[1].bias.data += 1
    configured = model()
    configured.config = {"sample_size": 64}  # type: ignore[assignment]
    hidden = model()
    hidden.config = {"_name_or_path": "/somewhere"}  # type: ignore[assignment]
    digests = [fingerprint(each) for each in (*others, written, configured)]
    assert len({digest, *digests}) == 6
    assert fingerprint(hidden) == digest
