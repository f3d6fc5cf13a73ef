"""From noise to data: plain loops over falling times, from t = 1 (noise) to t = 0 (data).

`velocity(x, t)` is the model's dx/dt with t a float; x is any tensor (pack a dict of tokens with
`pack`). `euler` and `heun` follow the ordinary differential equation; `sde` is the published
Self-Flow sampler, a stochastic equation with the same marginals. All take the same arguments and
take no random draw but from `generator`.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Generator, Tensor

Velocity = Callable[[Tensor, float], Tensor]
LAST = 0.04  # the published sampler's noise-free step at the end


def times(steps: int, shift: float = 1.0, last: float = 0.0) -> Tensor:
    """(steps + 1,) falling from 1 (noise) to 0 (data); shift > 1 spends more steps near noise.

    Shifts of the paper: 1.78 text to image, 6.93 FLUX.2 latents, 15.0 WAN latents. `last` > 0 is
    the size of the last step; the others fall from 1 to it.
    """
    if steps < 1 or shift <= 0 or not 0 <= last < 1:
        raise ValueError(f"steps={steps} >= 1, shift={shift} > 0 and last={last} in 0 .. 1")
    t = torch.linspace(1, 0, steps + 1 if last == 0 else steps)
    t = shift * t / (1 + (shift - 1) * t)
    return t if last == 0 else torch.cat([last + (1 - last) * t, torch.zeros(1)])


def euler(
    velocity: Velocity,
    noise: Tensor,
    steps: int,
    shift: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    """Integrates dx/dt = velocity(x, t) from x(1) = noise to x(0); one call a step, order 1."""
    x = noise
    for t, t_next in pairwise(times(steps, shift).tolist()):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(
    velocity: Velocity,
    noise: Tensor,
    steps: int,
    shift: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    """As `euler` with the mean of the velocities at a step's two ends, but for the last step;
    2 steps - 1 calls, order 2.

    No model is asked at t = 0: a sample without noise does not tell which noise it came from, so
    that a trained model answers with the mean of all (as Karras et al. 2022, algorithm 1).
    """
    x = noise
    for t, t_next in pairwise(times(steps, shift).tolist()):
        slope = velocity(x, t)
        if t_next > 0:
            slope = (slope + velocity(x + (t_next - t) * slope, t_next)) / 2
        x = x + (t_next - t) * slope
    return x


def sde(
    velocity: Velocity,
    noise: Tensor,
    steps: int,
    shift: float = 1.0,
    generator: Generator | None = None,
    last: float = LAST,
) -> Tensor:
    """Euler-Maruyama on dx = ((1 + u) v - x) du + sqrt(2 (1 - u)) dW with u = 1 - t, v = dx/du.

    The drift is v + w · score with diffusion w = 1 - u and score = (u v - x) / (1 - u), so the
    marginals are those of the ordinary equation. steps - 1 noisy steps and a last noise-free one;
    the published sampler is steps=250 (Self-Flow section 5).
    """
    x = noise
    *noisy, end, _ = times(steps, shift, last).tolist()
    for t, t_next in pairwise([*noisy, end]):
        du = t - t_next
        kick = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        x = x + du * _drift(velocity, x, t) + math.sqrt(2 * t * du) * kick
    return x + end * _drift(velocity, x, end)


SOLVERS = {"euler": euler, "heun": heun, "sde": sde}


def guided(
    conditional: Velocity,
    unconditional: Velocity,
    scale: float,
    low: float = 0.0,
    high: float = 1.0,
) -> Velocity:
    """Classifier-free guidance while low <= t <= high: u + scale (c - u), elsewhere c.

    The published script's default for high is 0.7. At scale 1 the unconditional is never called.
    """
    if scale == 1:
        return conditional

    def velocity(x: Tensor, t: float) -> Tensor:
        towards = conditional(x, t)
        if not low <= t <= high:
            return towards
        away = unconditional(x, t)
        return away + scale * (towards - away)

    return velocity


def pack(tokens: dict[str, Tensor]) -> Tensor:
    """{modality: (B, L_m, C_m)} -> (B, sum of L_m C_m), the x of the loops above."""
    return torch.cat([x.flatten(1) for x in tokens.values()], 1)


def unpack(x: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `pack`, in the shapes of `like`."""
    parts = x.split([tokens[0].numel() for tokens in like.values()], 1)
    return {
        name: part.reshape(tokens.shape)
        for (name, tokens), part in zip(like.items(), parts, strict=True)
    }


def _drift(velocity: Velocity, x: Tensor, t: float) -> Tensor:
    return (t - 2) * velocity(x, t) - x  # (1 + u) dx/du - x with dx/du = -dx/dt
