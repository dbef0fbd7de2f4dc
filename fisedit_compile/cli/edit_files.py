"""The files of ``fisedit-compile edit``: each is written aside and renamed, as soon as its picture is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisedit_compile import __version__
from fisedit_compile.cli.png_text import parameters, png_info, sampler
from fisedit_compile.cli.whole_file import write_whole

if TYPE_CHECKING:
    from PIL import Image

    from fisedit_compile.editing.base import Base
    from fisedit_compile.editing.result import Edit


@dataclass
class EditFiles:
    """Writes what a run makes.

    Attributes:
        out: the folder.
        model: as the command named it.
        count: how many edits the run makes; the files of one have no number.
    """

    out: Path
    model: str
    count: int
    _sheets: list[Image.Image] = field(default_factory=list)

    def name(self, kind: str, number: int) -> str:
        """The file of an edit, ``edit.png`` or ``edit-2.png`` for example; ``number`` counts from 1."""
        return f"{kind}.png" if self.count == 1 else f"{kind}-{number}.png"

    def write_base(self, base: Base) -> None:
        """Write the base's picture."""
        self.write("base.png", base.image, self._text(base, base.prompts[0], base.arguments, {}))

    def write_edit(self, base: Base, edit: Edit, number: int) -> None:
        """Write an edit's picture and its mask, and add it to the overview.

        Args:
            base: what it was made from.
            edit: the edit.
            number: of the edit, from 1 on.
        """
        from fisedit_compile.editing.overview import draw_overview, mask_picture, stacked

        prompt, words, mask = base.prompts[0], edit.trajectory.prompts[0], edit.mask[0].cpu()
        if base.frame is not None:
            mask = base.frame.mask_of_photo(mask)
        text = self._text(base, words, edit.trajectory.arguments, {"Edit of": prompt or None})
        self.write(self.name("edit", number), edit.image, text)
        self.write(self.name("mask", number), mask_picture(mask, edit.image.size))
        self._sheets.append(draw_overview(base.image, edit.image, mask, prompt=prompt, edit_prompt=words))
        self.write("overview.png", stacked(self._sheets))

    def write(self, name: str, picture: Image.Image, text: str | None = None) -> None:
        """Write a picture; ``text`` is the ``parameters`` of its PNG."""
        info = None if text is None else png_info(text)
        write_whole(self.out / name, lambda partial: picture.save(partial, pnginfo=info))

    def write_report(self, text: str) -> None:
        """Write ``report.json``."""
        write_whole(self.out / "report.json", lambda partial: partial.write_text(text + "\n"))

    def _text(self, base: Base, prompt: str, arguments: Any, more: dict[str, Any]) -> str:
        negative = arguments.get("negative_prompt")
        if isinstance(negative, Sequence) and not isinstance(negative, str):  # one for each picture
            negative = negative[0]
        # A generator that is rewound still knows its seed; the noise of a photo comes from none.
        seed = None if arguments.get("latents") is not None else base.rewound_generators()[0].initial_seed()
        width, height = base.image.size
        values = {
            "Steps": arguments["num_inference_steps"],
            **sampler(base.schedule.name, base.schedule.config),
            "CFG scale": arguments["guidance_scale"],
            "Seed": seed,
            "Size": f"{width}x{height}",
            "Model": Path(self.model).name,
            "Version": f"fisedit-compile {__version__}",
            **more,
        }
        return parameters(prompt, negative, values)
