# %% [markdown]
# # Edit an edit
# An edit is edited as a base is: it is recorded along the latents that it went through, and its pixels stay wherever
# the next round does not reach.

# %%
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from fisedit_compile import Editor

OUT = Path("out/examples/rounds")
OUT.mkdir(parents=True, exist_ok=True)

editor = Editor(StableDiffusionPipeline.from_pretrained("examples/demo_model"))

# %%
prompts = [
    "a cat on the left and a red car on the right, on a green background",
    "a dog on the left and a red car on the right, on a green background",
    "a dog on the left and a blue car on the right, on a green background",
]
generator = torch.Generator().manual_seed(4)
picture = editor.generate(prompts[0], num_inference_steps=50, guidance_scale=5, generator=generator)
picture.image.save(OUT / "0.png")

# %%
for number, prompt in enumerate(prompts[1:], 1):
    picture = editor.edit(picture, prompt)
    picture.image.save(OUT / f"{number}.png")
    print(f"round {number}: {picture.report}")
