# %% [markdown]
# # Replace a word
# A picture is generated once and kept as a *base*. An edit gives it other words: where they change the picture is found
# out in the first steps, and only there is it drawn anew.

# %%
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from fisedit_compile import Editor

OUT = Path("out/examples/replace")
OUT.mkdir(parents=True, exist_ok=True)

editor = Editor(StableDiffusionPipeline.from_pretrained("examples/demo_model"))

# %%
prompt = "a cat on the left and a red car on the right, on a green background"
generator = torch.Generator().manual_seed(4)
base = editor.generate(prompt, num_inference_steps=50, guidance_scale=5, generator=generator)
base.image.save(OUT / "base.png")

# %% [markdown]
# One base serves any number of edits, in any order. Each report says what was found and how long a step took.

# %%
for animal in ("dog", "panda", "lion"):
    edit = editor.edit(base, prompt.replace("cat", animal))
    edit.image.save(OUT / f"{animal}.png")
    print(f"{animal}: {edit.report}")
