# %% [markdown]
# # Edit a photo
# `editor.invert` finds the noise from which the model draws a picture of yours, and makes a base of it. Outside the
# mask of an edit the photo keeps its own pixels. Words that say what the photo shows make it editable.

# %%
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from fisedit_compile import Editor

OUT = Path("out/examples/photo")
OUT.mkdir(parents=True, exist_ok=True)

pipe = StableDiffusionPipeline.from_pretrained("examples/demo_model")
editor = Editor(pipe)

# %% [markdown]
# Any picture will do, of any size; `box=(left, upper, right, lower)` is what may change of a large one. Here it is one
# that the model has drawn and a file has kept: of the latents and the noise behind it nothing is used.

# %%
prompt = "a pig on the left and a yellow balloon on the right, on a blue background"
pipe(prompt, num_inference_steps=50, guidance_scale=5, generator=torch.Generator().manual_seed(1)).images[0].save(
    OUT / "photo.png"
)
photo = Image.open(OUT / "photo.png").convert("RGB")

# %%
base = editor.invert(photo, prompt, num_inference_steps=50, guidance_scale=5)
edit = editor.edit(base, prompt.replace("yellow", "red"))
edit.image.save(OUT / "red.png")
print(edit.report)
