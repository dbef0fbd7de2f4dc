"""Random masks for the tests of the row operators, and the rows that they select, by definition."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@st.composite
def masks(draw: st.DrawFn, max_side: int = 7) -> torch.Tensor:
    """Bool [B, H, W], 1 to 3 samples with their own pixels: odd sizes, single pixels, empty and full samples."""
    samples, height, width = draw(st.integers(1, 3)), draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    pixels = []
    for _ in range(samples):
        kind = draw(st.sampled_from(["random", "empty", "full", "pixel"]))
        if kind == "random":
            pixels.append(draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width)))
        elif kind == "pixel":
            chosen = draw(st.integers(0, height * width - 1))
            pixels.append([pixel == chosen for pixel in range(height * width)])
        else:
            pixels.append([kind == "full"] * (height * width))
    return torch.tensor(pixels).view(samples, height, width)


def pixel_ids(mask: torch.Tensor) -> torch.Tensor:
    """int64 [M]: the ids (b * H + y) * W + x of the active pixels, ascending."""
    return mask.flatten().nonzero().flatten()


def samples_of(mask: torch.Tensor) -> torch.Tensor:
    """int64 [M]: the sample of each active pixel."""
    return mask.nonzero()[:, 0]


def offsets_of(mask: torch.Tensor) -> torch.Tensor:
    """int32 [B + 1]: cumulative counts of active pixels."""
    counts = [int(sample.sum()) for sample in mask]
    return torch.tensor([sum(counts[:b]) for b in range(len(counts) + 1)], dtype=torch.int32)


def normal(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Standard normal values of their own seed, rounded to ``dtype``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
