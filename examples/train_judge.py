"""Train the judge of `fisedit-compile quality` on rendered scenes, and save it beside the demo model.

    python examples/train_judge.py --out examples/demo_model/judge    # some ten minutes on two processor cores

Scenes of the kind that the cases are about are rendered once; what training steps see of them is moved, scaled, blurred
and shaded at random. The accuracy is that on scenes which no step has seen.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from demo_world.edits import (
    BACKGROUNDS,
    BESIDE,
    FACES,
    NAMES,
    PLACES,
    SIZES,
    Item,
    place_background,
    place_item,
    windows,
)
from demo_world.renderer import Renderer
from demo_world.scene import BACKGROUND_PARAMETERS, WIDTHS, Background, Scene
from demo_world.vocabulary import ACCESSORIES, COLORS, OBJECTS, TINTABLE, TINTS
from torch import Tensor

from fisedit_compile.quality.judge import NOTHING, OTHER, Judge, JudgeConfig, cut_windows, shrink
from fisedit_compile.quality.judge_network import WINDOW, JudgeNetwork

ROOM = 1.25  # the kept windows are this much wider than the judge's, so that they can be moved
KEPT = 60  # side of a kept window in pixels
RENDERED = 32  # scenes at a time
GRADIENT = "gradient"
IGNORED = -100  # cross_entropy's label of what does not count


class Samples(NamedTuple):
    """Windows uint8 `[n, 3, KEPT, KEPT]` with their labels `[n, 3]` (name, colour, accessory), and small pictures uint8
    `[m, 3, h, w]` with those of their backgrounds `[m]`."""

    windows: Tensor
    labels: Tensor
    pictures: Tensor
    backgrounds: Tensor


def judge_config() -> JudgeConfig:
    return JudgeConfig(
        names=(*NAMES, OTHER, NOTHING),
        colours=TINTS,
        accessories=("none", *ACCESSORIES),
        backgrounds=(*BACKGROUNDS, GRADIENT),
        coloured=TINTABLE,
        windows=windows(),
        accuracy={},
    )


def draw_scene(rng: np.random.Generator) -> tuple[Scene, dict[str, Item | None], str]:
    """A scene, what stands at each place in it, and its background's class."""
    first_size = str(rng.choice(list(SIZES)))
    sizes = [first_size, str(rng.choice(BESIDE[first_size]))]
    rng.shuffle(sizes)
    parameters = tuple(float(value) for value in rng.random(BACKGROUND_PARAMETERS))
    name = str(rng.choice([*BACKGROUNDS, GRADIENT]))
    if name == GRADIENT:
        top, bottom = rng.choice(list(COLORS), size=2, replace=False)
        background = Background(GRADIENT, (str(top), str(bottom)), parameters)
    else:
        background = place_background(name, parameters)
    items: dict[str, Item | None] = {}
    objects = []
    for place, size in zip(PLACES, sizes, strict=True):
        draw = rng.random()
        if draw < 0.05:
            items[place] = None
            continue
        others = [each for each in OBJECTS if each not in NAMES]
        word = str(rng.choice(others if draw < 0.15 else NAMES))
        colour = str(rng.choice(TINTS)) if word in TINTABLE else ""
        accessory = str(rng.choice(["none", *ACCESSORIES])) if word in FACES else "none"
        item = items[place] = Item(word, colour, accessory, size)
        low, high = WIDTHS[SIZES[size]]
        jitter = (float(rng.uniform(-6, 6)), float(rng.uniform(-6, 6)))
        objects.append(place_item(item, place, float(rng.uniform(low, high)), jitter))
    return Scene(tuple(objects), background), {place: items.get(place) for place in PLACES}, name


