"""The process that ``fisedit-compile bench start`` times, from its imports to its second sparse step.

    python -m fisedit_compile.bench.startup.stages '{"arch": "sd2", ...}'

It prints one line of JSON with the seconds of each stage.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

_BEGIN = time.perf_counter()


def stages(wanted: dict[str, Any], begin: float) -> dict[str, float]:
    """Run all stages and return the seconds of each by name.

    Args:
        wanted: ``arch``, ``size``, ``batch``, ``edit_size``, ``attention``, ``compile_sparse``, ``device``, ``dtype``
            and ``threads``, as ``bench start`` writes them.
        begin: the time of ``time.perf_counter`` at which the first stage, the imports, began.
    """
    import torch

    seconds: dict[str, float] = {}
    device = torch.device(wanted["device"])
    last = begin

    def done(stage: str) -> None:
        nonlocal last
        if device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        seconds[stage], last = now - last, now

    torch.set_num_threads(wanted["threads"])
    done("import torch")
    from fisedit_compile.architectures import build_unet, unet_inputs
    from fisedit_compile.config import SparsityConfig
    from fisedit_compile.masks.sample_masks import square_mask
    from fisedit_compile.sparse_unet import sparsify

    done("import diffusers and fisedit_compile")
    with torch.no_grad():
        unet = build_unet(wanted["arch"], device=device, dtype=getattr(torch, wanted["dtype"]))
        if device.type == "cuda":
            unet.to(memory_format=torch.channels_last)
        args, kwargs = unet_inputs(unet, batch=wanted["batch"], height=wanted["size"], width=wanted["size"])
        mask = square_mask(wanted["edit_size"], (args[0].shape[-2], args[0].shape[-1]))
        done("build the U-Net")
        sparse = sparsify(unet, SparsityConfig(attention=wanted["attention"], compile=wanted["compile_sparse"]))
        call = sparse.call(*args, **kwargs)
        sparse.program(call)
        done("capture and rewrite")
        _, cache = sparse.record(call)
        done("record a base")
        prepared = sparse.prepare(call, mask)
        done("first plan")
        sparse.step(call, cache, prepared)
        done("first step")
        sparse.step(call, cache, prepared)
        done("second step")
    return seconds


if __name__ == "__main__":
    print(json.dumps(stages(json.loads(sys.argv[1]), _BEGIN)))
