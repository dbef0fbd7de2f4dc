"""The arguments that all products of rows share: their place in an operator's schema, and which go together.

The references and the launchers of the Triton kernels both check by these functions, so that an error reads the same on
a CPU and on a GPU. What the arguments mean is written beside the references, in ``conv2d_rows`` and ``epilogue``.
"""

from __future__ import annotations

import torch

#: The arguments of the epilogue in an operator's schema; ``count`` is described in ``ops``.
EPILOGUE_SCHEMA = (
    "Tensor? count=None, Tensor? sample=None, Tensor? sample_bias=None, Tensor? residual=None, Tensor? scale=None, "
    'Tensor? shift=None, str activation="none"'
)

#: The arguments of a convolution's shortcut in its schema.
SHORTCUT_SCHEMA = "Tensor? shortcut=None, Tensor? shortcut_weight=None"


def check_epilogue(
    op: str,
    sample: torch.Tensor | None,
    sample_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    activation: str,
) -> None:
    """Raises ValueError for arguments of an epilogue that do not go together; ``op`` names the operator in it."""
    if activation not in ("none", "silu", "geglu"):
        raise ValueError(f"{op}: activation={activation!r}; give 'none', 'silu' or 'geglu'")
    if (scale is None) != (shift is None):
        raise ValueError(f"{op}: a norm takes scale and shift; give both or neither")
    if sample is None and not (sample_bias is None and scale is None):
        raise ValueError(f"{op}: sample_bias and scale are of samples; give the sample of each row, too")
    if activation == "geglu" and not (sample_bias is None and residual is None and scale is None):
        raise ValueError(f"{op}: geglu halves the width; it takes no sample_bias, residual or norm")


def check_shortcut(
    op: str, shortcut: torch.Tensor | None, shortcut_weight: torch.Tensor | None, *, outputs: int, filters: int
) -> None:
    """Raises ValueError unless a convolution's shortcut and its weight fit the convolution and each other.

    Args:
        op: the operator's name, for the error.
        shortcut: ``[outputs, channels]`` or None.
        shortcut_weight: ``[filters, channels]`` or None.
        outputs, filters: the shape of the convolution's result.
    """
    if shortcut is None and shortcut_weight is None:
        return
    if shortcut is None or shortcut_weight is None:
        raise ValueError(f"{op}: a shortcut and its weight belong together; give both or neither")
    if shortcut.shape[0] != outputs:
        raise ValueError(
            f"{op}: {shortcut.shape[0]} rows of a shortcut for a convolution of {outputs}; give one for each output row"
        )
    channels = shortcut.shape[1]
    if shortcut_weight.shape != (filters, channels):
        raise ValueError(
            f"{op}: shortcut_weight {list(shortcut_weight.shape)} does not fit {filters} filters and {channels} "
            f"channels of the shortcut; give [{filters}, {channels}]"
        )
