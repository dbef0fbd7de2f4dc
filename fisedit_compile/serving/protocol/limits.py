"""What a client may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The most of each thing.

    Attributes:
        pixels: of a picture, one that is asked for or one that is sent.
        steps: denoising steps.
        pictures: of one request.
        letters: of a prompt.
        body_bytes: of a request.
        partial_pictures: of one stream, as OpenAI's.
    """

    pixels: int = 2**20
    steps: int = 100
    pictures: int = 4
    letters: int = 2000
    body_bytes: int = 16 * 2**20
    partial_pictures: int = 3


@dataclass(frozen=True)
class Defaults:
    """What a request has that does not say otherwise.

    Attributes:
        side: of a picture, in pixels.
        multiple: that the sides of all pictures are multiples of.
        steps: denoising steps.
        guidance: guidance scale.
    """

    side: int
    multiple: int
    steps: int = 50
    guidance: float = 7.5
