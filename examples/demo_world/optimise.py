"""One training loop for all stages: AdamW, warm-up, cosine decay, steps or minutes, one GPU or several."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

MEASURE_FROM, MEASURE_TO = 60, 160  # steps timed to turn minutes into steps; all of them lie in the warm-up
WARMUP = 200
REPORT_EVERY = 100


@dataclass(frozen=True)
class Budget:
    """How long to train: `steps`, or where that is None, `minutes`, compilation included."""

    steps: int | None
    minutes: float


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    if is_main():
        print(text, flush=True)


@torch.no_grad()
def share_weights(module: nn.Module) -> None:
    """Give every process the first one's weights."""
    if dist.is_initialized():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    if dist.is_initialized():
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        parts = (flat / world_size()).split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])


def optimise(
    name: str,
    parameters: list[nn.Parameter],
    step_loss: Callable[[], tuple[Tensor, dict[str, Tensor]]],
    budget: Budget,
    *,
    samples_per_step: int,
    learning_rate: float,
    after_step: Callable[[int, int | None], None] = lambda step, steps: None,
) -> int:
    """Minimise `step_loss()` (the loss, and figures to log); returns the number of steps taken.

    `samples_per_step` counts all processes. `after_step(step, steps)` runs after each step, counted from 1;
    `steps` is None as long as it is unknown. With a budget in minutes, the number of steps follows from the speed
    of the first ones, as the first process measured it, so that every process takes the same number and the
    learning rate reaches its end.
    """
    device = parameters[0].device
    optimiser = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
    )
    total = budget.steps
    start = mark = reported = time.perf_counter()
    step = last = 0
    while total is None or step < total:
        if total is None and step in (MEASURE_FROM, MEASURE_TO):
            _synchronize(device)
            now = time.perf_counter()
            if step == MEASURE_TO:
                speed = (MEASURE_TO - MEASURE_FROM) / (now - mark)
                left = max(0.0, 60 * budget.minutes - (now - start))
                plan = torch.tensor([step + max(1, int(speed * left))], device=device)
                if dist.is_initialized():
                    dist.broadcast(plan, src=0)
                total = int(plan.item())
                say(f"{name}: {speed:.2f} steps/s, so {total} steps in {budget.minutes:g} minutes")
            mark = now
        rise = min(1.0, (step + 1) / WARMUP)
        fall = 0.5 * (1 + math.cos(math.pi * step / total)) if total else 1.0
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * rise * (0.01 + 0.99 * fall)
        loss, figures = step_loss()
        loss.backward()
        _average_gradients(parameters)
        clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        after_step(step, total)
        if step % REPORT_EVERY == 0 or step == total:
            numbers = " ".join(f"{key} {value.item():.4f}" for key, value in {"loss": loss.detach(), **figures}.items())
            now = time.perf_counter()
            rate = (step - last) * samples_per_step / (now - reported)
            say(f"{name} step {step}/{total or '?'}: {numbers}, {rate:.0f} samples/s, {now - start:.0f} s")
            reported, last = now, step
    return step


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
