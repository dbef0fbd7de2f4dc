"""Marks of the tests that run Triton kernels on the CPU: ``make interpreter`` gives them a process of their own."""

from __future__ import annotations

import os

import pytest
import torch

#: The interpreter's bf16 dot is wrong.
INTERPRETED_DTYPES = (torch.float32, torch.float16)

# Triton reads the variable when a kernel is defined: it cannot be set for some tests of a process.
MARKS = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is unset"),
]
