"""What the two stages of training minimise."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel


class VaeLoss(nn.Module):
    """Reconstruction in L1, L2 and gradients, and a little KL; also returns the PSNR in dB."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # [batch, 3, h, w] in [-1, 1]
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample.float()
        error = decoded - images
        l1, mse = error.abs().mean(), error.square().mean()
        gradient = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return l1 + 2 * mse + 0.5 * gradient + 5e-4 * kl, 10 * torch.log10(4 / mse.detach())


class DenoisingLoss(nn.Module):
    """The weighted squared error of the predicted velocity."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, velocity: Tensor, weight: Tensor) -> Tensor:
        words = self.text_encoder(ids)[0]  # [batch, 32, 192]
        predicted = self.unet(noisy, timesteps, words, return_dict=False)[0].float()
        return ((predicted - velocity).square() * weight).mean() / weight.mean()


def sample_timesteps(count: int, device: torch.device) -> Tensor:
    """Timesteps int64 ``[count]`` in 0 to 999: half of them uniform, half logit-normal with more of the noisy ones.

    Layout and objects are decided at noisy timesteps.
    """
    uniform = torch.rand(count, device=device)
    logit_normal = torch.sigmoid(0.5 + 0.9 * torch.randn(count, device=device))
    return (torch.where(torch.rand(count, device=device) < 0.5, uniform, logit_normal) * 1000).long().clamp_(0, 999)
