# %% [markdown]
# # Add words
# Words that are added keep attention maps of their own, all others take those of the base (Prompt-to-Prompt's
# refinement), so that what they name stays where it is.

# %%
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from fisedit_compile import Editor

OUT = Path("out/examples/refine")
OUT.mkdir(parents=True, exist_ok=True)

editor = Editor(StableDiffusionPipeline.from_pretrained("examples/demo_model"))

# %%
prompt = "a bear on the left and an owl on the right, in the snow"
generator = torch.Generator().manual_seed(7)
base = editor.generate(prompt, num_inference_steps=50, guidance_scale=5, generator=generator)
base.image.save(OUT / "base.png")

# %%
edit = editor.edit(base, "a bear wearing a hat on the left and an owl on the right, in the snow")
edit.image.save(OUT / "hat.png")
print(edit.report)

# %% [markdown]
# `report.added_words` and `removed_words` say how the two prompts were understood.

# %%
print("added:", edit.report.added_words, "removed:", edit.report.removed_words)
