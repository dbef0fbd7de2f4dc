"""``fisedit-compile bench kernels``: each row kernel against its dense counterpart and against its floor."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fisedit_compile.cli.edit_options import add_edit_sizes
from fisedit_compile.cli.json_file import check_json_path, write_json
from fisedit_compile.cli.runtime import add_runtime_options, describe, start

_EDIT_SIZES = (0.05, 0.15, 0.30, 1.0)

#: Enough for all sizes: 90 s for half of them on one GPU.
_SWEEP_SECONDS = 300.0

_METHOD = """\
Shapes are those of Stable Diffusion 2 at 768x768 with guidance; masks are squares in the middle. A time is the median
of replays of a CUDA graph with the L2 cache emptied before each (triton.testing.do_bench). The floor is the greater of
the bytes that must move, at the rate of a copy of 1 GiB, and the multiply-accumulates, at the rate of a square matrix
product of 8192; both rates are measured before ("roof" in the file).

--sweep times the tiles of the product of rows (convolution and linear layer) at many sizes, beside cuBLAS. With --json
its file is what the choice of tiles reads: kernels/implicit_gemm/row_product_tiles.json."""


def add_parser(what: Any) -> None:
    """Add the subcommand to those of ``bench``."""
    parser = what.add_parser(
        "kernels",
        help="each row kernel (CUDA)",
        description="Time each row kernel against its dense counterpart and its floor.",
        epilog=_METHOD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_edit_sizes(parser, _EDIT_SIZES)
    parser.add_argument("--sweep", action="store_true", help="time the tiles of the convolution instead")
    add_runtime_options(parser, cuda_dtype="bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and conditions to FILE")
    parser.set_defaults(run=run_kernels)


def run_kernels(args: argparse.Namespace) -> None:
    """Measure, print the table, write the file."""
    check_json_path(args.json)
    device, dtype = start(args)
    if device.type != "cuda":
        raise ValueError(f"bench kernels --device {args.device}: the kernels run on CUDA alone; this is {device}")

    import torch

    from fisedit_compile.bench.kernels.cases import all_cases, measure
    from fisedit_compile.bench.kernels.sweep import sweep
    from fisedit_compile.bench.kernels.timing import Roof

    # cuDNN tries its kernels before it is timed: the strongest dense counterpart
    with torch.no_grad(), torch.cuda.device(device), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        conditions = {"command": args.command_line, **describe(device, dtype)}
        rows: list[dict[str, Any]]
        if args.sweep:
            rows, skipped = sweep(device, dtype, _SWEEP_SECONDS)
            shown = [["rows", "depth", "out", "geglu", "best tile", "us", "cuBLAS us"]]
            shown += [
                [
                    *(str(row[name]) for name in ("rows_out", "depth", "filters_out", "geglu")), _tile(row),
                    f"{row['us']:.1f}", f"{row['library_us']:.1f}",
                ]
                for row in rows
            ]  # fmt: skip
            if skipped:
                print(f"out of time: {skipped} sizes were not timed", file=sys.stderr)
        else:
            roof = Roof.measured(device, dtype)
            conditions["roof"] = asdict(roof)
            rows = [asdict(measure(case, roof)) for case in all_cases(args.edit_size, device, dtype)]
            shown = [["kernel", "shape", "edit", "rows", "us", "dense us", "x dense", "floor us", "x floor"]]
            shown += [
                [
                    row["kernel"], row["shape"], f"{row['edit_size']:.0%}", str(row["rows"]), f"{row['us']:.1f}",
                    f"{row['dense_us']:.1f}", f"{row['dense_us'] / row['us']:.2f}",
                    f"{row['floor_us']:.1f}", f"{row['us'] / row['floor_us']:.1f}",
                ]
                for row in rows
            ]  # fmt: skip
    print(f"{conditions['device_name']}, {conditions['dtype']}, torch {conditions['versions']['torch']}")
    print(tabulate(shown, tablefmt="plain", stralign="right", colalign=("left", "left"), disable_numparse=True))
    write_json(args.json, {**conditions, "best" if args.sweep else "rows": rows})


def _tile(row: dict[str, Any]) -> str:
    second = "+" if row["second_kernel"] else ""
    return f"{row['rows']}x{row['filters']}x{row['channels']} /{row['splits']}{second} w{row['warps']} s{row['stages']}"
