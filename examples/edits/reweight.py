# %% [markdown]
# # Let a word count more, or less
# `weights` multiplies the attention maps of words in the steps under control (Prompt-to-Prompt's re-weighting). The
# prompt may stay: then nothing else changes.

# %%
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from fisedit_compile import Editor

OUT = Path("out/examples/reweight")
OUT.mkdir(parents=True, exist_ok=True)

editor = Editor(StableDiffusionPipeline.from_pretrained("examples/demo_model"))

# %%
prompt = "a bear wearing a hat on the left and an owl on the right, in the snow"
generator = torch.Generator().manual_seed(7)
base = editor.generate(prompt, num_inference_steps=50, guidance_scale=5, generator=generator)
base.image.save(OUT / "base.png")

# %%
for weight in (-2, 0.5, 2):
    edit = editor.edit(base, prompt, weights={"hat": weight})
    edit.image.save(OUT / f"hat_{weight}.png")
    print(f"hat times {weight}: {edit.report}")

# %% [markdown]
# It goes together with other words, and with several words in a row.

# %%
edit = editor.edit(base, prompt.replace("an owl", "a blue car"), weights={"blue car": 1.5})
edit.image.save(OUT / "blue_car.png")
