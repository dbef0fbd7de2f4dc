"""Times what an edit does once before its sparse steps: planning its mask and what depends on its prompt alone."""

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
    """Time the preparation of several edits. Each is prepared once before, to compile and capture what it needs.

    Returns:
        Medians over the edits, in milliseconds. ``prep_ms`` is the time from a mask on the device to the end of the
        first step, less that of a later step of the same edit. It has three parts: ``plan_ms``, making the plan on the
        host; ``upload_ms``, padding it and copying it to the device; and ``prompt_ms``, the rest, which computes the
        prompt's keys and values and puts everything where the step reads it.
    """
    program = sparse.program(call)
    on_device = [mask.to(device) for mask in masks]
    plan, planned, first, later = [], [], [], []
    for mask in on_device:
        _first_step(sparse, call, cache, mask)
    for mask in on_device:
        plan.append(_milliseconds(partial(program.plan, mask), device))
        planned.append(_milliseconds(partial(sparse.prepare, call, mask), device))
        first.append(_milliseconds(partial(_first_step, sparse, call, cache, mask), device))
        prepared = sparse.prepare(call, mask)
        sparse.step(call, cache, prepared)
        with sparse.looked_at():  # as an editor does, once an edit: it is a part of what comes before the steps
            later.append(_milliseconds(partial(sparse.step, call, cache, prepared), device))
    prep = median(a - b for a, b in zip(first, later, strict=True))
    return {
        "prep_ms": prep,
        "plan_ms": median(plan),
        "upload_ms": median(planned) - median(plan),
        "prompt_ms": prep - median(planned),
    }


def _first_step(sparse: SparseUNet, call: Call, cache: StepCache, mask: Tensor) -> Tensor:
    return sparse.step(call, cache, sparse.prepare(call, mask))


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The wall time of a run that starts and ends on an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3
