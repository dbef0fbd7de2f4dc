"""Edits of the photos of PIE-Bench, in the table of ``benchmarks/photos.py``.

    python benchmarks/pie_bench.py --data DIR --model DIR --dino DIR --clip DIR --device cuda --json out/pie_bench.json

PIE-Bench (Ju et al., "Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code", ICLR 2024) is a folder
with ``mapping_file.json`` and ``annotation_images``. Of each photo it says what it shows and what it is to show, and
where that changes: pairs of first pixel and number of pixels, row by row. Figures of the background are of its pixels
alone, where the authors' code blackens the others in both pictures and divides by all, and finds higher ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from photo_edits.measure import Figures, PhotoCase, measure, table, write
from photo_edits.methods import METHODS, Settings
from photo_edits.structure import dino_keys
from PIL import Image
from torch import Tensor

from fisedit_compile.cli.runtime import describe
from fisedit_compile.editing.photo import open_photo, read_photos
from fisedit_compile.editing.plain_pipeline import load_pipeline
from fisedit_compile.quality.clip_scores import Clip


def main(argv: list[str] | None = None) -> None:
    """Edit, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="with mapping_file.json")
    parser.add_argument("--model", required=True, metavar="DIR|HUB-ID", help="a Stable Diffusion pipeline")
    parser.add_argument("--dino", type=Path, required=True, metavar="DIR", help="DINO ViT-B/8, for structure distance")
    parser.add_argument("--clip", type=Path, metavar="DIR", help="a CLIP model, for what the words ask for")
    parser.add_argument("--cases", type=int, help="the first ones (default: all)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, written after each case")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="keep all pictures")
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    clip = Clip.load(args.clip) if args.clip else None
    cases = list(read_cases(args.data, clip, args.cases))
    features = dino_keys(args.dino, device)
    pipe = load_pipeline(args.model, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    methods = [METHODS[name](pipe, Settings(args.steps, args.guidance)) for name in args.methods]
    conditions = {"steps": args.steps, "guidance": args.guidance, "model": args.model, **describe(device, dtype)}
    figures: list[Figures] = []
    for number, case in enumerate(cases, start=1):
        figures += [measure(case, method, features, args.pictures) for method in methods]
        write(args.json, figures, **conditions)
        print(f"{number} of {len(cases)}: {case.id}", file=sys.stderr, flush=True)
    print(table(figures))


def read_cases(data: Path, clip: Clip | None, count: int | None = None) -> Iterator[PhotoCase]:
    """The cases of a folder of PIE-Bench, in the order of its file.

    Args:
        data: the folder.
        clip: for figures of what the words ask for; None leaves them out.
        count: only the first ones; None is all.

    Raises:
        ValueError: no such folder, or one that is not of this form.
        OSError: a photo that is missing or cannot be read.
    """
    try:
        entries = json.loads((data / "mapping_file.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{data} is no folder of PIE-Bench, with its mapping_file.json ({error})") from None
    for name, entry in list(entries.items())[:count]:
        try:
            path, encoded = data / "annotation_images" / entry["image_path"], entry["mask"]
            prompt, words = (_plain(entry[key]) for key in ("original_prompt", "editing_prompt"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{data}: entry {name} of mapping_file.json is not of PIE-Bench's form ({error})"
            ) from None
        (photo,) = read_photos(open_photo(path))
        edited = decode_mask(encoded, photo.height, photo.width)
        yield PhotoCase(name, photo, prompt, words, ~edited, _judge(clip, photo, prompt, words))


def decode_mask(encoded: list[int], height: int, width: int) -> Tensor:
    """A mask of PIE-Bench: bool ``[height, width]``, true where the photo is to change.

    As in the authors' code the outermost pixels count as edited, since annotations are not exact there.

    Args:
        encoded: pairs of first pixel and number of pixels, row by row.

    Raises:
        ValueError: an odd number of values, or a pixel that is none of the picture's.
    """
    if len(encoded) % 2 or any(first < 0 or length < 0 for first, length in zip(*[iter(encoded)] * 2, strict=True)):
        raise ValueError(f"a mask of {len(encoded)} values: pairs of first pixel and number of pixels, none below 0")
    mask = torch.zeros(height * width, dtype=torch.bool)
    for first, length in zip(*[iter(encoded)] * 2, strict=True):
        if first >= len(mask):
            raise ValueError(f"a mask that begins at pixel {first} of a picture of {width}x{height}")
        mask[first : first + length] = True
    mask = mask.view(height, width)
    mask[[0, -1]] = True
    mask[:, [0, -1]] = True
    return mask


def _plain(prompt: str) -> str:
    """The words without the brackets around those that change."""
    return prompt.replace("[", "").replace("]", "")


def _judge(clip: Clip | None, photo: Image.Image, prompt: str, words: str) -> Any:
    def judge(picture: Image.Image) -> dict[str, float]:
        if clip is None:
            return {}
        figures = clip.score(photo, picture, prompt, words)
        return {"CLIP direction": figures.directional_similarity, "CLIP follows": float(figures.follows)}

    return judge


if __name__ == "__main__":
    main()
