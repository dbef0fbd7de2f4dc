"""The scheduler that a base was made with: whether an edit runs the same steps, and repeats the same noise."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisedit_compile.utils.frozen_mapping import FrozenMapping

#: Numbers that steps leave behind, and that setting the timesteps does not take away.
_LEFT_OVER = ("dt",)

#: The option of schedulers with noise of their own that makes it the same each time.
OWN_SEED = "noise_sampler_seed"


@dataclass(frozen=True, eq=False)
class Schedule:
    """A scheduler whose timesteps are set, as far as its steps depend on it.

    Attributes:
        name: of its class.
        config: its options.
        tables: its tensors and arrays of up to one dimension, on the CPU: timesteps, noise levels, and so on. What has
            more dimensions is left over from steps.
    """

    name: str
    config: Mapping[str, Any]
    tables: Mapping[str, Tensor]

    @classmethod
    def of(cls, scheduler: Any) -> Schedule:
        config = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
        tables = {
            name: torch.as_tensor(value).cpu().clone()
            for name, value in vars(scheduler).items()
            if _is_table(value) and name not in _LEFT_OVER
        }
        return cls(type(scheduler).__name__, FrozenMapping(config), FrozenMapping(tables))

    @property
    def timesteps(self) -> Tensor:
        """One for each step, ``[steps]``."""
        return self.tables["timesteps"]

    def difference(self, now: Schedule, *, tables: bool = True) -> str:
        """What has changed up to ``now``, in words that fit between "the scheduler" and "than for the base"; or empty.

        Args:
            now: the scheduler as it is.
            tables: compare the tables, too, which is only meaningful where timesteps are set in both.
        """
        if self.name != now.name:
            return f"is another one ({now.name}, not {self.name})"
        if options := _differing(self.config, now.config):
            return f"{self.name} has another {', '.join(options)}"
        if tables and (others := _differing(self.tables, now.tables)):
            return f"{self.name} has other {', '.join(others)}"
        return ""


def refuse_unseeded(scheduler: Any) -> None:
    """Refuse a scheduler that says itself that its noise does not come from the pipeline's generator.

    Raises:
        ValueError: it has a seed of its own, which is not set.
    """
    if dict(scheduler.config).get(OWN_SEED, 0) is None:
        raise ValueError(_own_noise(scheduler))


def refuse_noise_of_its_own(scheduler: Any) -> None:
    """Let the first step of ``scheduler`` fail where it draws noise that does not come from the pipeline's generator.

    An edit repeats the noise of its base, which it can rewind in the pipeline's generator alone. So the first step is
    made by two copies of the scheduler before, with copies of the generator, which have to give the same latents.
    """
    step = scheduler.step

    @functools.wraps(step)  # pipelines read the signature
    def first_step(*args: Any, **kwargs: Any) -> Any:
        del scheduler.step  # the class's own again
        once, again = (
            copy.deepcopy(scheduler).step(
                *args, **{**kwargs, "generator": _copied(kwargs["generator"])} if "generator" in kwargs else kwargs
            )
            for _ in range(2)
        )
        if not torch.allclose(_latents(once), _latents(again), rtol=0, atol=0, equal_nan=True):
            raise ValueError(_own_noise(scheduler))
        return step(*args, **kwargs)

    scheduler.step = first_step


def _own_noise(scheduler: Any) -> str:
    what_to_do = f"set its {OWN_SEED}" if OWN_SEED in scheduler.config else "take another scheduler"
    return (
        f"{type(scheduler).__name__} draws noise that does not come from the pipeline's generator, so that no edit "
        f"could repeat it: {what_to_do}"
    )


def _copied(generator: Any) -> Any:
    if isinstance(generator, (list, tuple)):
        return [_copied(each) for each in generator]
    if generator is None:
        return None
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin


def _latents(out: Any) -> Tensor:
    latents: Tensor = out[0] if isinstance(out, tuple) else out.prev_sample
    return latents


def _is_table(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim <= 1


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of values that differ, or that only one of the two has."""
    common = before.keys() & after.keys()
    return sorted((before.keys() ^ after.keys()) | {name for name in common if not _equal(before[name], after[name])})


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return bool(np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other)
