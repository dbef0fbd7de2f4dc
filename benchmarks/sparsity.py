"""Shows how sparse edits are: the active share by resolution and tile size, and the multiply-accumulates that follow.

    python benchmarks/sparsity.py --masks FILE.npz --out out/sparsity

This is the analysis behind section 3.1 of the FISEdit paper (Yu et al. 2023), which computes high resolutions sparsely
and low ones densely: the larger the tiles that are computed whole, and the lower the resolution, the less a ragged mask
saves. It writes ``sparsity.png`` and ``sparsity.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fisedit_compile import FiseditError, SparsityConfig
from fisedit_compile.architectures import build_unet
from fisedit_compile.cli.runtime import whole_number
from fisedit_compile.macs.counter import MacCounter
from fisedit_compile.macs.report import NO_RESOLUTION
from fisedit_compile.masks.sample_masks import read_masks
from fisedit_compile.planning.apsc import expand_to_tiles

#: The sides of the square tiles that are compared: 1 is pixel-exact, and 2 is what the paper's objective (A.1) chooses.
TILE_SIDES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Share:
    """The share of a resolution's pixels that are active: mean, 5th and 95th percentile over all masks."""

    mean: float
    p5: float
    p95: float

    @classmethod
    def of(cls, active: Tensor) -> Share:
        """The share for ``active``, bool ``[n, h, w]``, with one entry for each mask."""
        shares = active.flatten(1).double().mean(1)
        p5, p95 = shares.quantile(torch.tensor([0.05, 0.95], dtype=torch.double)).tolist()
        return cls(float(shares.mean()), p5, p95)


def active_shares(masks: Tensor, resolutions: list[str]) -> dict[str, dict[int, Share]]:
    """The active share by resolution (``"HxW"``) and side of the tile, for tiles that fit into the resolution.

    Args:
        masks: bool ``[n, h, w]``; they are any-pooled to each resolution.
        resolutions: the resolutions, as ``"HxW"``.
    """
    shares = {}
    for resolution in resolutions:
        height, width = map(int, resolution.split("x"))
        pooled = F.adaptive_max_pool2d(masks[:, None].float(), (height, width))[:, 0] > 0
        tiles = [tile for tile in TILE_SIDES if tile <= min(height, width)]
        shares[resolution] = {tile: Share.of(expand_to_tiles(pooled, (tile, tile))) for tile in tiles}
    return shares


def macs_by_tile(counter: MacCounter, shares: dict[str, dict[int, Share]]) -> dict[str, dict[str, float]]:
    """The mean multiply-accumulates of a sparse step by side of the tile and resolution; ``"dense"`` is a dense call.

    With full attention all work at a sparse resolution is proportional to its active pixels. So a step with every pixel
    active is counted once and scaled. A resolution that is smaller than a tile is computed whole.
    """
    everything = torch.ones(1, *counter.latents, dtype=torch.bool)
    pixel = torch.zeros_like(everything)
    pixel[:, 0, 0] = True
    full = counter.step(counter.plan(everything)).by_resolution
    few, all_of_them = counter.plan(pixel).counts, counter.plan(everything).counts
    # A resolution below dense_below has the same rows for every mask, and is not sparse.
    sparse = {"{}x{}".format(*size) for size, count in all_of_them.items() if few[size] < count}
    steps: dict[str, dict[str, float]] = {"dense": dict(counter.dense.by_resolution)}
    for tile in TILE_SIDES:
        steps[str(tile)] = {
            resolution: macs * (shares[resolution][tile].mean if tile in shares[resolution] else 1.0)
            if resolution in sparse
            else float(macs)
            for resolution, macs in full.items()
        }
    return steps


