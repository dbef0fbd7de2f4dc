"""Structural similarity (SSIM) of two pictures: how close an edit comes to the same edit made dense.

Computed by torchmetrics, of the optional group ``quality``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

#: Side and standard deviation of the Gaussian window, in pixels; from the deviation torchmetrics derives that side.
_WINDOW, _SIGMA = 11, 1.5


def ssim(first: Any, second: Any) -> float:
    """The mean structural similarity of two pictures over all windows that lie inside, and over their channels.

    Source: Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility to Structural
    Similarity", 2004: an 11x11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03.

    Args:
        first: a PIL image, or an array ``[H, W]`` or ``[H, W, C]``: uint8, or floating point in [0, 1].
        second: likewise, of the same shape.

    Returns:
        At most 1, which only equal pictures reach. Computed in fp64.

    Raises:
        ValueError: another shape or type, or a side shorter than the window of 11 pixels.
        ImportError: torchmetrics is not installed.
    """
    x, y = _channels(first), _channels(second)
    if x.shape != y.shape:
        raise ValueError(f"pictures of {tuple(x.shape[2:])} and {tuple(y.shape[2:])}: resize one to the other's size")
    if min(x.shape[2:]) < _WINDOW:
        raise ValueError(f"a picture of {tuple(x.shape[2:])}: SSIM needs at least {_WINDOW} pixels on each side")
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError("SSIM needs torchmetrics: install it, or this package's optional group 'quality'") from error
    # torchmetrics' own mean has windows that reach over the edge, the paper's has not. Channels are pictures here.
    _, windows = structural_similarity_index_measure(x, y, sigma=_SIGMA, data_range=1.0, return_full_image=True)
    inside = slice(_WINDOW // 2, -(_WINDOW // 2))
    return float(windows[..., inside, inside].mean())


def _channels(image: Any) -> torch.Tensor:
    """fp64 ``[C, 1, H, W]`` in [0, 1]."""
    array = np.asarray(image)
    if array.ndim not in (2, 3) or not (array.dtype == np.uint8 or array.dtype.kind == "f"):
        raise ValueError(f"an array {array.shape} of {array.dtype}: give [H, W] or [H, W, C], uint8 or in [0, 1]")
    values = torch.from_numpy(array.astype(np.float64))
    if array.dtype == np.uint8:
        values = values / 255
    return values.reshape(*array.shape[:2], -1).permute(2, 0, 1)[:, None]
