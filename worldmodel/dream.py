"""Futures from noise: all targets of a world model are sampled together, or some are given.

A given target (actions, to ask "what would I see if I did this?") is clean, at time 0, while the
others fall from 1 to 0. Objectives with two timesteps train tokens side by side at different
times; `vanilla` does not, so for it this is a guess.

B batch, L tokens, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from selfflow.worldmodel.sampler import SOLVERS, Velocity, guided, pack, unpack
from selfflow.worldmodel.transformer import ModelConfig, Prefix, Tokens, Valid

CLEAN, MOVING = 0, 1  # noise groups
Steer = Callable[[Velocity, Tokens], Velocity]  # of the packed targets, and in which shapes


@dataclass(frozen=True)
class Sampling:
    """How noise becomes data."""

    solver: str = "euler"  # a name of sampler.SOLVERS
    steps: int = 20
    shift: float = 1.0  # above 1 spends more steps near noise
    guidance: float = 1.0  # of classifier-free guidance; 1 is none

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"sampler={self.solver}: choose one of {', '.join(SOLVERS)}")
        least = 2 if self.solver == "sde" else 1  # its last step is another
        if self.steps < least or self.shift <= 0 or self.guidance < 0:
            raise ValueError(
                f"sampler={self.solver}: steps={self.steps} must be {least} or more, "
                f"shift={self.shift} above 0, guidance={self.guidance} 0 or more"
            )


@runtime_checkable
class Dreamer(Protocol):
    """What `dream` needs of a model; transformer.VideoActionTransformer has it."""

    config: ModelConfig

    def forward(self, tokens: Tokens, tau: Tensor, group: Tensor, valid: Valid) -> Tokens: ...

    def prefix(self, tokens: Tokens, tau: Tensor, valid: Valid) -> Prefix: ...

    def decode(
        self, tokens: Tokens, tau: Tensor, group: Tensor, prefix: Prefix, valid: Valid
    ) -> Tokens: ...


@torch.no_grad()
def dream(
    model: Dreamer,
    tokens: Tokens,
    valid: Tokens,
    sampling: Sampling,
    generator: Generator,
    given: Tokens | None = None,
    steer: Steer | None = None,
    noise: Tokens | None = None,
) -> Tokens:
    """Every target modality, (B, L_m, C_m) each: sampled, or as `given`.

    `tokens` are clean conditions (B, L_m, C_m), `valid` bool (B, L_m) of conditions and given
    targets, absent where all are. The generator lives on the CPU, so that a seed means the same on
    every device. Guidance leads away from the velocity without text, whose tokens are then marked
    absent; it needs a model that was trained with text dropped. `steer` may change the velocity;
    `noise` is that of each sampled target to start from, instead of drawing it.
    Raises ValueError for a given name that is no target, and where nothing is left to sample.
    """
    given, targets = given or {}, model.config.targets
    sampled = [m for m in targets if m.name not in given]
    if len(targets) - len(sampled) != len(given) or not sampled:
        have = ", ".join(m.name for m in targets)
        raise ValueError(f"given {', '.join(given)}: must be some, not all, of the targets {have}")
    some = tokens[model.config.conditions[0].name]
    noise = noise or {
        m.name: torch.randn(len(some), m.length, m.channels, generator=generator, dtype=some.dtype)
        for m in sampled
    }
    noise = {name: x.to(some.device) for name, x in noise.items()}
    clean = tokens | given
    field = guided(
        _field(model, clean, valid, noise),
        _field(model, clean, _without_text(clean, valid), noise),
        sampling.guidance,
    )
    if steer:
        field = steer(field, noise)
    solve = SOLVERS[sampling.solver]
    x = solve(field, pack(noise), sampling.steps, sampling.shift, generator)
    return given | unpack(x, noise)


def _field(model: Dreamer, clean: Tokens, valid: Tokens, like: Tokens) -> Velocity:
    """The velocity of the packed targets `like`, the rest being clean.

    With attention=prefix the pass over the conditions is made once, when it is first needed.
    """
    some = next(iter(like.values()))
    cached = model.config.attention == "prefix"
    part = model.config.targets if cached else model.config.modalities
    groups = [torch.full((len(some), m.length), int(m.name in like)) for m in part]
    group = torch.cat(groups, 1).to(some.device)
    kept: list[Prefix] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        tau = some.new_tensor([0.0, t]).expand(len(some), 2)
        now = clean | unpack(x, like)
        if cached:
            if not kept:
                kept.append(model.prefix(clean, tau[:, CLEAN], valid))
            found = model.decode(now, tau, group, kept[0], valid)
        else:
            found = model.forward(now, tau, group, valid)
        return pack({name: found[name] for name in like})

    return velocity


def _without_text(tokens: Tokens, valid: Tokens) -> Tokens:
    if "text" not in tokens:
        return valid
    return valid | {
        "text": torch.zeros(tokens["text"].shape[:2], dtype=torch.bool).to(tokens["text"].device)
    }
