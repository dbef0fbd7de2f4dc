# %% [markdown]
# # Several pictures at once
# Each sample of a batch has words and a mask of its own. Samples whose words stay are the base's, bit for bit.

# %%
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from fisedit_compile import Editor

OUT = Path("out/examples/batch")
OUT.mkdir(parents=True, exist_ok=True)

editor = Editor(StableDiffusionPipeline.from_pretrained("examples/demo_model"))

# %% [markdown]
# A generator each, so that a sample is drawn as it would be alone.

# %%
prompts = [
    "a cat on the left and a red car on the right, on a green background",
    "a bear on the left and an owl on the right, in the snow",
    "a pig on the left and a yellow balloon on the right, on a blue background",
]
generators = [torch.Generator().manual_seed(seed) for seed in (4, 7, 1)]
base = editor.generate(prompts, num_inference_steps=50, guidance_scale=5, generator=generators)

# %%
edit = editor.edit(base, [prompts[0].replace("cat", "dog"), prompts[1], prompts[2].replace("yellow", "red")])
print(edit.report)
for number, (before, after, mask) in enumerate(zip(base.images, edit.images, edit.mask, strict=True)):
    before.save(OUT / f"{number}_base.png")
    after.save(OUT / f"{number}_edit.png")
    print(f"sample {number}: {float(mask.float().mean()):.1%} of the picture drawn anew")
