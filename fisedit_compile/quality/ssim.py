"""Structural similarity (SSIM) of two pictures: how close an edit comes to the same edit made dense.

Source: Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility to Structural
Similarity", 2004: an 11x11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


def ssim(first: Any, second: Any) -> float:
    """The mean structural similarity of two pictures over all windows that lie inside, and over their channels.

    Args:
        first: a PIL image, or an array ``[H, W]`` or ``[H, W, C]``: uint8, or floating point in [0, 1].
        second: likewise, of the same shape and kind of values.

    Returns:
        At most 1, which only equal pictures reach. Computed in fp64.

    Raises:
        ValueError: another shape or type, or a side shorter than the window of 11 pixels.
    """
    x, y = _channels(first), _channels(second)
    if x.shape != y.shape:
        raise ValueError(f"pictures of {tuple(x.shape[2:])} and {tuple(y.shape[2:])}: resize one to the other's size")
    if min(x.shape[2:]) < _WINDOW:
        raise ValueError(f"a picture of {tuple(x.shape[2:])}: SSIM needs at least {_WINDOW} pixels on each side")
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


def _channels(image: Any) -> torch.Tensor:
    """fp64 ``[C, 1, H, W]`` in [0, 1]."""
    array = np.asarray(image)
    if array.ndim not in (2, 3) or not (array.dtype == np.uint8 or array.dtype.kind == "f"):
        raise ValueError(f"an array {array.shape} of {array.dtype}: give [H, W] or [H, W, C], uint8 or in [0, 1]")
    values = torch.from_numpy(array.astype(np.float64))
    if array.dtype == np.uint8:
        values = values / 255
    return values.reshape(*array.shape[:2], -1).permute(2, 0, 1)[:, None]


def _blur(values: torch.Tensor) -> torch.Tensor:
    """Gaussian-weighted mean over each window that lies inside ``[C, 1, H, W]``."""
    offsets = torch.arange(_WINDOW, dtype=values.dtype) - _WINDOW // 2
    weights = torch.softmax(-(offsets**2) / (2 * _SIGMA**2), dim=0)  # a Gaussian that sums to 1
    return F.conv2d(F.conv2d(values, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
