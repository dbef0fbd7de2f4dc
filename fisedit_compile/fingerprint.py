"""A short digest of a model's configuration and weights, to tell whether a base belongs to it."""

from __future__ import annotations

import hashlib
import json

import torch

#: Values of each parameter that enter the digest, evenly spaced. A fine-tune, a LoRA or another seed changes nearly
#: all weights, so a few tell it; a digest of every byte of a large U-Net would take seconds an edit.
_VALUES = 16


def fingerprint(model: torch.nn.Module) -> str:
    """A hexadecimal digest of the names, shapes, dtypes and sampled values of ``model`` and of its ``config``."""
    digest = hashlib.sha256()
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    samples = []
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // _VALUES)][:_VALUES].double())
    digest.update(torch.cat(samples).cpu().numpy().tobytes())  # one transfer for all of them
    return digest.hexdigest()[:32]
