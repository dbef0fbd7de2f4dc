"""From a mask to the index tensors that a sparse graph takes as inputs; made once for each edit, before its steps.

Inside the sparse region a spatial value is *rows* ``[M, *C]``: one row for each active pixel of any sample of the
U-Net's batch, sorted by (sample, y, x). At a resolution (H, W) the pixel id of (sample b, y, x) is
``(b * H + y) * W + x``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fisedit_compile.config import BlockMode, is_whole
from fisedit_compile.errors import MaskError
from fisedit_compile.ir.layout import Size, size_text
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.taps import Taps
from fisedit_compile.ir.tile_grid import pixels_of_tiles, sizes_of_tiles
from fisedit_compile.planning.apsc import (
    BlockChoice,
    CostModel,
    RowChoice,
    choose_block,
    choose_rows,
    expand_to_tiles,
)
from fisedit_compile.planning.neighbour_table import neighbour_table

#: Share of a picture from which its edit changes the statistics of norms so much that these follow it
#: (docs/measurements/quality.md).
FOLLOW_ABOVE = 0.08


@dataclass(frozen=True)
class EditPlan:
    """The rows, halos and neighbour tables of one mask. Made by :func:`plan_edit`.

    Attributes:
        mask: the mask as it was given, bool ``[n, h, w]``.
        batch: samples B of the U-Net's batch; sample b is edited by ``mask[b % n]``.
        counts: the number of rows M at each resolution, all samples together.
        pixel_counts: the number of rows that pixel-exact planning would give.
        paper_choices: for each resolution, the block that the paper's objective chooses and its candidates; empty
            unless ``blocks="paper"`` or costs were given.
        cost_choices: for each resolution, the rows with the least predicted cost and their candidates; empty unless
            costs were given.
    """

    mask: Tensor
    batch: int
    counts: Mapping[Size, int]
    pixel_counts: Mapping[Size, int]
    paper_choices: Mapping[Size, BlockChoice]
    cost_choices: Mapping[Size, RowChoice]
    _active: Mapping[Size, Tensor]
    _tensors: Mapping[PlanTensor, Tensor]

    def tensor(self, request: PlanTensor) -> Tensor:
        """The tensor that a request asks for.

        Raises:
            ValueError: the request was not among those that the plan was made for.
        """
        try:
            return self._tensors[request]
        except KeyError:
            raise ValueError(f"{request} was not planned; add it to the requests of plan_edit") from None

    def active(self, size: Size) -> Tensor:
        """bool ``[B, height, width]``: which pixels are rows at a resolution.

        Raises:
            ValueError: no request of the plan has rows at this resolution.
        """
        if size not in self._active:
            raise ValueError(f"resolution {size} was not planned; planned are {list(self._active)}")
        return self._active[size]

    def to(self, device: torch.device | str) -> EditPlan:
        """The same plan with its tensors on another device."""
        return replace(
            self,
            mask=self.mask.to(device),
            _active={size: active.to(device) for size, active in self._active.items()},
            _tensors={request: tensor.to(device) for request, tensor in self._tensors.items()},
        )

    def report(self) -> str:
        """The rows of each resolution and the halo rows of each convolution, as text for people.

        With ``blocks="paper"`` it also has the block chosen at each resolution and the rows that it adds to the
        pixel-exact ones. With costs it has the predicted time of the mask itself, of the paper's block, of the whole
        map and of the best candidate instead.
        """
        lines = [f"{self.batch} samples, {len(self.mask)} masks of {self.mask.shape[1]}x{self.mask.shape[2]}"]
        for size in sorted(self.counts, reverse=True):
            rows, exact, total = self.counts[size], self.pixel_counts[size], self.batch * size[0] * size[1]
            line = f"{size_text(size)}: {rows} of {total} rows ({rows / total:.1%})"
            if size in self.cost_choices:
                lines += [line, *self._compared(size)]
                continue
            if size in self.paper_choices:
                chosen = self.paper_choices[size].chosen
                line += f", block {size_text(chosen.block)} (tile {size_text(chosen.tile)})"
                line += f", {rows - exact} over pixel-exact"
                line += f" ({(rows - exact) / exact:+.1%})" if exact else ""
            lines.append(line)
        for request, halo in self._tensors.items():
            if request.kind == "halo":
                lines.append(f"{request.where}: {len(halo)} halo rows")
        return "\n".join(lines)

    def _compared(self, size: Size) -> Iterator[str]:
        choice, paper = self.cost_choices[size], self.paper_choices[size].chosen
        named = {
            "pixel": choice.of_tile((1, 1)),
            "paper": choice.of_tile(paper.tile),
            "whole": choice.candidates[-1],
            "measured": choice.chosen,
        }
        for name, each in named.items():
            block = f"block {size_text(paper.block)}" if name == "paper" else ""
            block = each.name if name == "measured" else block
            yield f"  {name:<8} {block:<12} {each.rows:>7} rows {each.microseconds:>10.1f} us predicted"


def plan_edit(
    mask: Tensor,
    requests: Collection[PlanTensor],
    *,
    batch: int,
    blocks: BlockMode = "pixel",
    dense_below: int = 1,
    costs: CostModel | None = None,
) -> EditPlan:
    """Plan an edit: make every tensor that the sparse graph asks for, on the mask's device.

    At each resolution the mask is any-pooled: a pixel is active if anything under it is. Where the shorter side has
    fewer than ``dense_below`` cells, every pixel is active. A sample whose mask is empty has no rows at the other
    resolutions; a mask without any active pixel gives a valid plan, too.

    With ``blocks="paper"`` (APSC, paper A.1) the active pixels grow to the union of the tiles chosen for a 3x3 kernel
    at that resolution, all samples together. There is one set of rows for each resolution, not one for each layer,
    because rows pass from convolution to norm, residual sum and attention with no gather between, which requires the
    same pixels everywhere. Nothing is lost by it: the objective depends on mask and kernel alone, and all spatial
    kernels of a U-Net are 3x3.

    With ``blocks="measured"`` they grow to the candidate with the least cost, see
    :func:`~fisedit_compile.planning.apsc.choose_rows`.

    Args:
        mask: what to recompute, bool ``[n, h, w]``.
        requests: the tensors that the sparse graph takes; which resolutions have rows follows from them, see
            :func:`row_resolutions`.
        batch: samples of the U-Net's batch, a multiple of n: sample b uses ``mask[b % n]``. Under classifier-free
            guidance it is 2 n, all unconditional samples first.
        blocks: ``"pixel"`` for pixel-exact rows, ``"paper"`` or ``"measured"``.
        dense_below: see :class:`~fisedit_compile.SparsityConfig`.
        costs: predicts microseconds from (resolution, rows, halo rows), such as a
            :class:`~fisedit_compile.cost_model.row_costs.RowCosts`. With other ``blocks`` only the report reads it.

    Raises:
        MaskError: the mask is not bool ``[n, h, w]`` with n, h, w at least 1, or ``batch`` is not a multiple of n.
        ValueError: ``blocks`` is none of the three, or ``"measured"`` without costs.
    """
    _check_mask(mask, batch)
    if blocks not in ("pixel", "paper", "measured"):
        raise ValueError(f"blocks is {blocks!r}; give 'pixel', 'paper' or 'measured'")
    if blocks == "measured" and costs is None:
        raise ValueError("blocks='measured' chooses by costs; give them, for example RowCosts.of(program)")

    pooled = {
        size: mask.new_ones(len(mask), *size) if is_whole(size, dense_below) else _any_pool(mask, size)
        for size in row_resolutions(requests)
    }
    copies = batch // len(mask)
    sparse = [size for size in pooled if not is_whole(size, dense_below)]
    paper = {size: choose_block(pooled[size], (3, 3)) for size in sparse if blocks == "paper" or costs}
    cheapest = {size: choose_rows(pooled[size], partial(costs, size), copies=copies) for size in sparse if costs}
    if blocks == "paper":
        tiles = {size: choice.chosen.tile for size, choice in paper.items()}
    else:
        tiles = {size: choice.chosen.tile for size, choice in cheapest.items() if blocks == "measured"}
    grown = {size: expand_to_tiles(m, tiles[size]) if size in tiles else m for size, m in pooled.items()}
    active = {size: m.repeat(copies, 1, 1) for size, m in grown.items()}
    index = {size: a.view(-1).nonzero().squeeze(1) for size, a in active.items()}

    tensors: dict[PlanTensor, Tensor] = {}
    for where in dict.fromkeys(request.where for request in requests):
        if isinstance(where, Taps):
            table, halo = neighbour_table(where, index[where.target], index.get(where.source), batch)
            tensors[PlanTensor("table", where)] = table
            if halo is not None:
                tensors[PlanTensor("halo", where)] = halo
        else:
            tensors[PlanTensor("index", where)] = index[where]
            tensors[PlanTensor("sample", where)] = index[where] // (where[0] * where[1])
            offsets = F.pad(active[where].sum((1, 2)).cumsum(0), (1, 0)).int()
            tensors[PlanTensor("offsets", where)], tensors[PlanTensor("count", where)] = offsets, offsets[-1:]
            row_of = tensors[PlanTensor("row_of", where)] = row_of_pixels(index[where], active[where].numel())
            if PlanTensor("tiles", where) in requests:
                large = follows(mask).repeat(copies)[:, None]  # of other samples no tile counts as covered
                covered, ids = _covered_tiles(row_of.view(batch, -1).where(large, -1), where)
                tensors[PlanTensor("tiles", where)], tensors[PlanTensor("tile_ids", where)] = covered, ids
                tensors[PlanTensor("tile_sizes", where)] = sizes_of_tiles(where).to(mask.device)

    counts = {size: len(i) for size, i in index.items()}
    pixel_counts = {s: copies * int(m.sum()) for s, m in pooled.items()} if tiles else counts
    return EditPlan(mask, batch, counts, pixel_counts, paper, cheapest, active, tensors)


def follows(mask: Tensor) -> Tensor:
    """Of each mask, bool ``[n, h, w]``, whether statistics follow its edit, bool ``[n]``."""
    return mask.flatten(1).float().mean(1) > FOLLOW_ABOVE


def row_of_pixels(index: Tensor, pixels: int) -> Tensor:
    """int32 ``[pixels]``: the row of each pixel, -1 where it is none; int64 ``index [M]`` has the rows' pixel ids."""
    row_of = torch.full((pixels,), -1, dtype=torch.int32, device=index.device)
    return row_of.scatter_(0, index, torch.arange(len(index), dtype=torch.int32, device=index.device))