def render_samples(count: int, rng: np.random.Generator, config: JudgeConfig) -> Samples:
    """Samples of `count` scenes; of places that are empty, too."""
    renderer, kept = Renderer(), []
    for _ in range(count // RENDERED):
        drawn = [draw_scene(rng) for _ in range(RENDERED)]
        pictures, _ = renderer.render([scene for scene, _, _ in drawn])
        parts, labels = [], []
        for place in PLACES:
            items = [items[place] for _, items, _ in drawn]
            boxes = torch.tensor([config.windows[place][item.size if item else "medium"] for item in items])
            boxes[:, 2] *= ROOM
            parts.append(_bytes(cut_windows(pictures, boxes, KEPT)))
            labels += [_labels(item, config) for item in items]
        backgrounds = torch.tensor([config.backgrounds.index(name) for _, _, name in drawn])
        kept.append(Samples(torch.cat(parts), torch.tensor(labels), _bytes(shrink(pictures)), backgrounds))
    return Samples(*(torch.cat(each) for each in zip(*kept, strict=True)))


def _labels(item: Item | None, config: JudgeConfig) -> tuple[int, int, int]:
    if item is None:
        return config.names.index(NOTHING), IGNORED, IGNORED
    name = item.name if item.name in NAMES else OTHER
    colour = config.colours.index(item.colour) if item.colour else IGNORED
    return config.names.index(name), colour, config.accessories.index(item.accessory)


def _bytes(pictures: Tensor) -> Tensor:
    return (255 * pictures).round().to(torch.uint8)


def augmented(kept: Tensor, side: int, generator: torch.Generator, *, shift: float) -> Tensor:
    """Windows `[n, 3, side, side]` in [0, 1] of kept ones: moved by up to `shift` of their side, scaled, sometimes
    blurred, shaded, with a little noise."""
    count = len(kept)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = uniform(0.9, 1.1) / ROOM
    theta[:, :, 2] = uniform(-2 * shift, 2 * shift, 2) / ROOM
    grid = F.affine_grid(theta, [count, 3, side, side], align_corners=False)
    pictures = F.grid_sample(kept.float() / 255, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.lerp(pictures, blurred, uniform(0, 1, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.5))
    pictures = pictures * uniform(0.92, 1.08, 1, 1, 1) + uniform(-0.04, 0.04, 3, 1, 1)
    return pictures + 0.02 * torch.randn(pictures.shape, generator=generator)


def centred(kept: Tensor) -> Tensor:
    """The judge's own windows, in [0, 1], of kept ones."""
    boxes = torch.tensor([[0.5, 0.5, 1 / ROOM]]).expand(len(kept), -1)
    return cut_windows(kept.float() / 255, boxes, WINDOW)


def train(samples: Samples, config: JudgeConfig, steps: int, batch: int, seed: int) -> JudgeNetwork:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = config.network().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        at = torch.randint(len(samples.windows), (batch,), generator=generator)
        logits = network.objects(augmented(samples.windows[at], WINDOW, generator, shift=0.06))
        names, colours, accessories = samples.labels[at].unbind(1)
        loss = F.cross_entropy(logits.names, names, label_smoothing=0.05)
        loss = loss + _cross_entropy(logits.colours, colours) + _cross_entropy(logits.accessories, accessories)
        at = torch.randint(len(samples.pictures), (batch,), generator=generator)
        pictures = samples.pictures[at].float() / 255
        pictures = pictures * (0.96 + 0.08 * torch.rand(batch, 1, 1, 1, generator=generator))
        pictures = pictures + 0.02 * torch.randn(pictures.shape, generator=generator)
        loss = loss + F.cross_entropy(network.backgrounds(pictures), samples.backgrounds[at])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return network.eval()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """0 where no label counts."""
    counted = labels != IGNORED
    return F.cross_entropy(logits[counted], labels[counted]) if counted.any() else logits.sum() * 0


@torch.no_grad()
def accuracy(network: JudgeNetwork, held_out: Samples) -> dict[str, float]:
    """Share of right answers for each kind of class."""
    parts = [network.objects(centred(each)) for each in held_out.windows.split(256)]
    answers = [torch.cat([getattr(part, name) for part in parts]) for name in ("names", "colours", "accessories")]
    found = {}
    for name, logits, labels in zip(("name", "colour", "accessory"), answers, held_out.labels.unbind(1), strict=True):
        counted = labels != IGNORED
        found[name] = float((logits.argmax(1) == labels)[counted].float().mean())
    right = network.backgrounds(held_out.pictures.float() / 255).argmax(1) == held_out.backgrounds
    return {**found, "background": float(right.float().mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the judge")
    parser.add_argument("--scenes", type=int, default=6400, help="rendered scenes to train on")
    parser.add_argument("--held-out", type=int, default=640, help="rendered scenes to test on")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = judge_config()
    start = time.perf_counter()
    samples = render_samples(args.scenes, np.random.default_rng([args.seed, 0]), config)
    held_out = render_samples(args.held_out, np.random.default_rng([args.seed, 1]), config)
    print(f"rendered {args.scenes} scenes, {time.perf_counter() - start:.0f} s", flush=True)
    network = train(samples, config, args.steps, args.batch, args.seed)
    scores = {name: round(share, 4) for name, share in accuracy(network, held_out).items()}
    judge = Judge(JudgeConfig(**{**vars(config), "accuracy": scores}), network)
    judge.save(args.out)
    print(f"{args.out}: right in {', '.join(f'{share:.1%} of {name}s' for name, share in scores.items())} (held out)")


if __name__ == "__main__":
    main()
