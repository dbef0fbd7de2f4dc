"""Train the demo model and export it as a diffusers `StableDiffusionPipeline` folder.

    python examples/train_demo_model.py --out out/demo_model                       # one GPU
    torchrun --nproc-per-node 2 examples/train_demo_model.py --out out/demo_model  # two
    python examples/train_demo_model.py --out out/smoke --smoke                    # all code paths, on a CPU

First a small autoencoder, then text encoder and U-Net together, on pictures that `demo_world` renders on the fly.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from demo_world import models
from demo_world.losses import DenoisingLoss, VaeLoss, sample_timesteps
from demo_world.optimise import Budget, is_main, optimise, say, share_weights, world_size
from demo_world.renderer import Renderer
from demo_world.scene import CANVAS
from demo_world.stream import scene_batches
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.utils import make_image_grid
from PIL.Image import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

CROP = 128  # the autoencoder is convolutional: half-size crops teach it the same at a quarter of the cost
EMA_RATE = 0.001
EXPORTS = 3  # the last of which is the result; the others are there in case a run is cut short
SAMPLE_PROMPTS = (
    "a cat on the left and a red car on the right, on a green background",
    "a dog on the left and a blue car on the right, on a green background",
    "a cat wearing a crown on the left and a red car on the right, on a green background",
    "a big dog in a forest",
    "a bear wearing a hat, in the snow",
    "a yellow balloon at the top left and a rabbit at the bottom right, by the sea",
    "a pig, a green apple and an owl, on a blue and white background",
    "a fox on the left, a purple book in the center and a house on the right, in the hills",
    "a rocket at the top, a panda at the bottom left and a tree at the bottom right, in the night sky",
    "a horse in a desert",
    "a small boat on the left and a big fish on the right, at sunset",
    "a lion wearing a hat and a frog, in a city",
)


class Trainer:
    """What both stages share: device, renderer, tokenizer and the stream of scenes."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        self.device = device
        self.tokenizer: PreTrainedTokenizerFast = models.build_tokenizer()
        self.renderer = Renderer(device)
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.batches = scene_batches(self.tokenizer, args.batch, args.seed + rank, args.workers)

    def images(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures in [-1, 1], the opacity of all objects together `[batch, 1, h, w]` and token ids."""
        scenes, ids = next(self.batches)
        images, alphas = self.renderer.render(scenes)
        opacity = alphas.sum(1, keepdim=True).clamp(0, 1)
        return images * 2 - 1, opacity, ids.to(self.device, non_blocking=True)

    def compiled(self, module: nn.Module) -> nn.Module:
        return torch.compile(module, dynamic=False) if self.args.compile else module

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def train_vae(self) -> AutoencoderKL:
        vae = models.build_vae().to(self.device)
        share_weights(vae)
        loss = self.compiled(VaeLoss(vae))

        def step_loss() -> tuple[Tensor, dict[str, Tensor]]:
            images, _, _ = self.images()
            top, left = (int(v) for v in torch.randint(images.shape[-1] - CROP + 1, (2,)))
            with self.autocast():
                value, psnr = loss(images[..., top : top + CROP, left : left + CROP].contiguous())
            return value, {"psnr": psnr}

        optimise(
            "vae",
            list(vae.parameters()),
            step_loss,
            Budget(self.args.vae_steps, self.args.vae_minutes),
            samples_per_step=self.args.batch * world_size(),
            learning_rate=1e-3,
        )
        vae.requires_grad_(False).eval()
        with torch.no_grad():
            images = torch.cat([self.images()[0] for _ in range(self.args.statistics_batches)])
            chunks = images.split(self.args.batch)
            latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in chunks])
            models.normalise_latents(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
            share_weights(vae)
            decoded = [vae.decode(vae.encode(chunk).latent_dist.mean).sample for chunk in chunks]
            mse = torch.stack([F.mse_loss(*pair) for pair in zip(decoded, chunks, strict=True)])
        say(f"vae: {10 * torch.log10(4 / mse.mean()).item():.2f} dB PSNR on {len(images)} new whole pictures")
        return vae

    def train_unet(self, vae: AutoencoderKL) -> None:
        scheduler = models.build_scheduler()
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(self.device)
        network = DenoisingLoss(models.build_unet(), models.build_text_encoder(self.tokenizer)).to(
            self.device
        )
        share_weights(network)
        # By hand, because torch's AveragedModel makes the host wait for the GPU in each step.
        average = copy.deepcopy(network).requires_grad_(False)
        weights, averages = list(network.parameters()), list(average.parameters())
        loss = self.compiled(network)
        encode = torch.compile(vae.encoder, dynamic=False) if self.args.compile else vae.encoder
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
                torch._foreach_lerp_(averages, weights, max(EMA_RATE, 1 / step))
            part = step * EXPORTS // steps if steps else 0
            if part > exported:
                exported = part
                if is_main():
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
        say(
            f"unet: {steps} steps, {steps * samples} samples, {minutes:.1f} minutes, mean loss {smooth.item():.4f}"
        )

    def export(self, vae: AutoencoderKL, network: DenoisingLoss, step: int) -> None:
        """Write the pipeline folder and, beside it, a grid of samples."""
        half = [copy.deepcopy(part).half().eval() for part in (vae, network.text_encoder, network.unet)]
        pipe = models.build_pipeline(half[0], half[1], self.tokenizer, half[2])
        models.export_pipeline(pipe, self.args.out)
        grid = self.args.out.with_name(f"{self.args.out.name}-{step:06d}.png")
        if self.device.type == "cpu":
            pipe = pipe.to(dtype=torch.float32)
        sample_grid(pipe, self.args.sampling_steps).save(grid)
        say(f"exported {self.args.out} and {grid}")


def sample_grid(pipe: StableDiffusionPipeline, steps: int) -> Image:
    """`SAMPLE_PROMPTS`, one noise seed each, as one picture."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(SAMPLE_PROMPTS))]
    result = pipe(list(SAMPLE_PROMPTS), num_inference_steps=steps, guidance_scale=5.0, generator=generators)
    return make_image_grid(result.images, rows=3, cols=4)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported pipeline")
    parser.add_argument("--minutes", type=float, default=14.0, help="training time of text encoder and U-Net")
    parser.add_argument("--steps", type=int, help="their number of steps, in place of --minutes")
    parser.add_argument("--vae-minutes", type=float, default=2.5, help="training time of the autoencoder")
    parser.add_argument("--vae-steps", type=int, help="its number of steps, in place of --vae-minutes")
    parser.add_argument("--batch", type=int, default=96, help="samples a step and process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers", type=int, default=6, help="processes a GPU that draw scenes and captions"
    )
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps of everything")
    args = parser.parse_args()
    args.compile = args.device.startswith("cuda")
    args.sampling_steps, args.statistics_batches = 30, 8
    if args.smoke:
        args.steps, args.vae_steps, args.batch, args.workers = 2, 2, 2, 0
        args.sampling_steps, args.statistics_batches = 1, 1
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
    trainer.train_unet(trainer.train_vae())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
