"""The base of any picture: from memory or store, or drawn again from what the picture was drawn from."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fisedit_compile.serving.artist import Artist
from fisedit_compile.serving.errors import PictureGoneError
from fisedit_compile.serving.held_bases import HeldBases
from fisedit_compile.serving.library import Library
from fisedit_compile.serving.picture import BasePlace, Picture
from fisedit_compile.serving.picture_files import of_png, pixels_digest

if TYPE_CHECKING:
    from fisedit_compile.editing.base import Base
    from fisedit_compile.editing.editor import Editor
    from fisedit_compile.editing.result import Edit

#: Edits that are kept in memory, without their bases, to be recorded if somebody edits them again.
_MOST_EDITS = 64

#: By how many of 255 levels a pixel may be off of a picture that is drawn again in another way (an edit that was made
#: beside others, a picture that the pipeline drew without recording it): more is no rounding.
MOST_OFF = 16

#: Edits in a row that are made again where all their bases are gone.
_MOST_ROUNDS = 64


class Recall:
    """Finds the bases of pictures.

    Args:
        editor: the editor.
        artist: over that editor.
        bases: that are held or stored.
        library: the pictures.
        pipeline: the editor's digest; pictures of other pipelines have no bases for it.
    """

    def __init__(self, editor: Editor, artist: Artist, bases: HeldBases, library: Library, pipeline: str) -> None:
        self._editor, self._artist, self._bases = editor, artist, bases
        self._library, self._pipeline = library, pipeline
        self._edits: OrderedDict[str, Edit] = OrderedDict()

    def keep_edit(self, name: str, edit: Edit) -> None:
        """Keep an edit in memory, so that its base can be recorded without making it again; the oldest go."""
        self._edits[name] = edit
        if len(self._edits) > _MOST_EDITS:
            gone, _ = self._edits.popitem(last=False)
            self._library.note_base_gone(gone)

    def let_go_of_edit(self, name: str) -> None:
        """Forget an edit, if it is kept, whose picture could not be written."""
        self._edits.pop(name, None)

    def record(self, name: str) -> Picture:
        """The picture of that name.

        Raises:
            PictureGoneError: there is none, or one of another pipeline.
        """
        record = self._library.get(name)
        if record is None:
            raise PictureGoneError(f"there is no picture {name}")
        if record.pipeline != self._pipeline:
            raise PictureGoneError(f"picture {name} was drawn with another model or other options: generate it again")
        return record

    def base_of(self, record: Picture) -> Base:
        """The base of a picture: at hand, or else drawn again, from what the picture was drawn from.

        Raises:
            PictureGoneError: that is gone as well, or gives another picture now.
        """
        line = [record]
        while (base := self.at_hand(line[-1])) is None:
            parent = line[-1].parent
            if parent is None:
                base = self._drawn_again(line[-1])
                break
            if len(line) == _MOST_ROUNDS:
                raise PictureGoneError(f"picture {record.id} is an edit of too many edits whose bases are gone")
            line.append(self.record(parent))
        for parent_record, each in pairwise(reversed(line)):
            settings, control = (parent_record.settings, each.settings), each.report.get("cross_replace")
            asked = self._artist.request(base, each.prompt, each.mask, *settings, cross_replace=control)
            edit = self._artist.edit(asked)
            base = self._recorded(each.id, edit, each)
        return base

    def at_hand(self, record: Picture) -> Base | None:
        """The base of a picture from memory or store, or recorded of an edit in memory; None where there is neither."""
        if (base := self._bases.find(record.id)) is not None:
            return base
        if (edit := self._edits.get(record.id)) is not None:
            return self._recorded(record.id, edit)
        return None

    def _recorded(self, name: str, edit: Edit, record: Picture | None = None) -> Base:
        """The base of an edit, kept like any other.

        Args:
            name: of the picture.
            edit: the edit.
            record: the picture, where the edit was made again.
        """
        stored = None
        if record is not None:
            most_off = MOST_OFF if self._rounds_otherwise(record) else 0
            if edit.trajectory.frame is not None:
                most_off = 0  # it is a part of its picture, whose pixels the base has
            stored = _stored_pixels(record, edit.image, most_off)
        base = _with_pixels(self._editor.base_of(edit), stored)
        self._edits.pop(name, None)  # the editor keeps its base for as long as the edit is kept
        self._library.note_base(name, BasePlace.HELD)
        self._bases.add(name, base)
        return base

    def _rounds_otherwise(self, record: Picture) -> bool:
        """Whether a picture, or one that it was made from, was made beside others or without being recorded."""
        line: Picture | None = record
        while line is not None:
            if line.report.get("made_together", 1) > 1 or not line.report.get("recorded", True):
                return True
            line = self._library.get(line.parent) if line.parent else None
        return False

    def _drawn_again(self, record: Picture) -> Base:
        if record.kind == "photo":
            base = self._artist.invert(record.png, record.prompt, record.settings)
        else:
            base = self._artist.new_picture(record.prompt, record.settings, record.seed, None)
        most_off = MOST_OFF if self._rounds_otherwise(record) else 0
        base = _with_pixels(base, _stored_pixels(record, base.image, most_off))
        self._library.note_base(record.id, BasePlace.HELD)
        self._bases.add(record.id, base)
        return base


def _with_pixels(base: Base, stored: Any) -> Base:
    """The base with the pixels of a stored picture, where these are others than its own."""
    return base if stored is None else replace(base, images=[stored], pictures=[stored.copy()])


def _stored_pixels(record: Picture, image: Any, most_off: int) -> Any:
    """The pixels of a picture that was drawn again, where these are others: for edits of it to be of what was answered.

    Args:
        record: of the picture as it was.
        image: drawn again.
        most_off: by how many of 255 levels a pixel may differ.

    Raises:
        PictureGoneError: they differ by more than that.
    """
    if pixels_digest(image) == record.pixels:
        return None
    stored = of_png(record.png).convert(image.mode)
    off = np.asarray(stored, dtype=int) - np.asarray(image) if stored.size == image.size else np.inf
    if np.abs(off).max() > most_off:
        raise PictureGoneError(
            f"the base of picture {record.id} is gone, and what is drawn again of it is another picture: generate a "
            "new one"
        )
    return stored