def plot(shares: dict[str, dict[int, Share]], steps: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Write one picture of the active shares and of the multiply-accumulates."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for resolution, by_tile in shares.items():
        (line,) = left.plot(list(by_tile), [each.mean for each in by_tile.values()], marker="o", label=resolution)
        low, high = ([getattr(each, name) for each in by_tile.values()] for name in ("p5", "p95"))
        left.fill_between(list(by_tile), low, high, color=line.get_color(), alpha=0.08)
    left.set_xscale("log", base=2)
    left.set_xticks(TILE_SIDES, [f"{tile}x{tile}" for tile in TILE_SIDES])
    left.set(xlabel="tile", ylabel="active share (mean, 5th to 95th percentile)", ylim=(0, 1), title="Active pixels")
    left.legend(title="resolution")
    bottom = [0.0] * len(steps)
    names = [name if name == "dense" else f"{name}x{name}" for name in steps]
    for resolution in steps["dense"]:
        heights = [step.get(resolution, 0.0) / 1e9 for step in steps.values()]
        right.bar(names, heights, bottom=bottom, label="time and text" if resolution == NO_RESOLUTION else resolution)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for name, height in zip(names, bottom, strict=True):
        right.annotate(f"{height:,.3g}" if height < 100 else f"{height:,.0f}", (name, height), ha="center", va="bottom")
    right.set(xlabel="tile", ylabel="GMACs", title="A sparse step, full attention, batch 2")
    right.set_ylim(0, 1.2 * max(bottom))
    right.legend(loc="upper right", ncols=3, fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 for arguments that cannot be used."""
    parser = argparse.ArgumentParser(description="Active share and MACs of edits, by resolution and tile size.")
    parser.add_argument("--masks", type=Path, required=True, metavar="FILE.npz", help="real masks")
    parser.add_argument("--arch", default="sd2", help="(default: sd2)")
    parser.add_argument("--size", type=whole_number(8), default=768, metavar="PX", help="of the image (default: 768)")
    parser.add_argument("--out", type=Path, default=Path("out/sparsity"), metavar="DIR", help="(default: out/sparsity)")
    args = parser.parse_args(argv)
    try:
        result = analyse(args.masks, args.arch, args.size, args.out)
    except (FiseditError, ValueError, OSError) as error:
        print(f"sparsity: error: {error}", file=sys.stderr)
        return 2
    print(_text(result))
    return 0


def analyse(masks_file: Path, arch: str, size: int, out: Path) -> dict[str, Any]:
    """Make the analysis, write both files, and return the contents of the JSON file."""
    masks = read_masks(masks_file)
    filled = masks[masks.flatten(1).any(1)]
    if not len(filled):
        raise ValueError(f"{masks_file}: none of the {len(masks)} masks has an active pixel")
    unet = build_unet(arch, device="meta")
    counter = MacCounter.of(unet, height=size, width=size, config=SparsityConfig(attention="full"))
    resolutions = [name for name in counter.dense.by_resolution if name != NO_RESOLUTION]
    shares = active_shares(filled, resolutions)
    steps = macs_by_tile(counter, shares)
    title = f"{arch} at {size}x{size}, {len(filled)} masks of {masks_file.name}"
    out.mkdir(parents=True, exist_ok=True)
    plot(shares, steps, title, out / "sparsity.png")
    result = {
        "arch": arch,
        "size": size,
        "masks": {"source": masks_file.name, "used": len(filled), "empty": len(masks) - len(filled)},
        "active_share": {
            name: {tile: vars(share) for tile, share in by_tile.items()} for name, by_tile in shares.items()
        },
        "macs_by_tile": steps,
    }
    (out / "sparsity.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _text(result: dict[str, Any]) -> str:
    """The mean shares and the total MACs as a markdown table."""
    heads = ["tile", *result["active_share"], "GMACs a step", "dense / step"]
    lines = [heads, ["---:"] * len(heads)]
    dense = sum(result["macs_by_tile"]["dense"].values())
    for tile in TILE_SIDES:
        means = [by_tile.get(tile) for by_tile in result["active_share"].values()]
        total = sum(result["macs_by_tile"][str(tile)].values())
        cells = [f"{mean['mean']:.1%}" if mean else "all" for mean in means]
        lines.append([f"{tile}x{tile}", *cells, f"{total / 1e9:,.1f}", f"{dense / total:.2f}"])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    masks = result["masks"]
    return (
        f"{result['arch']} at {result['size']}x{result['size']}, batch 2, full attention; {masks['used']} masks of "
        f"{masks['source']} ({masks['empty']} empty ones left out); dense {dense / 1e9:,.1f} GMACs.\n\n{rows}"
    )


if __name__ == "__main__":
    sys.exit(main())
