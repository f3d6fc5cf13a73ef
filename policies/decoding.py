"""From sampled chunks to actions: how a policy decodes, as pure functions.

- `execute`: so many of a chunk's K actions are executed before the next look.
- `ensemble`: every executed action is the mean of all chunks that cover its step (ACT,
  arXiv 2304.13705: weights exp(-ensemble · i), i = 0 the oldest chunk).
- `delay`: real-time chunking (arXiv 2506.07339). Computing a chunk takes `delay` control steps, in
  which the last chunk goes on; the new one is sampled so that it continues what is executed
  meanwhile: guided inpainting with a soft mask, which needs no training.
- `best_of`: so many chunks are sampled; the world model imagines what each leads to, and the one
  that a value head likes best is executed (judging.py).

K actions, C channels (seven normalised action dimensions and terminate); time t: 1 noise, 0 data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from selfflow.configs.entry import one_of
from selfflow.datasets.spec import ACTION_DIM, UserError
from selfflow.worldmodel.dream import Sampling
from selfflow.worldmodel.sampler import Velocity

DECODES = ("head", "joint")
TERMINATE = ACTION_DIM  # the channel after the action's own
STRONGEST = 5.0  # guidance weight at most: the paper's beta
Planned = tuple[int, np.ndarray]  # the control step of a chunk's first action, and the chunk (K, C)


@dataclass(frozen=True)
class Decoding:
    """How a policy acts; None: the checkpoint's own. Raises UserError for what cannot be."""

    decode: str = "head"  # or joint: video and actions together
    execute: int | None = None
    steps: int | None = None  # of the solver
    solver: str = "euler"  # a name of sampler.SOLVERS
    guidance: float = 1.0  # classifier-free, away from no text; 1 is none
    ensemble: float | None = None
    delay: int = 0  # control steps
    best_of: int = 1  # chunks sampled, of which the value head chooses one

    def __post_init__(self) -> None:
        one_of("decode", self.decode, DECODES)
        if self.ensemble is not None and not math.isfinite(self.ensemble):
            raise UserError(f"ensemble={self.ensemble}: a decay such as 0.01, or null for none")
        if self.delay < 0:
            raise UserError(f"delay={self.delay}: control steps, 0 or more")
        if self.best_of < 1:
            raise UserError(f"best_of={self.best_of}: chunks to choose from, 1 or more")
        if self.delay and self.ensemble is not None:
            raise UserError(
                f"ensemble={self.ensemble}, delay={self.delay}: two ways to join chunks; choose one"
            )
        assert self.sampling

    @property
    def sampling(self) -> Sampling:
        """Of the flow."""
        steps = 2 if self.steps is None else self.steps  # 2: fit for all solvers
        try:
            return Sampling(self.solver, steps, guidance=self.guidance)
        except ValueError as e:
            raise UserError(str(e).replace("sampler=", "solver=")) from e

    def settled(self, steps: int, execute: int, chunk: int) -> "Decoding":
        """With these where none were given, for chunks of so many actions."""
        own = replace(
            self,
            steps=steps if self.steps is None else self.steps,
            execute=execute if self.execute is None else self.execute,
        )
        assert own.execute is not None
        if not 1 <= own.execute <= chunk:
            raise UserError(
                f"execute={own.execute}: the chunk has {chunk} actions; choose execute=1..{chunk}"
            )
        if own.delay > min(own.execute, chunk - own.execute):
            cure = f"execute={own.delay}..{chunk - own.delay} (here {own.execute}) or"
            cure = f"{cure} a shorter delay" if 2 * own.delay <= chunk else f"delay=0..{chunk // 2}"
            raise UserError(
                f"delay={own.delay}: the next chunk must be ready when `execute` actions are done, "
                f"and {chunk} actions must last until then; choose {cure}"
            )
        return own


def ensembled(chunks: Sequence[Planned], step: int, decay: float) -> Float[np.ndarray, "C"]:
    """The action of one control step: the weighted mean of all chunks that cover it, oldest first.

    Rotations are averaged as axis-angle vectors: for deltas of a control step (well below 1 rad)
    that differs from the mean rotation in third order only. The gripper is averaged like the rest;
    terminate is a vote by weight, above 0 where more than half of it says so.
    """
    rows = np.stack([chunk[step - at] for at, chunk in chunks if 0 <= step - at < len(chunk)])
    weight = np.exp(-decay * np.arange(len(rows)))
    weight /= weight.sum()
    mean = weight @ rows
    mean[TERMINATE] = weight @ np.where(rows[:, TERMINATE] > 0, 1.0, -1.0)
    return mean.astype(rows.dtype)


def soft_mask(chunk: int, delay: int, left: int) -> Float[Tensor, "K"]:
    """How firmly each action of a new chunk is held to the last one, of which `left` remain.

    1 for the `delay` that are executed before the new chunk arrives; then falling to 0 where the
    last chunk ends: c (e^c - 1) / (e - 1) with c falling linearly (the paper's equation 5).
    """
    i = torch.arange(chunk, dtype=torch.float32)
    c = ((left - i) / (left - delay + 1)).clamp(0, 1)
    return torch.where(i < delay, 1.0, c * torch.expm1(c) / math.expm1(1))


def pinned(
    velocity: Velocity, target: Tensor, weight: Tensor, strongest: float = STRONGEST
) -> Velocity:
    """The velocity, led to data that agree with `target` where `weight` is above 0 (inpainting).

    Pseudo-inverse guidance: with the data that x points at, x0 = x - t v(x), the velocity is
    changed by -w(t) (weight · (target - x0))ᵀ dx0/dx, where w = (t² + (1 - t)²) / (t (1 - t)) is
    exact for standard normal data, and clipped. Costs a backward pass through `velocity` a call.
    target and weight broadcast to x.
    """

    def led(x: Tensor, t: float) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = velocity(x, t)
            data = x - t * v
            missing = ((target - data) * weight).detach()
            (pull,) = torch.autograd.grad(data, x, missing.expand_as(data))
        return v.detach() - strength(t, strongest) * pull

    return led


def strength(t: float, strongest: float = STRONGEST) -> float:
    """w(t) of `pinned`: infinite at both ends, hence clipped."""
    spread = t * (1 - t)
    return strongest if spread == 0 else min(strongest, (t * t + (1 - t) ** 2) / spread)
