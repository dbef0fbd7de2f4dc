"""Random masks of edits for the tests of whole U-Nets, and what they leave alone."""

from __future__ import annotations

import torch
from hypothesis import strategies as st


def masks(n: int, size: tuple[int, int]) -> st.SearchStrategy[torch.Tensor]:
    """bool [n, h, w]; each sample its own: random at some density, one pixel, a block, full or empty."""
    height, width = size

    def sample(kind: str, seed: int, density: float, corners: list[tuple[float, float]]) -> torch.Tensor:
        (y, x), (y_end, x_end) = ((int(v * height), int(u * width)) for v, u in corners)
        mask = torch.zeros(height, width, dtype=torch.bool)
        if kind == "random":
            mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < density
        elif kind == "pixel":
            mask[y, x] = True
        elif kind == "block":
            mask[min(y, y_end) : max(y, y_end) + 1, min(x, x_end) : max(x, x_end) + 1] = True
        elif kind == "full":
            mask[:] = True
        return mask

    unit = st.floats(0, 1, exclude_max=True)
    kinds = st.sampled_from(["random", "pixel", "block", "full", "empty"])
    corners = st.lists(st.tuples(unit, unit), min_size=2, max_size=2)
    one = st.builds(sample, kinds, st.integers(0, 2**31), unit, corners)
    return st.lists(one, min_size=n, max_size=n).map(torch.stack)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Stricter than ``torch.equal``: -0.0 is not 0.0."""
    as_bytes = [tensor.flatten().contiguous().view(torch.uint8) for tensor in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*as_bytes)


def outside(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """bool [B, h, w]: the pixels that an edit must not touch; sample b is edited by ``mask[b % n]``."""
    return ~mask.repeat(batch // len(mask), 1, 1)
