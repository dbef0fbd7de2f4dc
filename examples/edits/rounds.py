# %% [markdown]
# # Edit an edit
# The picture of an edit becomes the base of the next round, as a photo would: its pixels stay wherever the next round
# does not reach.

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
base = editor.generate(prompts[0], num_inference_steps=50, guidance_scale=5, generator=generator)
base.image.save(OUT / "0.png")

# %%
for number, prompt in enumerate(prompts[1:], 1):
    edit = editor.edit(base, prompt)
    edit.image.save(OUT / f"{number}.png")
    print(f"round {number}: {edit.report}")
    if number < len(prompts) - 1:
        base = editor.invert(edit.image, prompt, num_inference_steps=50, guidance_scale=5)
