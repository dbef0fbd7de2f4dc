"""Comparison of results with a reference, for tests here and elsewhere, with one tolerance for each dtype."""

from __future__ import annotations

import torch

#: The largest relative error ``norm(out - reference) / norm(reference)`` that a whole chain of operations may have
#: against a reference in fp64. In fp32 it comes from some thousand additions for each output, each off by up to 6e-8.
#: In fp16 and bf16 it comes from rounding inputs and outputs (2**-11 and 2**-8), with sums in fp32, over the few tens
#: of layers of a small U-Net.
TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """``norm(out - reference) / norm(reference)`` in fp64; NaN or infinity in ``out`` gives NaN or infinity."""
    out, reference = out.double(), reference.double()
    return float((out - reference).norm() / reference.norm().clamp_min(1e-30))


def assert_close(out: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Check that ``out`` is within the tolerance of ``dtype`` (default: the dtype of ``out``) of ``reference``.

    Raises:
        AssertionError: the shapes differ, or the relative error is above ``TOLERANCES[dtype]`` or not a number.
    """
    if out.shape != reference.shape:
        raise AssertionError(f"shape {tuple(out.shape)} where {tuple(reference.shape)} was expected")
    if out.numel() == 0:
        return
    error, limit = relative_error(out, reference), TOLERANCES[dtype or out.dtype]
    if not error <= limit:
        raise AssertionError(f"relative error {error:.3g} is over {limit:.3g} for {dtype or out.dtype}")
