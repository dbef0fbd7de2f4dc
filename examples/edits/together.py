# %% [markdown]
# # Edits of several pictures at a time
# One run of the pipeline makes edits of different bases, each as it is made alone.

# %%
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from fisedit_compile import Editor, EditRequest

OUT = Path("out/examples/together")
OUT.mkdir(parents=True, exist_ok=True)

editor = Editor(StableDiffusionPipeline.from_pretrained("examples/demo_model"))

# %%
prompts = [
    "a cat on the left and a red car on the right, on a green background",
    "a bear on the left and an owl on the right, in the snow",
]
bases = [
    editor.generate(prompt, num_inference_steps=50, guidance_scale=5, generator=torch.Generator().manual_seed(seed))
    for prompt, seed in zip(prompts, (4, 7), strict=True)
]

# %% [markdown]
# Bases have the same size, steps and guidance. Words, masks and negative prompts are each edit's own; one that cannot
# be made comes back as an exception, and the others are made.

# %%
edits = editor.edit_many(
    [
        EditRequest(bases[0], prompts[0].replace("cat", "dog")),
        EditRequest(bases[1], prompts[1].replace("a bear", "a bear wearing a hat"), negative_prompt="glasses"),
        EditRequest(bases[0], prompts[0].replace("red", "blue")),
    ],
    return_exceptions=True,
)
for number, edit in enumerate(edits):
    print(f"{number}: {edit if isinstance(edit, Exception) else edit.report}")
    if not isinstance(edit, Exception):
        edit.image.save(OUT / f"{number}.png")
