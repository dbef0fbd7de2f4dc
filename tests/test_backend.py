"""The torch.compile backend: dense outside, recording and sparse inside its contexts."""

from __future__ import annotations

import threading

import pytest
import torch
from support.unets import UNets

from fisedit_compile.architectures import unet_inputs
from fisedit_compile.backend import editing, fisedit, recording
from fisedit_compile.errors import BaseMismatchError, CaptureError, MaskError
from fisedit_compile.testing import assert_close


def eager(graph_module, inputs, **_):
    """Stands for Inductor, whose C++ takes a minute for a whole U-Net; what the backend adds around it is the same."""
    return graph_module


@pytest.fixture(scope="module")
def unet():
    return UNets.fresh("micro", torch.float32)


@pytest.fixture(scope="module")
def compiled(unet, monkeypatch_module):
    monkeypatch_module.setattr(torch._dynamo, "lookup_backend", lambda name: eager)
    return torch.compile(unet, backend=fisedit, options={"dense_below": 8})


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def base(compiled):
    args, kwargs = unet_inputs(compiled, batch=2, height=128, width=128)
    with recording() as base, torch.no_grad():
        out = compiled(*args, **kwargs).sample
    return args, out, base


def test_is_registered_by_name():
    assert "fisedit" in torch._dynamo.list_backends()


def test_is_dense_outside_its_contexts(unet, compiled, base):
    args, out, _ = base
    with torch.no_grad():
        assert torch.equal(compiled(*args).sample, unet(*args).sample)
        assert torch.equal(out, unet(*args).sample)


def test_reproduces_the_base_when_nothing_changes(compiled, base):
    args, out, recorded = base
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, 3:9, 5:12] = True
    with editing(recorded, mask), torch.no_grad():
        assert_close(compiled(*args).sample, out)


def test_changes_only_the_mask(unet, compiled, base):
    (sample, timestep, text), out, recorded = base
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, 3:9, 5:12] = True
    changed = torch.where(mask[:, None], sample + 1, sample)
    with editing(recorded, mask), torch.no_grad():
        edited = compiled(changed, timestep, text).sample
    outside = ~mask[:, None].expand_as(out)
    assert torch.equal(edited[outside], out[outside])
    assert not torch.allclose(edited[~outside], out[~outside])


@torch.no_grad()
def test_a_mask_over_dense_above_runs_the_dense_code(unet, compiled, base):
    args, out, recorded = base
    changed = (args[0] + 1, *args[1:])
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, :, :11] = True  # over 0.6 of the picture
    with editing(recorded, mask):
        edited = compiled(*changed).sample
    inside = mask[:, None].expand_as(out)
    assert torch.equal(edited[inside], unet(*changed).sample[inside])
    assert_close(edited[~inside], out[~inside])


def test_refuses_a_call_that_was_not_recorded(compiled, base):
    args, _, recorded = base
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    with editing(recorded, mask), torch.no_grad():
        compiled(*args)
        with pytest.raises(BaseMismatchError, match="call 2 of the edit"):
            compiled(*args)


def test_refuses_a_mask_of_another_resolution(compiled, base):
    args, _, recorded = base
    small = torch.ones(1, 8, 8, dtype=torch.bool)
    with editing(recorded, small), torch.no_grad(), pytest.raises(MaskError, match="resize"):
        compiled(*args)


def test_refuses_a_part_of_a_unet(monkeypatch_module, compiled):
    part = torch.compile(torch.nn.Linear(4, 4), backend=fisedit)
    with recording(), torch.no_grad(), pytest.raises(CaptureError, match="part of a U-Net"):
        part(torch.zeros(2, 4))


@pytest.mark.parametrize("option", ["sparsity", "triton.cudagraph"])
def test_refuses_an_unknown_option(compiled, option):
    with pytest.raises(Exception, match=rf"unknown option.*{option}.*dense_below.*Inductor"):
        torch.compile(torch.nn.Linear(4, 4), backend=fisedit, options={option: 1})(torch.zeros(2, 4))


def test_mode_and_options_of_inductor_are_its_own(monkeypatch_module, compiled):
    given = []

    def noted(graph_module, inputs, **options):
        given.append(options)
        return graph_module

    monkeypatch_module.setattr(torch._dynamo, "lookup_backend", lambda name: noted)
    try:
        for arguments in (
            {"mode": "reduce-overhead"},
            {"options": {"dense_below": 8, "triton.cudagraphs": True, "max-autotune": False}},
            {"mode": "default"},
        ):
            torch._dynamo.reset()
            torch.compile(torch.nn.Linear(4, 4), backend=fisedit, **arguments)(torch.zeros(2, 4))
    finally:
        monkeypatch_module.setattr(torch._dynamo, "lookup_backend", lambda name: eager)
        torch._dynamo.reset()
    assert given == [
        {"config_patches": {"triton.cudagraphs": True}},
        {"config_patches": {"triton.cudagraphs": True, "max_autotune": False}},
        {},
    ]


@pytest.fixture(scope="module")
def micro(compiled):
    """Another U-Net, compiled, and its inputs for latents of any size; behind all tests of ``compiled``."""
    torch._dynamo.reset()
    unet = UNets.fresh("micro", torch.float32)

    def inputs(batch, height, width):
        generator = torch.Generator().manual_seed(height + width)
        text = torch.randn(batch, 7, unet.config.cross_attention_dim, generator=generator)
        return torch.randn(batch, 4, height, width, generator=generator), torch.tensor(500), text

    yield unet, torch.compile(unet, backend=fisedit, options={"dense_below": 4}), inputs
    torch._dynamo.reset()


def box(size):
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, 2:7, 3:9] = True
    return mask


@torch.no_grad()
def test_each_size_and_batch_records(micro):
    unet, compiled, inputs = micro
    for batch, height, width in ((2, 16, 16), (2, 16, 24), (2, 16, 16), (1, 24, 24)):
        args = inputs(batch, height, width)
        plain = unet(*args).sample
        with recording() as base:
            assert_close(compiled(*args).sample, plain)
        with editing(base, box((height, width))):
            assert_close(compiled(*args).sample, plain)
        with editing(base, box((height, width))):
            changed = compiled(args[0] + 1, *args[1:]).sample
        outside = ~box((height, width))[:, None].expand_as(plain)
        assert_close(changed[outside], plain[outside])
        assert not torch.allclose(changed[~outside], plain[~outside])


@torch.no_grad()
def test_threads_take_turns(micro):
    unet, compiled, inputs = micro
    sizes = [(1, 16, 16), (2, 16, 16)]
    bases, plain, edited = {}, {}, {}
    for size in sizes:
        plain[size] = unet(*inputs(*size)).sample
        with recording() as bases[size]:
            compiled(*inputs(*size))

    @torch.no_grad()
    def edit(size):
        for _ in range(3):
            with editing(bases[size], box(size[1:])):
                edited.setdefault(size, []).append(compiled(*inputs(*size)).sample)

    threads = [threading.Thread(target=edit, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for size in sizes:
        assert len(edited[size]) == 3
        for each in edited[size]:
            assert_close(each, plain[size])
