"""The benchmark of one U-Net call: dense, eager and compiled, against a sparse step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fisedit_compile.architectures import build_unet, unet_inputs
from fisedit_compile.bench.gpu_counters import count_kernels
from fisedit_compile.bench.masks import MaskSet
from fisedit_compile.bench.progress import say
from fisedit_compile.bench.unet.curve import curves
from fisedit_compile.bench.unet.dense import GRAPHS, dense_runs
from fisedit_compile.bench.unet.settings import Settings
from fisedit_compile.bench.unet.sparse import SparseRuns


@torch.no_grad()
def bench_unet(
    settings: Settings,
    mask_sets: Sequence[MaskSet],
    device: torch.device,
    dtype: torch.dtype,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Time one U-Net call with random weights of the true shapes.

    Dense calls and the sparse steps of all masks take turns in one loop, once for each attention mode. On CUDA the
    dense U-Net runs in ``channels_last``.

    Args:
        settings: what is measured and how.
        mask_sets: each makes one row for each attention mode.
        device: where everything runs.
        dtype: the dtype of weights and activations.
        keep: called with the result so far, after each attention mode and at the end.

    Returns:
        ``compile_seconds`` and ``failed`` by dense baseline; ``first_steps``, ``crossover`` and ``line`` by attention
        mode; and ``rows``, one for each attention mode and set of masks. ``benchmarks/README.md`` says what they hold.
    """
    say(f"building {settings.arch} with random weights ...")
    unet = build_unet(settings.arch, device=device, dtype=dtype)
    if device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    inputs = unet_inputs(unet, batch=settings.batch, height=settings.size, width=settings.size)
    dense = dense_runs(unet, *inputs, settings.baselines, device)
    result: dict[str, Any] = {"compile_seconds": dense.compile_seconds, "failed": dense.failed, "first_steps": {}}
    result["rows"] = []
    modes = []
    for attention in settings.attentions:
        mode = SparseRuns(attention, unet, inputs, settings, mask_sets, device)
        result["first_steps"][attention] = mode.start()
        result["rows"] += mode.measure(dense)
        result.update(curves(result["rows"]))
        keep(result)
        modes.append(mode)
    launches = {name: None if name == GRAPHS else count_kernels(run, device) for name, run in dense.runs.items()}
    for mode in modes:
        mode.count_launches(launches)
    keep(result)
    say("done")
    return result
