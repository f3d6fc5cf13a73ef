"""From noise to data: a plain Euler loop over the flow's ordinary differential equation."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def times(steps: int, shift: float = 1.0) -> Tensor:
    """(steps + 1,) falling from 1 (noise) to 0 (data); shift > 1 spends more steps near noise."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def euler(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int, shift: float = 1.0
) -> Tensor:
    """Integrates dx/dt = velocity(x, t) from x(1) = noise to x(0)."""
    x = noise
    schedule = times(steps, shift).tolist()
    for t, t_next in pairwise(schedule):
        x = x + (t_next - t) * velocity(x, t)
    return x
