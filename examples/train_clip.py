"""Train a small CLIP on rendered scenes, for the figures of `fisedit-compile quality --clip`, and save it.

    python examples/train_clip.py --out examples/demo_model/clip --device cuda --minutes 3 --workers 12
    python examples/train_clip.py --out out/clip --smoke    # all code paths, on a CPU

Worker processes draw scenes and their captions, the device renders them. Beside each scene its batch has scenes that
differ from it in one thing, whose words must not be nearer to it. What is printed at the end is of the saved model and
of scenes that no step has seen: of pairs that differ in one thing, how often the right words are nearer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from demo_world.captions import describe_fully
from demo_world.models import MAX_TOKENS, build_tokenizer, save_tokenizer
from demo_world.optimise import Budget, optimise
from demo_world.renderer import Renderer, SceneTensors, encode_scenes
from demo_world.scene import Scene
from demo_world.stream import tokenise
from demo_world.variations import KINDS, sample_family, sample_pair, vary
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from fisedit_compile.quality.clip_scores import Clip

SIDE = 128  # of the pictures that the model sees
FAMILY = 4  # scenes that differ from one another in one thing
PATIENCE = 8  # batches that a worker draws ahead
MEAN = DEVIATION = 0.5  # pixels reach the model in [-1, 1]

Batch = tuple[SceneTensors, Tensor, Tensor]


class FamilyStream(IterableDataset[Batch]):
    """Batches of whole families: encoded scenes, token ids and the mask of their tokens, both `[batch, 32]`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch: int, seed: int) -> None:
        self.tokenizer, self.batch, self.seed = tokenizer, batch, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            families = [sample_family(rng, FAMILY) for _ in range(self.batch // FAMILY)]
            ids = tokenise(self.tokenizer, [caption for each in families for caption in each.captions])
            scenes = encode_scenes([scene for each in families for scene in each.scenes])
            yield scenes, ids, (ids != self.tokenizer.pad_token_id).long()


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """2.9 M parameters: six layers that see 256 patches, four that read words."""
    return CLIPModel(
        CLIPConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 128,
                "intermediate_size": 512,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "max_position_embeddings": MAX_TOKENS,
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={
                "hidden_size": 192,
                "intermediate_size": 384,
                "num_hidden_layers": 6,
                "num_attention_heads": 6,
                "image_size": SIDE,
                "patch_size": 8,
            },
            projection_dim=128,
        )
    )


def image_processor() -> CLIPImageProcessor:
    side = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(
        size=side, crop_size=side, image_mean=[MEAN] * 3, image_std=[DEVIATION] * 3, do_center_crop=False
    )


def shown(images: Tensor) -> Tensor:
    """Rendered pictures `[n, 3, h, w]` in [0, 1] as the model sees them in training: a little blurred, shaded and
    noisy, as a diffusion model's pictures are."""
    small = F.interpolate(images, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    shape, device = (len(small), 1, 1, 1), images.device
    blurred = F.avg_pool2d(F.pad(small, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    small = torch.lerp(small, blurred, torch.rand(shape, device=device).square())
    small = small * (0.94 + 0.12 * torch.rand(shape, device=device))
    small = small + 0.04 * torch.rand(shape, device=device) * torch.randn_like(small)
    return (small.clamp(0, 1) - MEAN) / DEVIATION


def train(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    device = next(model.parameters()).device
    renderer = Renderer(device)
    loader = DataLoader(
        FamilyStream(tokenizer, args.batch, args.seed),
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=PATIENCE if args.workers else None,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)

    def step_loss() -> tuple[Tensor, dict[str, Tensor]]:
        scenes, ids, kept = next(batches)
        with torch.no_grad():
            pixels = shown(renderer.render(scenes)[0])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = model(
                input_ids=ids.to(device, non_blocking=True),
                attention_mask=kept.to(device, non_blocking=True),
                pixel_values=pixels,
            )
        # In full precision: logits of a family lie nearer to each other than bf16 tells apart.
        logits = model.logit_scale.exp() * (output.image_embeds.float() @ output.text_embeds.float().T)
        own = torch.arange(len(pixels), device=device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        right = (logits.detach().argmax(1) == own).float().mean()
        return loss, {"right": right, "scale": model.logit_scale.detach().exp()}

    optimise(
        "clip",
        list(model.parameters()),
        step_loss,
        Budget(args.steps, args.minutes),
        samples_per_step=args.batch,
        learning_rate=args.learning_rate,
    )


def save(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model, in half precision, image processor and tokenizer."""
    model.to("cpu", torch.float16).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def held_out_pairs(count: int, seed: int) -> dict[str, list[tuple[Scene, Scene]]]:
    """`count` pairs of each kind, of two objects left and right, that differ in that one thing."""
    rng = np.random.default_rng([seed, 10**6])  # no worker has this number
    pairs: dict[str, list[tuple[Scene, Scene]]] = {kind: [] for kind in KINDS}
    for kind, found in pairs.items():
        while len(found) < count:
            before = sample_pair(rng)
            after = vary(before, kind, rng)
            if after is not None:
                found.append((before, after))
    return pairs


def report(clip: Clip, count: int, seed: int) -> str:
    """What the model makes of true changes: a table with a row a kind."""
    renderer, rows = Renderer(), []
    for kind, pairs in held_out_pairs(count, seed).items():
        right, near, along = [], [], []
        for pair in pairs:
            images = (255 * renderer.render(pair)[0]).round().byte().permute(0, 2, 3, 1).numpy()
            before, after = (Image.fromarray(each) for each in images)
            words = [describe_fully(each) for each in pair]
            there, back = clip.score(before, after, *words), clip.score(after, before, *reversed(words))
            right += [there.follows, back.follows]
            near.append(there.image_similarity)
            along.append(there.directional_similarity)
        rows.append([kind, mean(right), mean(near), mean(along)])
    rows.append(["all", *(mean(row[i] for row in rows) for i in (1, 2, 3))])
    heads = ["one thing differs", "right words nearer", "image-image similarity", "directional similarity"]
    return tabulate(rows, heads, tablefmt="github", floatfmt=".3f")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=3.0, help="training time")
    parser.add_argument("--steps", type=int, help="number of steps, in place of --minutes")
    parser.add_argument("--batch", type=int, default=512, help=f"scenes a step, a multiple of {FAMILY}")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=200, help="pairs of each kind that the model is tested on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=12, help="processes that draw scenes and captions")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps of everything")
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps, args.batch, args.held_out, args.workers = 2, 8, 2, 0
    if args.batch % FAMILY:
        parser.error(f"--batch {args.batch}: scenes come in families of {FAMILY}, so give a multiple")
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_clip(tokenizer).to(args.device).train()
    start = time.perf_counter()
    train(model, tokenizer, args)
    print(f"trained for {time.perf_counter() - start:.0f} s", flush=True)
    save(model, tokenizer, args.out)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.2f} MB\n\n{report(Clip.load(args.out), args.held_out, args.seed)}")


if __name__ == "__main__":
    main()
