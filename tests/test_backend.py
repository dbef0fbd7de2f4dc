"""The torch.compile backend: dense outside, recording and sparse inside its contexts."""

from __future__ import annotations

import pytest
import torch

from fisedit_compile.architectures import build_unet, unet_inputs
from fisedit_compile.backend import editing, fisedit, recording
from fisedit_compile.errors import BaseMismatchError, CaptureError, MaskError
from fisedit_compile.testing import assert_close


@pytest.fixture(scope="module")
def unet():
    return build_unet("tiny")


@pytest.fixture(scope="module")
def compiled(unet, monkeypatch_module):
    # Inductor's C++ takes a minute for a whole U-Net; what the backend adds around it is the same with eager code.
    monkeypatch_module.setattr(torch._dynamo, "lookup_backend", lambda name: lambda graph_module, inputs: graph_module)
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


def test_refuses_an_unknown_option(compiled):
    with pytest.raises(Exception, match="unknown config field"):
        torch.compile(torch.nn.Linear(4, 4), backend=fisedit, options={"sparsity": 1})(torch.zeros(2, 4))
