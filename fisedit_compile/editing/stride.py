"""Which steps of its base an edit visits, and a scheduler that goes from one of them to the next.

A base holds its latents at every step, so an edit need not repeat them all: it may visit every second or third step and
let the scheduler make longer ones. The U-Net runs at the base's own timesteps, whose caches it reads.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Stride = int | Literal["auto"]

#: Schedulers whose steps can be made longer: deterministic ones, with one U-Net call a step, that reach the next
#: timestep of a list of any gaps.
SCHEDULERS = (
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)

#: The longest stride that ``"auto"`` takes, and the fewest steps that it leaves to an edit: see docs/decisions.md.
LONGEST, FEWEST = 3, 15


class SolverStep(NamedTuple):
    """What a scheduler was given at one step.

    Attributes:
        prediction: the guided noise prediction ``[n, c, h, w]``.
        timestep: of the step.
        latents: those that it started from, ``[n, c, h, w]``.
    """

    prediction: Tensor
    timestep: Any
    latents: Tensor


def visited_steps(steps: int, stride: int) -> tuple[int, ...]:
    """The steps that an edit makes, as positions among the ``steps`` of its base: the first, the last, and between them
    every ``stride``-th counted from the last.

    The first gap may be up to half a stride longer or shorter than the others. The last step is always visited, since
    it is the one that removes the last of the noise.
    """
    counted = range(steps - 1, 0, -stride)
    later = [step for step in counted if 2 * step > stride or step == steps - 1]
    return (0, *reversed(later))


def visits_of(scheduler: Any, stride: Stride, steps: int, arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """The steps that edits of a base visit, as positions among the ``steps`` of the pipeline's loop.

    Args:
        scheduler: with its timesteps set.
        stride: of the config.
        arguments: of the pipeline's call.

    Raises:
        ValueError: see :func:`choose_stride`.
    """
    return visited_steps(steps, choose_stride(stride, steps, why_not(scheduler, loop_steps=steps, arguments=arguments)))


def why_not(scheduler: Any, *, loop_steps: int, arguments: Mapping[str, Any]) -> str:
    """Why edits have to visit every step of a base; empty where they need not.

    Args:
        scheduler: with its timesteps set.
        loop_steps: denoising steps that the pipeline's loop makes.
        arguments: of the pipeline's call.
    """
    name = type(scheduler).__name__
    if name not in SCHEDULERS:
        return f"{name} cannot make longer steps than the base's (those that can: {', '.join(SCHEDULERS)})"
    if arguments.get("eta") or str(scheduler.config.get("algorithm_type", "")).startswith("sde"):
        return f"{name} adds noise at each step, which would be other noise at longer ones"
    if loop_steps != len(scheduler.timesteps):
        return f"the pipeline makes {loop_steps} of the scheduler's {len(scheduler.timesteps)} steps"
    return ""


def choose_stride(stride: Stride, steps: int, reason: str) -> int:
    """The stride of the edits of a base.

    Args:
        stride: as the user gave it.
        steps: of the base.
        reason: of :func:`why_not`.

    Raises:
        ValueError: a number above 1 where it has to be 1, or one that leaves an edit fewer than two steps.
    """
    if stride == "auto":
        return 1 if reason else max(1, min(LONGEST, steps // FEWEST))
    if stride > 1 and reason:
        raise ValueError(f"stride={stride}: {reason}; pass stride=1 or 'auto'")
    if stride > max(1, steps - 1):
        raise ValueError(f"stride={stride} for a base of {steps} steps: at most {max(1, steps - 1)}")
    return stride


def visit(scheduler: Any, steps: int, visits: Sequence[int], then: Callable[[], None]) -> None:
    """Let ``scheduler`` stop at some of its timesteps alone, whenever they are set.

    Args:
        scheduler: of one call of a pipeline; it is changed.
        steps: how many timesteps it would have.
        visits: of :func:`visited_steps`.
        then: called when all timesteps are set, before those that are not visited are dropped.
    """
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)  # pipelines read the signature
    def set_visited(num_inference_steps: int | None = None, *args: Any, **kwargs: Any) -> None:
        set_timesteps(None if num_inference_steps is None else steps, *args, **kwargs)
        then()
        _keep(scheduler, visits)

    scheduler.set_timesteps = set_visited


def _keep(scheduler: Any, visits: Sequence[int]) -> None:
    timesteps, kept = scheduler.timesteps, list(visits)
    scheduler.timesteps = timesteps[kept]
    if hasattr(scheduler, "sigmas"):
        # Their steps lead from one entry of ``sigmas`` to the next, the last one of which belongs to no timestep.
        scheduler.sigmas = scheduler.sigmas[[*kept, len(timesteps)]]
        scheduler.num_inference_steps = len(kept)
        return
    _lengthen_ddim(scheduler, timesteps.tolist(), kept)


def _lengthen_ddim(scheduler: Any, timesteps: list[int], visits: Sequence[int]) -> None:
    """DDIM steps from t to ``t - num_train_timesteps // num_inference_steps``: let that be the gap of each step."""
    trained = scheduler.config.num_train_timesteps
    last = trained // scheduler.num_inference_steps
    after = [*(timesteps[visit] for visit in visits[1:]), timesteps[-1] - last]
    # Fractions, since the division by them is exact whatever the gap.
    counts = [Fraction(trained, timesteps[visit] - next_) for visit, next_ in zip(visits, after, strict=True)]
    kind = type(scheduler)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.num_inference_steps = self.inference_steps_by_gap[self.steps_made]
        self.steps_made += 1
        return kind.step(self, *args, **kwargs)

    override_step(scheduler, step)
    scheduler.inference_steps_by_gap, scheduler.steps_made = counts, 0


def override_step(scheduler: Any, step: Callable[..., Any]) -> None:
    """Give one scheduler another ``step``: by a class of its own, so that copies of it work by themselves."""
    kind = type(scheduler)
    own = {"step": functools.wraps(kind.step)(step), "__module__": kind.__module__}  # pipelines read the signature
    scheduler.__class__ = type(kind.__name__, (kind,), own)


def watch_steps(scheduler: Any) -> list[SolverStep]:
    """A list to which each step of ``scheduler``, but not of its copies, adds what it was given."""
    seen: list[SolverStep] = []
    kind = type(scheduler)

    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self is scheduler:
            seen.append(SolverStep(model_output.clone(), timestep, sample.clone()))
        return kind.step(self, model_output, timestep, sample, *args, **kwargs)

    override_step(scheduler, step)
    return seen


class StrideError:
    """What a scheduler's steps miss of the base: the same for an edit, as long as it resembles the base.

    They miss it where an edit makes longer steps than its base, and where the base is a picture that no model drew.
    While the mask is not known the edit's latents are compared with the base's, and the difference has to be that of
    the words. So the edit's step is corrected by the error that a step makes from the base's own latents with its own
    prediction. An edit of unchanged words then is the base.

    Args:
        scheduler: of the edit, its timesteps set and no step made.
    """

    def __init__(self, scheduler: Any) -> None:
        self._twin = copy.deepcopy(scheduler)

    def of(self, step: SolverStep, after: Tensor) -> Tensor:
        """The base's latents ``after`` a visited step, less what the longer step makes of the latents before it."""
        reached = self._twin.step(step.prediction, step.timestep, step.latents, return_dict=False)[0]
        return after.to(torch.float32) - reached.to(torch.float32)
