"""Errors of a service: what was asked for is not there, or cannot be drawn."""

from __future__ import annotations

from fisedit_compile.errors import FiseditError


class PictureGoneError(FiseditError):
    """A picture that is to be changed is not there, or cannot be drawn again as it was."""


class WithheldPictureError(FiseditError):
    """The safety checker blackened the picture: nothing of it is kept."""


class OtherPipelineError(FiseditError):
    """This process has another pipeline than the one that was asked for."""


class PainterGoneError(FiseditError):
    """Whoever computed died, again and again."""


class BusyError(FiseditError):
    """As many requests wait as may.

    Attributes:
        retry_after: whole seconds behind which there is room, as a rule.
    """

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are being worked on or wait, which is as many as may: try again later")
        self.retry_after = retry_after
