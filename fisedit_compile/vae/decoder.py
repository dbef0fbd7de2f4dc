"""The decoder of an autoencoder as a module, which can be exported, and which of them can be."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compile.errors import CaptureError
from fisedit_compile.runtime.capturable import refuse_autocast


class Decoder(torch.nn.Module):
    """What ``vae.decode`` runs, with latents ``sample [n, c, h, w]`` in and pictures ``[n, 3, H, W]`` out.

    Args:
        vae: a diffusers autoencoder.
    """

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.vae = vae
        self.training = False  # not by eval(), which would switch the autoencoder

    def forward(self, sample: Tensor) -> Tensor:
        picture: Tensor = self.vae.decode(sample, return_dict=False)[0]  # type: ignore[operator]
        return picture


def can_be_sparse(vae: object) -> bool:
    """Whether autoencoders of this class decode by one fixed sequence of convolutions, norms and attention."""
    from diffusers import AutoencoderKL, AutoencoderTiny  # imported here: it takes a second

    return isinstance(vae, (AutoencoderKL, AutoencoderTiny))


def refuse_as_it_is(vae: torch.nn.Module, latents: Tensor) -> None:
    """Hold a decoder to what an exported graph can stand for; the messages name the reason alone.

    Args:
        vae: for which :func:`can_be_sparse` is true.
        latents: that are to be decoded.

    Raises:
        CaptureError: it is tiled, sliced, offloaded, hooked, exchanged, trained, autocast, or runs in fp32 on a GPU.
    """
    for option in ("tiling", "slicing"):
        if getattr(vae, f"use_{option}", False):
            raise CaptureError(f"{option} of the VAE is on")
    if vae.training:
        raise CaptureError("the VAE is in training mode")
    if "decode" in vars(vae):
        raise CaptureError("decode of the VAE was replaced")
    for module in vae.modules():
        for name in ("_hf_hook", "_diffusers_hook"):
            if name in vars(module):
                raise CaptureError(
                    f"a hook of the VAE brings or casts its weights ({type(vars(module)[name]).__name__})"
                )
    refuse_autocast()
    dtype = next(vae.parameters()).dtype
    if latents.dtype is not dtype:
        raise CaptureError(f"latents of {latents.dtype} for a VAE of {dtype}")
    if latents.is_cuda and dtype.itemsize > 2:
        raise CaptureError(f"the VAE runs in {dtype} on a GPU, for which the row kernels are not made")
