"""What an edit costs before its steps are like any other: from its mask to the end of its first sparse step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from fisedit_compile.cache.step_cache import StepCache
from fisedit_compile.ir.call import Call
from fisedit_compile.sparse_unet import SparseUNet


def measure_prep(
    sparse: SparseUNet, call: Call, cache: StepCache, masks: Sequence[Tensor], device: torch.device
) -> dict[str, float]:
    """Time the preparation of several edits, each after a first time that records what its sizes still need.

    Returns:
        Medians in milliseconds. ``prep_ms``: from a mask on the device to the end of the first step, less a later step
        of the same edit. Its parts: ``plan_ms``, the plan on the host; ``upload_ms``, padding it and bringing it to the
        device; ``prompt_ms``, the rest: the keys and values of the prompt, and putting all of it in place.
    """
    program = sparse.program(call)
    on_device = [mask.to(device) for mask in masks]
    plan, planned, first, later = [], [], [], []
    for mask in on_device:
        _first_step(sparse, call, cache, mask)
    for mask in on_device:
        plan.append(_milliseconds(partial(program.plan, mask), device))
        planned.append(_milliseconds(partial(sparse.plan, call, mask), device))
        first.append(_milliseconds(partial(_first_step, sparse, call, cache, mask), device))
        prepared = sparse.plan(call, mask)
        sparse.step(call, cache, prepared)
        later.append(_milliseconds(partial(sparse.step, call, cache, prepared), device))
    prep = median(a - b for a, b in zip(first, later, strict=True))
    return {
        "prep_ms": prep,
        "plan_ms": median(plan),
        "upload_ms": median(planned) - median(plan),
        "prompt_ms": prep - median(planned),
    }


def _first_step(sparse: SparseUNet, call: Call, cache: StepCache, mask: Tensor) -> Tensor:
    return sparse.step(call, cache, sparse.plan(call, mask))


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of a run that starts and ends on an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3
