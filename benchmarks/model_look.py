"""How long a look at a U-Net takes that tells whether it has changed since the last one.

    python benchmarks/model_look.py --arch sd2 sdxl --device cuda

Weights in bf16 of any values. Before each look other work overwrites the processor's caches, as a generation does
between two looks. Printed are milliseconds of wall time: the median and the 90th percentile.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from tabulate import tabulate

from fisedit_compile.architectures import ARCHITECTURES
from fisedit_compile.bench.timing import Spread
from fisedit_compile.runtime.model_watch import ModelWatch

#: Bytes that are written before each look: more than the caches of any processor.
_CACHES = 256 * 2**20


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sd2", "sdxl"], choices=sorted(ARCHITECTURES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--looks", type=int, default=40)
    args = parser.parse_args()
    rows = []
    for arch in args.arch:
        watch = ModelWatch(_unet(arch, torch.device(args.device)))
        watch.look()
        for name, values in (("with sampled values", True), ("version counters and addresses alone", False)):
            spread = _time(lambda values=values, watch=watch: watch.look(values=values), args.looks)  # type: ignore[misc]
            rows.append([arch, name, spread.median, spread.p90])
    print(tabulate(rows, headers=["U-Net", "a look", "median ms", "p90 ms"], floatfmt=".2f"))


def _unet(arch: str, device: torch.device) -> torch.nn.Module:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**ARCHITECTURES[arch])
    return torch.nn.Module.to(unet, torch.bfloat16).to_empty(device=device)


def _time(look: Callable[[], object], looks: int) -> Spread:
    caches, milliseconds = np.zeros(_CACHES, dtype=np.uint8), []
    for _ in range(looks):
        caches += 1
        start = time.perf_counter()
        look()
        milliseconds.append((time.perf_counter() - start) * 1e3)
    return Spread.of(milliseconds)


if __name__ == "__main__":
    main()
