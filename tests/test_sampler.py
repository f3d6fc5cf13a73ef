"""The Euler loop on a flow whose solution is known: data N(0, a²), noise N(0, 1)."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from selfflow.worldmodel.sampler import euler, times

SCALE = 0.3  # a


def velocity(x: Tensor, t: float) -> Tensor:
    """E[x1 - x0 | x_t = x]: x_t has variance (1 - t)² a² + t²."""
    variance = (1 - t) ** 2 * SCALE**2 + t**2
    return x * (t - (1 - t) * SCALE**2) / variance


def test_euler_reaches_the_known_solution_at_first_order() -> None:
    noise = torch.randn(50, dtype=torch.float64)
    exact = noise * SCALE  # the flow keeps quantiles: x(0) = a · x(1)
    errors = [float((euler(velocity, noise, n) - exact).norm()) for n in (64, 128, 256)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([1, 1], abs=0.1)


def test_a_constant_velocity_is_exact_in_one_step() -> None:
    x0, x1 = torch.randn(5), torch.randn(5)
    assert torch.allclose(euler(lambda x, t: x1 - x0, x1, 1), x0)


def test_times_fall_from_one_to_zero_and_shift_towards_noise() -> None:
    assert torch.equal(times(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    shifted = times(4, 3.0)
    assert shifted[0] == 1
    assert shifted[-1] == 0
    assert shifted[2] == pytest.approx(3 * 0.5 / 2)
    assert (shifted[1:-1] > times(4)[1:-1]).all()
