"""``fisedit-compile bench kernels``: times each row kernel against its dense counterpart and its floor."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from fisedit_compile.cli.edit_options import EDIT_SIZES, add_edit_sizes
from fisedit_compile.cli.json_file import add_json_option, check_json_path, write_json
from fisedit_compile.cli.runtime import add_runtime_options, describe, start

#: Seconds after which a sweep skips the sizes that are left. This is enough for all: half of them take 90 s on one GPU.
_SWEEP_SECONDS = 300.0

_METHOD = """\
Shapes are those of Stable Diffusion 2 at 768x768 with guidance; masks are squares in the middle. A time is the median
over replays of a CUDA graph, with the L2 cache emptied before each (triton.testing.do_bench). The floor is the least
time that the device allows: that of moving the bytes that must move, at the rate of a copy of 1 GiB, or that of the
multiply-accumulates, at the rate of a product of two matrices of 8192 x 8192, whichever is longer. Both rates are
measured first ("roof" in the file).

--sweep times the tiles of the product of rows (convolution and linear layer) at many sizes, and cuBLAS with them. The
file that --json then writes is the one that tiles are chosen from: kernels/implicit_gemm/row_product_tiles.json."""


def add_parser(what: Any) -> None:
    """Add the subcommand to those of ``bench``."""
    parser = what.add_parser(
        "kernels",
        help="each row kernel (CUDA)",
        description="Time each row kernel against its dense counterpart and its floor.",
        epilog=_METHOD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_edit_sizes(parser, (*EDIT_SIZES, 1.0))
    parser.add_argument("--sweep", action="store_true", help="time the tiles of the product of rows instead")
    add_runtime_options(parser, cuda_dtype="bf16")
    add_json_option(parser)
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

    # with benchmark=True cuDNN picks its fastest kernel, so that the dense counterpart is as strong as it can be
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
