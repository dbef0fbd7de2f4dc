"""The region that new words change, found from how the latents of two generations drift apart.

Source: Yu et al., "Accelerating Text-to-image Editing via Cache-enabled Sparse Diffusion Inference", section
3.1: ``diff = Normalize(sum over t1..t2 of |X_t - Y_t|)`` and a threshold by Otsu's between-class variance. Weaker
change that is connected to what is over the threshold is part of the region as well (hysteresis; Canny, "A
Computational Approach to Edge Detection", 1986). A mask that the user draws is read by ``user_mask.py``.
"""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F

from fisedit_compile.errors import MaskError
from fisedit_compile.masks.grown import grown

logger = logging.getLogger(__name__)

#: Bins of the histogram under Otsu's threshold.
_BINS = 256

#: Weights of a cell and its neighbours to either side, along rows and columns, by which the difference is smoothed.
_SMOOTHING = (0.25, 0.5, 0.25)

#: How far above the mean of the unchanged cells a cell has to lie to be part of the region that it touches, as a share
#: of the way from there to the mean of the changed ones (docs/measurements/masks.md).
WEAK = 0.2

#: How far from a cell over the threshold itself such a cell may lie, as a share of the picture's longer side.
_REACH = 0.25

#: Share of the picture from which a found region is reported as "the whole picture".
_WHOLE_PICTURE = 0.95

#: Roundings of the average cell up to which the most changed cell counts as unchanged: text embeddings off by one
#: rounding move it by 0.9 to 1.6, in any dtype; a replaced word by 6 and more (docs/decisions.md, 2026-11-27).
_ROUNDINGS = 2

_WHAT_TO_DO = "give a prompt that describes a visible change, or pass a mask of your own"


def _accumulate(base: torch.Tensor, edit: torch.Tensor) -> torch.Tensor:
    """Sum of ``|base - edit|`` over steps and channels, ``[n, h, w]`` fp32."""
    if base.ndim != 5 or base.shape != edit.shape or base.numel() == 0:
        raise MaskError(
            f"latents of shape {tuple(base.shape)} and {tuple(edit.shape)} were given; "
            "stack those of the same steps of both generations as [steps, samples, channels, height, width]"
        )
    return (base.float() - edit.float()).abs().sum(dim=(0, 2))


def _are_finite(values: torch.Tensor) -> torch.Tensor:
    """Of each sample, bool ``[n]``."""
    return values.isfinite().flatten(1).all(dim=1)


def _require_finite(finite: list[bool]) -> None:
    """Refuse latents that are not finite; ``finite`` says it of each sample."""
    if not all(finite):
        raise MaskError(
            f"the latents of sample {finite.index(False)} hold NaN or infinity, so no region can be "
            "found; run the U-Net in a wider dtype (bfloat16 or float32) or lower the guidance scale"
        )


def _normalise(total: torch.Tensor) -> torch.Tensor:
    low = total.amin(dim=(1, 2), keepdim=True)
    span = total.amax(dim=(1, 2), keepdim=True) - low
    return (total - low) / torch.where(span > 0, span, 1.0)


def difference(base: torch.Tensor, edit: torch.Tensor) -> torch.Tensor:
    """How strongly each latent cell changed between two generations (paper 3.1).

    Args:
        base: latents of the base at the compared steps, ``[steps, n, channels, h, w]``.
        edit: latents of the edit at the same steps, same shape.

    Returns:
        fp32 ``[n, h, w]``: the absolute difference summed over steps and channels, scaled for each sample so
        that the weakest cell is 0 and the strongest 1. A difference that is the same everywhere (also none at
        all) gives 0.

    Raises:
        MaskError: the shapes differ or are not 5-dimensional, or the latents hold NaN or infinity.
    """
    total = _accumulate(base, edit)
    _require_finite(_are_finite(total).tolist())
    return _normalise(total)


