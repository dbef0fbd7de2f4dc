# %% [markdown]
# # Say where
# A mask of your own takes the place of the one that is found, or cuts or joins it. It may be an image, an array or a
# tensor of any size, and of any shape: a mask of another shape compiles nothing anew.

# %%
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from fisedit_compile import Editor

OUT = Path("out/examples/own_mask")
OUT.mkdir(parents=True, exist_ok=True)

editor = Editor(StableDiffusionPipeline.from_pretrained("examples/demo_model"))

# %%
prompt = "a cat on the left and a red car on the right, on a green background"
generator = torch.Generator().manual_seed(4)
base = editor.generate(prompt, num_inference_steps=50, guidance_scale=5, generator=generator)
base.image.save(OUT / "base.png")

# %% [markdown]
# White is edited: an ellipse around the cat.

# %%
width, height = base.image.size
mask = Image.new("L", (width, height))
ImageDraw.Draw(mask).ellipse((0, 0.2 * height, 0.52 * width, 0.8 * height), fill=255)
mask.save(OUT / "mask.png")

# %%
for combine in ("replace", "and", "or"):
    edit = editor.edit(base, prompt.replace("cat", "dog"), mask=mask, combine=combine)
    edit.image.save(OUT / f"{combine}.png")
    print(f"{combine}: {edit.report}")
