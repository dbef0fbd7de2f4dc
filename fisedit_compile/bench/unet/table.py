"""The result of ``fisedit-compile bench unet`` as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table with one line for each row; columns that only a GPU has are left out on the CPU."""
    first = rows[0]
    baselines = list(first["dense_ms"])
    on_gpu = first["prep_ms"] is not None
    heads = ["edit size", "attention", *(f"{name} ms" for name in baselines), "sparse ms"]
    heads += ["x eager"] if "eager" in baselines else []
    heads += ["x compiled"] if first["fastest_compiled"] else []
    heads += ["dense GMAC", "sparse GMAC", "ratio"]
    heads += ["TFLOP/s", "launches", "prep ms", "peak MB"] if on_gpu else []
    lines = [heads]
    for row in rows:
        several = f" (mean of {row['masks']['used']})" if row["masks"]["source"] != "square" else ""
        cells = [f"{row['edit_size']:.1%}{several}", row["attention"]]
        cells += [*(f"{row['dense_ms'][name]:.2f}" for name in baselines), f"{row['sparse_ms']:.2f}"]
        cells += [f"{row['speedup']['eager']:.2f}"] if "eager" in baselines else []
        cells += [f"{row['speedup_compiled']:.2f}"] if first["fastest_compiled"] else []
        macs = row["macs"]
        cells += [f"{macs['dense'] / 1e9:.1f}", f"{macs['sparse'] / 1e9:.1f}", f"{macs['ratio']:.2f}"]
        if on_gpu:
            launches = row["launches"]["sparse"]
            cells += [f"{row['tflops']['sparse']:.0f}", "?" if launches is None else str(launches)]
            cells += [f"{row['prep_ms']:.1f}", f"{row['recording_peak_mb']:.0f}"]
        lines.append(cells)
    return tabulate(lines, tablefmt="plain", stralign="right", disable_numparse=True)


def summary(result: dict[str, Any]) -> str:
    """The lines below the table: what "compiled" means, batched edits, crossovers, and what went wrong."""
    fastest = {row["fastest_compiled"] for row in result["rows"]} - {None}
    lines = [f"x compiled: against the fastest of those measured, {' or '.join(sorted(fastest))}"] if fastest else []
    for row in result["rows"]:
        if batched := row.get("batched"):
            lines.append(
                f"{batched['edits']} edits of {row['edit_size']:.0%} in one batch, {row['attention']} attention: "
                f"{batched['ms']:.2f} ms, one at a time {batched['ms_one_at_a_time']:.2f} ms "
                f"({batched['throughput_ratio']:.2f}x)"
            )
    for attention, share in result["crossover"].items():
        if share is not None:
            lines.append(f"{attention} attention: the fastest dense call wins from {share:.0%} of the latents on")
    for name, reason in result["failed"].items():
        lines.append(f"left out: {name} ({reason})")
    unexpected = [row for row in result["rows"] if row["captures"] or row["recompiles"]]
    if unexpected:
        lines.append("something was compiled or captured while timing: see captures and recompiles in the JSON file")
    return "\n".join(lines)
