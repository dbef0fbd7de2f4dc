"""Pictures that show what a trained model draws."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import make_image_grid
from PIL.Image import Image

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


def sample_grid(pipe: StableDiffusionPipeline, steps: int) -> Image:
    """`SAMPLE_PROMPTS`, one noise seed each, as one picture."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(SAMPLE_PROMPTS))]
    result = pipe(list(SAMPLE_PROMPTS), num_inference_steps=steps, guidance_scale=5.0, generator=generators)
    return make_image_grid(result.images, rows=3, cols=4)