def otsu_threshold(values: torch.Tensor) -> torch.Tensor:
    """Threshold that maximises the between-class variance of each sample's histogram (Otsu 1979, 256 bins).

    Equals ``skimage.filters.threshold_otsu`` of each sample: the centre of a bin; cells *above* it are
    foreground.

    Args:
        values: finite, ``[n, h, w]``.

    Returns:
        ``[n]`` in the dtype of ``values``; a constant sample gives its constant (so nothing lies above).
    """
    flat = values.detach().double().flatten(1).contiguous()  # [n, h*w]
    low, high = flat.amin(dim=1, keepdim=True), flat.amax(dim=1, keepdim=True)
    steps = torch.arange(_BINS + 1, device=flat.device, dtype=flat.dtype)
    edges = low + steps * ((high - low) / _BINS)  # [n, BINS + 1]
    edges[:, -1:] = high
    bins = (torch.searchsorted(edges, flat, right=True) - 1).clamp_(0, _BINS - 1)
    counts = torch.zeros(flat.shape[0], _BINS, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(1, bins, torch.ones_like(bins))

    # Bin numbers stand in for bin centres: the variance's argmax is the same, and integer sums are exact, so
    # that the many equal splits across an empty stretch of the histogram tie exactly, on every device.
    weighted = counts * torch.arange(_BINS, device=flat.device)
    below, below_sum = counts.cumsum(1), weighted.cumsum(1)
    above, above_sum = below[:, -1:] - below, below_sum[:, -1:] - below_sum
    # Difference of the class means, in bins; an empty class has no weight, whatever its mean.
    gap = below_sum.double() / below.clamp_min(1) - above_sum.double() / above.clamp_min(1)
    variance = (below.double() * above.double() * gap.square())[:, :-1]
    split = variance.argmax(dim=1, keepdim=True)  # the first of equal ones
    centre = (edges.gather(1, split) + edges.gather(1, split + 1)) / 2
    return torch.where(high > low, centre, low)[:, 0].to(values.dtype)


def _without_frame(mask: torch.Tensor) -> torch.Tensor:
    """Drop cells of the outermost ring that touch no active cell further in.

    A frame one cell thin was seen in masks without a cause in the words (the zero padding of convolutions is
    the likely one). A change of the picture that reaches the border also covers the cells next to it.
    """
    if min(mask.shape[1:]) < 3:
        return mask  # all ring, no inside
    inside = torch.zeros_like(mask)
    inside[:, 1:-1, 1:-1] = mask[:, 1:-1, 1:-1]
    return mask & grown(inside)


def find_region(strength: torch.Tensor, weak: float = WEAK) -> torch.Tensor:
    """The cells that changed: those over Otsu's threshold, and the weaker ones around that are connected to them.

    A frame one cell thin at the border is left out, and so are cells over the threshold with fewer than two such
    neighbours (specks). The strongest cell stays whatever happened.

    Args:
        strength: how strongly each cell changed, ``[n, h, w]``.
        weak: where between the means of the cells below and above the threshold the strength begins from which a cell
            that touches the region belongs to it; 1 is the upper mean.

    Returns:
        bool ``[n, h, w]`` with at least one cell a sample.
    """
    threshold = otsu_threshold(strength)[:, None, None]
    over = strength > threshold
    lower, upper = (
        mean_where(strength, ~over),
        mean_where(strength, over),
    )  # means, since Otsu's threshold may lie close to either
    region = _without_frame(over)
    # Active cells in each 3x3 window, the cell itself included.
    crowd = F.avg_pool2d(region.float(), kernel_size=3, stride=1, padding=1, divisor_override=1)
    region = region & (crowd > 2.5)
    strongest = strength.flatten(1).argmax(dim=1, keepdim=True)
    region = region.flatten(1).scatter(1, strongest, True).view_as(region)
    candidates = region | _without_frame(strength > lower + weak * (upper - lower))
    return spread(region[:, None], candidates[:, None])[:, 0]


def spread(cells: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
    """What of ``over`` is connected to some cells of it and not far from them; both bool ``[n, c, h, w]``."""
    reached, candidates = cells.float(), over.float()
    for _ in range(math.ceil(_REACH * max(cells.shape[2:]))):  # a count, so that no device has to be waited for
        reached = torch.minimum(candidates, F.max_pool2d(reached, 3, stride=1, padding=1))
    return reached > 0


def mean_where(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The mean over the last two dimensions where ``where`` is true, with these kept as 1; 0 where it nowhere is."""
    count = where.sum(dim=(-2, -1), keepdim=True).clamp_min(1)
    return torch.where(where, values, 0).sum(dim=(-2, -1), keepdim=True) / count


def change_strength(base: torch.Tensor, edit: torch.Tensor) -> torch.Tensor:
    """How strongly each cell and those around it changed, ``[n, h, w]`` fp32, from 0 to 1 in each sample.

    Args:
        base, edit: see :func:`difference_mask`.
    """
    return smooth(_normalise(_accumulate(base, edit)))


def smooth(strength: torch.Tensor) -> torch.Tensor:
    """A strength ``[n, h, w]`` whose cells count their neighbours in, scaled again so that it goes from 0 to 1.

    Single cells say less about an object than their neighbourhood does.
    """
    weights = torch.tensor(_SMOOTHING, dtype=strength.dtype, device=strength.device)
    padded = F.pad(strength[:, None], (1, 1, 1, 1), mode="replicate")
    return _normalise(F.conv2d(padded, torch.outer(weights, weights)[None, None])[:, 0])


def close_holes(mask: torch.Tensor) -> torch.Tensor:
    """A mask, bool ``[n, h, w]``, without holes and gaps of up to two cells; nothing grows outwards."""
    wider = grown(F.pad(mask, (1, 1, 1, 1)))  # padded, so that nothing grows towards the border either
    return ~grown(~wider)[:, 1:-1, 1:-1]


def difference_mask(base: torch.Tensor, edit: torch.Tensor) -> torch.Tensor:
    """The latent cells that the new prompt changes: difference, Otsu's threshold (paper 3.1), growth around it.

    Args:
        base: latents of the base at the compared steps, ``[steps, n, channels, h, w]``, in the dtype they
            were run in.
        edit: latents of the edit under its new prompt at the same steps, same shape and dtype.

    Returns:
        bool ``[n, h, w]``, at least one cell a sample. A change of the whole picture (95 % and more) is
        returned too, with a warning, because an edit of it saves nothing.

    Raises:
        MaskError: the shapes do not fit, the latents hold NaN or infinity, or a sample's latents are equal up
            to roundings of their dtype, so that there is nothing to find.
    """
    total = _accumulate(base, edit)
    precision = max(torch.finfo(latents.dtype).eps for latents in (base, edit))
    rounding = precision * base.float().abs().sum(dim=(0, 2)).mean(dim=(1, 2))  # [n], as summed as total is
    same = total.amax(dim=(1, 2)) <= _ROUNDINGS * rounding
    mask = close_holes(find_region(smooth(_normalise(total))))
    # The same change in every cell leaves no contrast to threshold: all of the picture changed.
    mask |= (total.amax(dim=(1, 2)) == total.amin(dim=(1, 2)))[:, None, None]

    # All that the host has to know comes at once: it waits for the device here, and nowhere before.
    finite, alike, area = torch.stack([_are_finite(total), same, mask.float().mean(dim=(1, 2))]).tolist()
    _require_finite(list(map(bool, finite)))
    if any(alike):
        raise MaskError(
            f"both prompts give the same latents for sample {alike.index(1)} in the {base.shape[0]} "
            f"compared steps, so there is no region to edit; {_WHAT_TO_DO}, or compare more steps"
        )
    for sample, share in enumerate(area):
        if share >= _WHOLE_PICTURE:
            logger.warning(
                "the edit changes %.0f%% of sample %d: the whole picture is computed again and little is saved; to "
                "keep a part of it, pass a mask of your own",
                100 * share,
                sample,
            )
    return mask
