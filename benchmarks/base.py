"""What bases take, by how they are kept and where: memory, recording, edits, and the first step from one on disk.

    python benchmarks/base.py --arch sd2 --size 768 --steps 50 --device cuda --json base.json

Random weights, a mask in the middle of the picture. ``peak_gib`` is the most memory of a GPU that tensors had, those of
the model included, while the first base and its first edit were made. ``record_ms`` is a generation that keeps a base,
``invert_ms`` the same of a photo, ``edit_ms`` an edit of it at each share of the picture, medians of wall times;
``to_disk_ms`` is one that is recorded onto the disk, where ``--folder`` is. From the moment at which a saved base is
opened it takes ``load_s`` until ``Editor.load`` returns, ``first_step_s`` until the first sparse step of an edit has
ended, ``loaded_edit_s`` until the edit has, and ``whole_s`` until a base that nobody edits is in memory as a whole. The
editor has made such edits before, so that no graph is captured, and the files are in the kernel's cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate

from fisedit_compile import Editor
from fisedit_compile.bench.edit.random_pipeline import random_pipeline
from fisedit_compile.masks.sample_masks import square_mask

PROMPT, EDIT = "a photo of a cat on a chair", "a photo of a dog on a chair"
KEPT = [("exact", "device"), ("balanced", "device"), ("balanced", "host"), ("small", "device"), ("small", "host")]


def main(argv: list[str] | None = None) -> None:
    """Measure each way to keep a base, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="tiny")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--edit-size", type=float, nargs="+", default=[0.05, 0.3])
    parser.add_argument("--kept", nargs="+", default=[",".join(each) for each in KEPT], metavar="CACHE,TIER")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for bases that are saved (default: where temporary files are)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = random_pipeline(
        args.arch, size=args.size, words=(PROMPT, EDIT), scheduler="ddim", device=device, dtype=dtype
    )
    rows = []
    for kept in args.kept:
        cache, tier = kept.split(",")
        rows.append({"cache": cache, "tier": tier, **_measure(pipe, args, cache, tier)})
        if args.json:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
            conditions = {**vars(args), "json": None, "folder": None, "device_name": name, "torch": torch.__version__}
            args.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1))
        print(tabulate(rows, headers="keys", floatfmt=".2f"), flush=True)


def _measure(pipe: Any, args: argparse.Namespace, cache: str, tier: str) -> dict[str, Any]:
    editor = Editor(pipe, {"cache": cache, "tier": tier})

    def generate(folder: Path | None = None) -> Any:
        noise = torch.Generator("cpu").manual_seed(0)
        size = {"height": args.size, "width": args.size}
        return editor.generate(PROMPT, num_inference_steps=args.steps, generator=noise, folder=folder, **size)

    def generate_onto_disk() -> None:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            generate(Path(folder) / "base")

    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    base = generate()
    height, width = base.latents.shape[2:]
    editor.edit(base, EDIT, square_mask(args.edit_size[0], (height, width)))
    row: dict[str, Any] = {"base_gib": base.nbytes / 2**30, "lies": base.tier}
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    row["call_mib"] = max(call.nbytes for call in base.calls) / 2**20
    row["record_ms"] = _milliseconds(generate, args)
    row["invert_ms"] = _milliseconds(partial(editor.invert, base.image, PROMPT, num_inference_steps=args.steps), args)
    row["to_disk_ms"] = _milliseconds(generate_onto_disk, args)
    for share in args.edit_size:
        mask = square_mask(share, (height, width))
        row[f"edit_ms_{share}"] = _milliseconds(partial(editor.edit, base, EDIT, mask), args)
        picture = editor.edit(base, EDIT, mask)
        row[f"step_ms_{share}"] = picture.report.unet_ms["sparse_step"]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        start = time.perf_counter()
        base.save(Path(folder) / "base")
        row["save_s"] = time.perf_counter() - start
        loaded_at, ends = time.perf_counter(), list[float]()

        def step_ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if not ends:
                _synchronize()
                ends.append(time.perf_counter() - loaded_at)
            return tensors

        loaded = editor.load(Path(folder) / "base")
        row["load_s"] = time.perf_counter() - loaded_at
        again = editor.edit(loaded, EDIT, mask, callback_on_step_end=step_ended)
        row["first_step_s"], row["loaded_edit_s"] = ends[0], time.perf_counter() - loaded_at
        assert torch.equal(again.latents, picture.latents)
        del loaded
        loaded_at = time.perf_counter()
        editor.load(Path(folder) / "base").wait()
        row["whole_s"] = time.perf_counter() - loaded_at
    del base
    editor.free()
    return row


def _milliseconds(run: Callable[[], object], args: argparse.Namespace) -> float:
    times = []
    for _ in range(args.repeats):
        _synchronize()
        start = time.perf_counter()
        run()
        _synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