def _covered_tiles(row_of: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """The tiles all of whose pixels are rows, those without pixels among them, int32 ``[F, P]`` and ``[F]``.

    Args:
        row_of: int32 ``[B, H * W]``, -1 for what is no row.
        size: (H, W).
    """
    pixels = pixels_of_tiles(size).to(row_of.device)
    rows = torch.where(pixels >= 0, row_of[:, pixels.clamp_min(0)], -1).flatten(0, 1)  # [B * TILES, P]
    missing = (rows < 0).sum(1) - (pixels < 0).sum(1).repeat(len(row_of))
    ids = (missing == 0).nonzero().squeeze(1)
    return rows[ids].int(), ids.int()


def row_resolutions(requests: Collection[PlanTensor]) -> list[Size]:
    """The resolutions that have rows, each once, in the order of the requests.

    They are those that a request names, and the target and source of each convolution; a dense source has no rows.
    """
    sizes: dict[Size, None] = {}
    for where in (request.where for request in requests):
        if not isinstance(where, Taps):
            sizes[where] = None
        else:
            sizes.update(dict.fromkeys([where.target] if where.dense else [where.target, where.source]))
    return list(sizes)


def _any_pool(mask: Tensor, size: Size) -> Tensor:
    return F.adaptive_max_pool2d(mask[:, None].float(), size)[:, 0] > 0


def _check_mask(mask: Tensor, batch: int) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = f"of dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise MaskError(f"the mask is {given}; give a bool tensor, for example `mask > 0.5`")
    if mask.dim() != 3 or mask.numel() == 0:
        raise MaskError(f"the mask has shape {list(mask.shape)}; give [samples, height, width], none of them zero")
    if batch < 1 or batch % len(mask):
        raise MaskError(
            f"a U-Net batch of {batch} is not a multiple of the {len(mask)} masks; give one mask a sample "
            "(sample b of the batch uses mask b % samples), or one for all"
        )
