"""Train the demo model and export it as a diffusers `StableDiffusionPipeline` folder.

    python examples/train_demo_model.py --out out/demo_model                       # one GPU
    torchrun --nproc-per-node 2 examples/train_demo_model.py --out out/demo_model  # two
    python examples/train_demo_model.py --out out/smoke --smoke                    # all code paths, on a CPU

First a small autoencoder, then text encoder and U-Net together, on pictures rendered by `demo_world`.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from demo_world import models
from demo_world.losses import DenoisingLoss, VaeLoss, sample_timesteps
from demo_world.optimise import Budget, is_main, optimise, say, share_weights, world_size
from demo_world.renderer import Renderer
from demo_world.samples import sample_grid
from demo_world.scene import CANVAS
from demo_world.stream import scene_batches
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

CROP = 128  # the autoencoder starts on half-size crops, at a quarter of the cost of whole pictures
EMA_RATE = 0.001
EXPORTS = 3  # the last export is the result; the earlier ones are for a run that is cut short
STATISTICS_BATCHES = 8  # batches that latents' statistics and the PSNR are taken over


class Trainer:
    """Trains the autoencoder and the U-Net, on one device and from one stream of rendered scenes."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        self.device = device
        self.tokenizer: PreTrainedTokenizerFast = models.build_tokenizer()
        self.renderer = Renderer(device)
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.batches = scene_batches(self.tokenizer, args.batch, args.seed + rank, args.workers)

    def images(self) -> tuple[Tensor, Tensor, Tensor]:
        """A batch: pictures in [-1, 1], the opacity of all objects together `[batch, 1, h, w]`, and token ids."""
        scenes, ids = next(self.batches)
        images, alphas = self.renderer.render(scenes)
        opacity = alphas.sum(1, keepdim=True).clamp(0, 1)
        return images * 2 - 1, opacity, ids.to(self.device, non_blocking=True)

    def compiled(self, module: nn.Module) -> Callable[..., Any]:
        return torch.compile(module, dynamic=False) if self.args.compile else module

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def train_vae(self) -> AutoencoderKL:
        """Train the autoencoder on crops, and normalise its latents."""
        vae = models.build_vae().to(self.device)
        share_weights(vae)
        loss = self.compiled(VaeLoss(vae))

        def crop(images: Tensor) -> Tensor:
            top, left = (int(v) for v in torch.randint(images.shape[-1] - CROP + 1, (2,)))
            return images[..., top : top + CROP, left : left + CROP].contiguous()

        budget = Budget(self.args.vae_steps, self.args.vae_minutes)
        self._fit_vae("vae", loss, list(vae.parameters()), crop, budget, learning_rate=1e-3)
        vae.requires_grad_(False)
        with torch.no_grad():
            batches = [self.images()[0] for _ in range(STATISTICS_BATCHES)]
            latents = torch.cat([vae.encode(images).latent_dist.mean for images in batches])
            models.normalise_latents(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
        share_weights(vae)
        self._report_psnr(vae)
        return vae

    def finish_decoder(self, vae: AutoencoderKL) -> None:
        """Train the decoder alone on whole pictures, where its group norms see other statistics than on crops."""
        decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv]).requires_grad_(True)
        budget = Budget(self.args.decoder_steps, self.args.decoder_minutes)
        self._fit_vae("decoder", VaeLoss(vae), list(decoder.parameters()), lambda x: x, budget, learning_rate=5e-4)
        vae.requires_grad_(False)
        self._report_psnr(vae)

    def _fit_vae(
        self,
        name: str,
        loss: Callable[..., Any],
        parameters: list[nn.Parameter],
        view: Callable[[Tensor], Tensor],
        budget: Budget,
        learning_rate: float,
    ) -> None:
        def step_loss() -> tuple[Tensor, dict[str, Tensor]]:
            images = view(self.images()[0])
            with self.autocast():
                value, psnr = loss(images)
            return value, {"psnr": psnr}

        samples = self.args.batch * world_size()
        optimise(name, parameters, step_loss, budget, samples_per_step=samples, learning_rate=learning_rate)

    @torch.no_grad()
    def _report_psnr(self, vae: AutoencoderKL) -> None:
        errors = []
        for _ in range(STATISTICS_BATCHES):
            images = self.images()[0]
            decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
            errors.append((decoded - images).square().mean((1, 2, 3)))
        psnr = 10 * torch.log10(4 / torch.cat(errors))
        say(f"vae: {psnr.mean().item():.2f} dB PSNR, the mean of {len(psnr)} new whole pictures")

    def train_unet(self, vae: AutoencoderKL, network: DenoisingLoss) -> None:
        """Train text encoder and U-Net together, and export their running averages with `vae`."""
        scheduler = models.build_scheduler()
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(self.device)
        share_weights(network)
        # Averaged by hand, because torch's AveragedModel makes the host wait for the GPU in each step.
        average = copy.deepcopy(network).requires_grad_(False)
        weights, averages = list(network.parameters()), list(average.parameters())
        loss = self.compiled(network)
        encode = self.compiled(vae.encoder)
        smooth = torch.zeros((), device=self.device)
        exported = 0

        def step_loss() -> tuple[Tensor, dict[str, Tensor]]:
            images, opacity, ids = self.images()
            with torch.no_grad(), self.autocast():
                latents = vae.quant_conv(encode(images)).chunk(2, dim=1)[0].float()
                weight = 1 + 2 * F.avg_pool2d(opacity, CANVAS // latents.shape[-1])
            noise, timesteps = torch.randn_like(latents), sample_timesteps(len(latents), self.device)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            velocity = scheduler.get_velocity(latents, noise, timesteps)
            with self.autocast():
                value = loss(noisy, timesteps, ids, velocity, weight)
            smooth.lerp_(value.detach(), 0.01)
            return value, {"mean": smooth}

        def after_step(step: int, steps: int | None) -> None:
            nonlocal exported
            with torch.no_grad():
                torch._foreach_lerp_([*averages], [*weights], max(EMA_RATE, 1 / step))
            part = step * EXPORTS // steps if steps else 0
            if exported < part < EXPORTS:
                exported = part
                self.export(vae, average, step)

        start = time.perf_counter()
        samples = self.args.batch * world_size()
        steps = optimise(
            "unet",
            weights,
            step_loss,
            Budget(self.args.steps, self.args.minutes),
            samples_per_step=samples,
            learning_rate=1e-3,
            after_step=after_step,
        )
        minutes = (time.perf_counter() - start) / 60
        total = f"{steps} steps, {steps * samples} samples, {minutes:.1f} minutes"
        say(f"unet: {total}, mean loss {smooth.item():.4f}")
        self.export(vae, average, steps)

    def export(self, vae: AutoencoderKL, network: DenoisingLoss, step: int) -> None:
        """Write the pipeline folder and, beside it, a grid of samples."""
        if not is_main():
            return
        half = [copy.deepcopy(part).half().eval() for part in (vae, network.text_encoder, network.unet)]
        pipe = models.build_pipeline(half[0], half[1], self.tokenizer, half[2])
        models.export_pipeline(pipe, self.args.out)
        grid = self.args.out.with_name(f"{self.args.out.name}-{step:06d}.png")
        if self.device.type == "cpu":
            pipe = pipe.to(dtype=torch.float32)
        sample_grid(pipe, self.args.sampling_steps).save(grid)
        say(f"exported {self.args.out} and {grid}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported pipeline")
    parser.add_argument("--minutes", type=float, default=14.0, help="training time of text encoder and U-Net")
    parser.add_argument("--steps", type=int, help="their number of steps, in place of --minutes")
    parser.add_argument("--vae-minutes", type=float, default=2.5, help="training time of the autoencoder")
    parser.add_argument("--vae-steps", type=int, help="its number of steps, in place of --vae-minutes")
    parser.add_argument("--decoder-minutes", type=float, default=1.0, help="training time of the decoder alone")
    parser.add_argument("--decoder-steps", type=int, help="its number of steps, in place of --decoder-minutes")
    parser.add_argument("--resume", type=Path, help="an exported folder to go on from; its encoder stays as it is")
    parser.add_argument("--batch", type=int, default=96, help="samples a step and process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=6, help="processes a GPU that draw scenes and captions")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps of everything")
    args = parser.parse_args()
    args.compile = args.device.startswith("cuda")
    args.sampling_steps = 30
    if args.smoke:
        args.vae_steps, args.decoder_steps, args.steps = 2, 1, 2
        args.batch, args.workers, args.sampling_steps = 1, 0, 1
    return args


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(args.seed + rank)  # the first process's weights are shared, the noise is each one's own
    trainer = Trainer(args, device)
    if args.resume:
        pipe = StableDiffusionPipeline.from_pretrained(args.resume, torch_dtype=torch.float32).to(device)
        vae, text_encoder, unet = pipe.vae.requires_grad_(False), pipe.text_encoder, pipe.unet
    else:
        vae = trainer.train_vae()
        text_encoder, unet = models.build_text_encoder(trainer.tokenizer), models.build_unet()
    trainer.finish_decoder(vae)
    trainer.train_unet(vae, DenoisingLoss(unet, text_encoder).to(device).train())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
