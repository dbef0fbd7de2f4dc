"""The figures that the FISEdit paper prints in its Table A1, beside ours.

Source: Yu et al., "Accelerating Text-to-image Editing via Cache-enabled Sparse Diffusion Inference", ML for Systems at
NeurIPS 2023, appendix B.2: Stable Diffusion 2 at 768x768, 50 steps, U-Net calls a second on one A100. None stands for a
figure that is not known here; the table shows it as "n/a".
"""

from __future__ import annotations

from typing import NamedTuple


class PaperFigures(NamedTuple):
    """The figures of one method: multiply-accumulates a step in G (1e9), and U-Net calls a second."""

    gmacs: float | None = None
    calls_per_second: float | None = None


#: The figures by the names that ``table_a1.py --methods`` takes.
PAPER_FIGURES: dict[str, PaperFigures] = {
    "sdtp": PaperFigures(gmacs=1901),
    "sdip": PaperFigures(),
    "prompt-to-prompt": PaperFigures(),
    "pix2pix-zero": PaperFigures(),
    "ppap": PaperFigures(),
    "instruct-pix2pix": PaperFigures(),
    "sdedit": PaperFigures(),
    "diffedit": PaperFigures(),
    "fisedit-5": PaperFigures(),
    "fisedit-15": PaperFigures(),
    "fisedit-30": PaperFigures(),
}
