"""``largest_mask``: an edit whose mask is found to be larger ends before its sparse steps."""

from __future__ import annotations

import pytest
import torch
from support.pipelines import EDIT, left_half

from fisedit_compile import Base, Editor, LargeMaskError, MaskError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_mask_up_to_the_limit(tiny_editor: Editor, tiny_base: Base) -> None:
    want = tiny_editor.edit(tiny_base, EDIT)
    found = tiny_editor.edit(tiny_base, EDIT, torch.ones(tiny_base.latents[0, 0].shape), combine="and")
    area = found.report.mask_area  # as it was found: all of it, and no cell around it
    assert 0 < area < 1
    assert torch.equal(tiny_editor.edit(tiny_base, EDIT, largest_mask=area).latents, want.latents)
    steps: list[int] = []

    def count(pipe: object, step: int, timestep: object, values: object) -> None:
        steps.append(step)

    with pytest.raises(LargeMaskError, match=f"covers {area:.0%} of the picture") as caught:
        tiny_editor.edit(tiny_base, EDIT, largest_mask=area * 0.99, callback_on_step_end=count)
    assert isinstance(caught.value, MaskError)
    assert steps == list(range(tiny_base.dense_steps))


def test_one_that_is_given_alone_is_not_looked_at(tiny_editor: Editor, tiny_base: Base) -> None:
    assert tiny_editor.edit(tiny_base, EDIT, left_half(), largest_mask=0.01).report.mask_area == 0.5
    with pytest.raises(LargeMaskError):
        tiny_editor.edit(tiny_base, EDIT, left_half(), combine="or", largest_mask=0.01)


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), True, "half"])
def test_no_share(tiny_editor: Editor, tiny_base: Base, value: object) -> None:
    with pytest.raises(ValueError, match="a share of the picture"):
        tiny_editor.edit(tiny_base, EDIT, largest_mask=value)  # type: ignore[arg-type]
