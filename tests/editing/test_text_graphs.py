"""Text encoders that are captured return what they return as they are, for every text and after every change."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from support.pipelines import tiny_pipeline
from torch import nn
from torch.utils import _pytree as pytree

from fisedit_compile.editing.text_graphs import TextGraphs, is_plain
from fisedit_compile.runtime.cuda_graph import GraphCapturer
from fisedit_compile.runtime.model_watch import ModelWatch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a CPU what would be captured is run on the graph's own inputs."""
    if request.param == "cpu":
        monkeypatch.setattr(TextGraphs, "_captures", lambda self, encoder, tensors: is_plain(encoder))
    return str(request.param)


@pytest.fixture
def encoder(device: str) -> Any:
    return tiny_pipeline().text_encoder.to(device)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    capture = GraphCapturer.capture
    monkeypatch.setattr(GraphCapturer, "capture", lambda self, run: made.append(1) or capture(self, run))
    return made


def tokens(seed: int, device: str, texts: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 8, (texts, 8), generator=generator).to(device)


def outputs(out: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]


def check(graphs: TextGraphs, encoder: Any, state: Any, ids: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        want = encoder(ids, **options)
        got = graphs.run("text_encoder", encoder, state, (ids,), options)
    assert type(got) is type(want)
    for one, other in zip(outputs(got), outputs(want), strict=True):
        torch.testing.assert_close(one, other)
    return outputs(got)


def test_every_text_gets_its_own_output(encoder: Any, device: str, captures: list[int]) -> None:
    graphs, state = TextGraphs(), ModelWatch(encoder).look()
    first = [check(graphs, encoder, state, tokens(seed, device)) for seed in range(4)]
    assert len(captures) == 1
    for seed, kept in enumerate(first):  # what was returned is not written to by later calls
        for one, other in zip(kept, check(graphs, encoder, state, tokens(seed, device)), strict=True):
            assert torch.equal(one, other)


def test_other_sizes_and_options_have_other_graphs(encoder: Any, device: str, captures: list[int]) -> None:
    graphs, state = TextGraphs(), ModelWatch(encoder).look()
    for _ in range(3):
        for seed, texts in ((0, 1), (1, 2)):
            check(graphs, encoder, state, tokens(seed, device, texts))
            check(graphs, encoder, state, tokens(seed, device, texts), output_hidden_states=True)
    assert len(captures) == 4


def test_a_changed_encoder_is_captured_anew(encoder: Any, device: str, captures: list[int]) -> None:
    graphs, watch = TextGraphs(), ModelWatch(encoder)
    for scale in (1.0, 2.0, 0.5):
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.mul_(scale)
        state = watch.look()
        for seed in range(3):
            check(graphs, encoder, state, tokens(seed, device))
    assert len(captures) == 3


def test_what_is_returned_can_be_written_to(encoder: Any, device: str) -> None:
    graphs, state = TextGraphs(), ModelWatch(encoder).look()
    check(graphs, encoder, state, tokens(0, device))
    for _ in range(3):
        with torch.inference_mode():
            out = graphs.run("text_encoder", encoder, state, (tokens(0, device),), {})
        if device == "cpu":  # the encoder itself ran, in inference mode
            continue
        with torch.no_grad():
            outputs(out)[0].zero_()
        check(graphs, encoder, state, tokens(0, device))


class ReadsTheDevice(nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids * int(ids.max())


@pytest.mark.gpu
def test_an_encoder_that_waits_for_its_device_runs_as_it_is(captures: list[int]) -> None:
    encoder, graphs = ReadsTheDevice().eval(), TextGraphs()
    state = ModelWatch(encoder).look()
    for seed in range(4):
        check(graphs, encoder, state, tokens(seed, "cuda"))
    assert len(captures) == 1


class TestIsPlain:
    def test_as_it_was_loaded(self) -> None:
        encoder: Any = tiny_pipeline().text_encoder
        encoder(tokens(0, "cpu"), output_hidden_states=True)
        assert is_plain(encoder)

    @pytest.mark.parametrize("change", ["hook", "offload", "forward", "compile"])
    def test_not_with(self, change: str) -> None:
        encoder: Any = tiny_pipeline().text_encoder
        part = next(module for module in encoder.modules() if isinstance(module, nn.LayerNorm))
        if change == "hook":
            part.register_forward_hook(lambda module, args, out: out * 2)
        elif change == "offload":
            import accelerate

            accelerate.cpu_offload(encoder, execution_device=torch.device("cpu"))
        elif change == "forward":
            part.forward = lambda x: x  # type: ignore[method-assign]
        else:
            encoder.compile()
        assert not is_plain(encoder)

    def test_not_where_it_was_compiled_as_a_whole(self) -> None:
        with contextlib.suppress(RuntimeError):  # where there is no compiler
            assert not is_plain(torch.compile(tiny_pipeline().text_encoder))  # type: ignore[arg-type]
