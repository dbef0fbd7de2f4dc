"""State reused by all sparse steps of one edit: the mask's index tensors and the hoisted values of the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fisedit_compile.compiler.lowered import Lowered
from fisedit_compile.planning.buckets import Bucket
from fisedit_compile.planning.edit_plan import EditPlan
from fisedit_compile.runtime.prompt_values import PromptValues

if TYPE_CHECKING:
    from fisedit_compile.runtime.model_state import ModelState
    from fisedit_compile.runtime.static_step import Packed


@dataclass
class Prepared:
    """The plan's tensors, and the values that depend on the prompt alone.

    Attributes:
        program: tells the program that prepared it from all others, some of which may run the same graphs.
        lowered: the graphs of that program.
        plan: the rows of the mask.
        values: the plan's tensors, where steps have the mask's own sizes.
        bucket, packed: the bucket of the mask and the padded tensors, where steps run at fixed sizes.
        model: the state of the U-Net that it was prepared in.
        dense: the mask is larger than ``config.dense_above``: steps run the dense U-Net.
        prompt: the hoisted values of the prompt.
    """

    program: object
    lowered: Lowered
    plan: EditPlan
    values: dict[Any, Tensor] = field(default_factory=dict)
    bucket: Bucket | None = None
    packed: Packed | None = None
    model: ModelState | None = None
    dense: bool = False
    prompt: PromptValues = field(default_factory=PromptValues)
