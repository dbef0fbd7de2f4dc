"""The first lines of every kernel whose rows may be padded."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def real_rows(padded, count):  # type: ignore[no-untyped-def]
    """How many of ``padded`` rows are real: what ``count``, int32 [1], says, or all of them where it is None."""
    real = padded
    if count is not None:
        real = tl.minimum(padded, tl.load(count))
    return real
