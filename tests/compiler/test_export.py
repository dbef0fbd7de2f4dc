"""An export leaves torch as it was, whatever happens meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.unets import UNets
from torch import nn

from fisedit_compile.compiler.export import export
from fisedit_compile.errors import CaptureError
from fisedit_compile.ir.call import bind


def state_of_torch() -> tuple[object, ...]:
    compiler, config = torch.compiler, torch.fx.config
    return compiler.is_compiling(), compiler.is_exporting(), getattr(config, "do_not_emit_stack_traces", None)


def test_exports_of_several_threads_at_once() -> None:
    before = state_of_torch()
    made: list[Any] = []

    def work() -> None:
        unet = UNets.fresh("micro", torch.float32)
        call = bind(unet, (torch.zeros(1, 4, 16, 16), torch.tensor(1), torch.zeros(1, 7, 8)), {})
        with torch.no_grad():
            made.append(torch.equal(export(unet, call)(*call.tensors), unet(*call.tensors).sample))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [True] * 3
    assert state_of_torch() == before


def test_an_export_that_fails() -> None:
    before = state_of_torch()

    class Asking(nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return sample if sample.sum() > 0 else -sample

    with pytest.raises(CaptureError, match="asks for the value of a tensor"):
        export(Asking(), bind(Asking(), (torch.zeros(1, 4, 8, 8),), {}))
    assert state_of_torch() == before
