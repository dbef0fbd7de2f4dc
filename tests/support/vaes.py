"""Autoencoders as small as they can be, and a sparse decoder's use of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fisedit_compile.vae.program as program
from fisedit_compile.masks.grown import grown
from fisedit_compile.passes.manager import DECODER_PASSES
from fisedit_compile.runtime.model_state import ModelState
from fisedit_compile.runtime.model_watch import ModelWatch
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.vae.decoded import Decoded
from fisedit_compile.vae.sparse_decoder import SparseDecoder

KINDS = ("kl", "kl-wide-heads", "tiny")


def small_vae(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Pictures twice (``kl``) or four times (``tiny``) as large as their latents of four channels; random weights.

    With ``kl-wide-heads`` the attention of the middle block has one head of 320 channels, which no row kernel takes.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    torch.manual_seed(0)
    if kind == "tiny":
        made = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
    else:
        made = AutoencoderKL(
            block_out_channels=(8, 320 if kind == "kl-wide-heads" else 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )
    return made.eval().requires_grad_(False).to(dtype)


class Decodes:
    """A small autoencoder, its sparse decoder and a base.

    Args:
        kind: of :data:`KINDS`.
        fixed_sizes: decode regions at the sizes of buckets and by the passes for a GPU.
    """

    def __init__(
        self,
        kind: str,
        dtype: torch.dtype = torch.float32,
        *,
        samples: int = 2,
        size: tuple[int, int] = (12, 9),
        device: str = "cpu",
        fixed_sizes: bool = False,
    ) -> None:
        self.vae = small_vae(kind, dtype).to(device)
        self.decoder = SparseDecoder(self.vae)
        self.watch = ModelWatch(self.vae)
        noise = torch.Generator().manual_seed(0)
        self.latents, self.other = (torch.randn(samples, 4, *size, generator=noise).to(device, dtype) for _ in range(2))
        with pytest.MonkeyPatch.context() as patch:
            if fixed_sizes:
                patch.setattr(program, "DECODER_PASSES_ON_HOST", DECODER_PASSES)
            self.picture, self.base = self.decoder.record(self.latents, self.state)
        self.factor = self.picture.shape[-1] // size[1]
        if fixed_sizes:
            for made in self.decoder._programs:
                made.fixed_sizes = True

    def in_full_precision(self, kind: str) -> Decodes:
        """The same weights and latents in fp32 on the CPU; ``kind`` is that of this one."""
        exact = Decodes(kind, samples=len(self.latents), size=tuple(self.latents.shape[2:]))  # type: ignore[arg-type]
        exact.vae.load_state_dict({name: each.float().cpu() for name, each in self.vae.state_dict().items()})
        exact.latents, exact.other = (each.float().cpu() for each in (self.latents, self.other))
        exact.picture, exact.base = exact.decoder.record(exact.latents, exact.state)
        return exact

    @property
    def state(self) -> ModelState:
        return self.watch.look()

    def changed(self, mask: Tensor) -> Tensor:
        """The base's latents, others where the mask (bool ``[n, h, w]``) is true."""
        return torch.where(mask.to(self.latents.device)[:, None], self.other, self.latents)

    def dense(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]

    def sparse(self, latents: Tensor, cells: int = 0, base: Decoded | None = None) -> Tensor:
        base = base or self.base
        return self.decoder.decode(latents, base, self.prepare(latents, base, cells))

    def prepare(self, latents: Tensor, base: Decoded | None = None, cells: int = 0) -> Prepared:
        """For the cells in which latents differ from the base's, and ``cells`` cells around them."""
        base = base or self.base
        region = torch.zeros(latents.shape[0], *latents.shape[2:], dtype=torch.bool)
        if latents.shape == base.latents.shape:
            region = (latents != base.latents).any(dim=1).cpu()
        return self.decoder.prepare(latents, base, self.state, grown(region, cells))

    def pixels(self, mask: Tensor) -> Tensor:
        """The pixels under a mask, bool ``[n, 3, H, W]``."""
        mask = mask.to(self.picture.device)
        large = mask.repeat_interleave(self.factor, 1).repeat_interleave(self.factor, 2)
        return large[:, None].expand_as(self.picture)
