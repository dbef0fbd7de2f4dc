"""How long a dense call of a U-Net takes: eager, by rows, recorded, controlled; and a sparse step.

    python benchmarks/dense_calls.py --arch sd2 --size 768 --device cuda

Random weights, a batch of two (guidance), bf16 on a GPU, where dense calls run by operations on rows; elsewhere they
run by the dense graphs. A sparse step has the base's statistics of norms, or those that follow the edit, which the size
of its mask decides elsewhere, and is controlled or not. Printed are medians in milliseconds, all calls in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

import torch
from tabulate import tabulate

import fisedit_compile.planning.edit_plan as edit_plan
from fisedit_compile import sparsify
from fisedit_compile.architectures import ARCHITECTURES, build_unet, unet_inputs
from fisedit_compile.bench.timing import interleaved
from fisedit_compile.masks.sample_masks import square_mask
from fisedit_compile.runtime.control import Control


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sd2", choices=sorted(ARCHITECTURES))
    parser.add_argument("--size", type=int, default=768, help="of the square image, in pixels")
    parser.add_argument("--tokens", type=int, default=16, help="of the text whose maps are recorded")
    parser.add_argument("--edit-size", type=float, nargs="+", default=[0.05, 0.15, 0.30])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.no_grad():
        runs = _runs(args, device, dtype)
        times = interleaved(runs, repeats=args.repeats, warmup=2, device=device, label="calls")
    print(
        tabulate([[name, median(each.steady)] for name, each in times.items()], ["a call", "median ms"], floatfmt=".2f")
    )


def _runs(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    unet = build_unet(args.arch, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    given, named = unet_inputs(unet, batch=2, height=args.size, width=args.size)
    sparse = sparsify(unet, {"dense_above": 1.0})
    call = sparse.call(*given, **named)
    length = call.kwargs["encoder_hidden_states"].shape[1]
    control = Control(torch.eye(length, device=device)[None], torch.ones(1, length, device=device))
    maps = {"samples": 1, "attention": True, "tokens": args.tokens}
    _, cache = sparse.record(call, **maps)
    runs: dict[str, Callable[[], object]] = {
        "eager": lambda: unet(*given, **named),
        "dense": lambda: sparse.dense(call),
        "recorded": lambda: sparse.record(call, samples=1),
        f"recorded, with maps of {args.tokens} tokens": lambda: sparse.record(call, **maps),
        "controlled": lambda: sparse.controlled(call, cache, control),
    }
    for share in args.edit_size:
        mask = square_mask(share, call.signature.sample_shape[2:])  # type: ignore[arg-type]
        for above, statistics in ((1.0, "the base's statistics"), (0.0, "statistics that follow")):
            with patch.object(edit_plan, "FOLLOW_ABOVE", above):
                prepared = sparse.prepare(call, mask)
            runs[f"sparse, {share:.0%}, {statistics}"] = lambda prepared=prepared: sparse.step(  # type: ignore[misc]
                call, cache, prepared
            )
        runs[f"sparse, {share:.0%}, {statistics}, controlled"] = lambda prepared=prepared: sparse.step(  # type: ignore[misc]
            call, cache, prepared, control
        )
    return runs


if __name__ == "__main__":
    main()
