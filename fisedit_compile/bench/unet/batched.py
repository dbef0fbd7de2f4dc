"""Times several edits with different masks in one U-Net batch, against the same edits one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from fisedit_compile.architectures import unet_inputs
from fisedit_compile.bench.masks import scattered_squares
from fisedit_compile.bench.progress import say
from fisedit_compile.bench.timing import interleaved
from fisedit_compile.bench.unet.settings import Settings
from fisedit_compile.cache.step_cache import StepCache
from fisedit_compile.ir.call import Call
from fisedit_compile.sparse_unet import SparseUNet


def measure_batched(
    sparse: SparseUNet,
    call: Call,
    cache: StepCache,
    edit_sizes: Sequence[float],
    settings: Settings,
    device: torch.device,
) -> dict[float, dict[str, Any]]:
    """Time ``settings.edits`` edits together and alone, for each edit size; masks are squares at different places.

    Returns:
        For each edit size a dict: ``edits``, their number; ``ms``, the time of a step of all of them in one batch;
        ``ms_one_at_a_time``, the sum of the times of a step of each; and ``throughput_ratio``, how many times as many
        edits the batch does in the same time.
    """
    say(f"{settings.edits} edits in one batch ...")
    count = settings.edits
    args, kwargs = unet_inputs(sparse.unet, batch=count * settings.batch, height=settings.size, width=settings.size)
    together = sparse.call(*args, **kwargs)
    _, together_cache = sparse.record(together)
    latents = tuple(args[0].shape[-2:])
    runs: dict[Any, Callable[[], object]] = {}
    for edit_size in edit_sizes:
        masks = scattered_squares(edit_size, (latents[0], latents[1]), count)
        prepared = sparse.prepare(together, torch.cat(masks))
        runs[edit_size, "together"] = partial(sparse.step, together, together_cache, prepared)
        for i, mask in enumerate(masks):
            runs[edit_size, i] = partial(sparse.step, call, cache, sparse.prepare(call, mask))
    for run in runs.values():
        run()  # compiles and captures what this run needs for the first time
    label = f"{count} edits in one batch"
    with sparse.looked_at():
        times = interleaved(runs, repeats=settings.repeats, warmup=settings.warmup, device=device, label=label)
    rows = {}
    for edit_size in edit_sizes:
        ms = median(times[edit_size, "together"].steady)
        alone = sum(median(times[edit_size, i].steady) for i in range(count))
        rows[edit_size] = {"edits": count, "ms": ms, "ms_one_at_a_time": alone, "throughput_ratio": alone / ms}
    return rows
