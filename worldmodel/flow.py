"""Flow matching with dual timesteps, as pure functions; who takes a random draw takes a generator.

One convention: x0 data, x1 noise, x_t = (1 - t) x0 + t x1, v = x1 - x0; t = 1 is pure noise, so
the cleaner of two times is the smaller. Every sample has three noise groups: 0 the conditions, 1 at
time t, 2 at time s. t and s are two draws of the same p(t) and are not sorted; each target token is
in group 2 with its modality's mask ratio, so every token's own time has the marginal p(t).

B batch, L tokens, D width, G noise groups, C channels.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from selfflow.worldmodel.transformer import ModelConfig, Tokens

OBJECTIVES = ("vanilla", "dual", "self_flow")
DISTRIBUTIONS = ("uniform", "logit_normal")
CONDITION, T, S = 0, 1, 2  # noise groups


@dataclass(frozen=True)
class Schedule:
    """p(t) and what is done with it."""

    objective: str = "self_flow"  # vanilla: s = t; dual: s drawn too; self_flow: and distillation
    distribution: str = "uniform"  # or logit_normal
    shift: float = 1.0  # alpha of logit_normal: images 4.63, video 2.95
    context_noise: float = 0.0  # context frames are noised to U(0, this); the paper has 0.2

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective}: choose one of {', '.join(OBJECTIVES)}")
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"distribution={self.distribution}: choose one of {', '.join(DISTRIBUTIONS)}"
            )
        if self.shift <= 0 or not 0 <= self.context_noise <= 1:
            raise ValueError(
                f"shift={self.shift} > 0 and context_noise={self.context_noise} in 0 .. 1"
            )


@dataclass(frozen=True)
class Noised:
    """One noising of a batch: what the model is given, and what it should answer."""

    tokens: Tokens
    tau: Float[Tensor, "B 3"]
    group: Tensor  # (B, L)
    velocity: Tokens  # of the targets


def sample_time(
    shape: tuple[int, ...],
    generator: Generator,
    distribution: str = "uniform",
    shift: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws of p(t) in [0, 1]."""
    if distribution == "uniform":
        return torch.rand(shape, generator=generator, dtype=dtype)
    # shifting a logit-normal(0, 1) by alpha moves its mean by log(alpha)
    normal = torch.randn(shape, generator=generator, dtype=dtype)
    return torch.sigmoid(normal + math.log(shift))


def interpolate(x0: Tensor, x1: Tensor, tau: Tensor) -> Tensor:
    """x_tau = x0 + tau (x1 - x0) for x (B, L, C) and tau (B, L)."""
    return torch.lerp(x0, x1, tau[..., None])


def draw(tokens: Tokens, config: ModelConfig, schedule: Schedule, generator: Generator) -> Noised:
    """Noises clean tokens {modality: (B, L_m, C_m)}: times, groups, and one x1 for all."""
    first = tokens[config.modalities[0].name]
    batch, dtype = first.shape[0], first.dtype
    t, s = sample_time((2, batch), generator, schedule.distribution, schedule.shift, dtype)
    if schedule.objective == "vanilla":
        s = t
    condition = torch.rand(batch, generator=generator, dtype=dtype) * schedule.context_noise
    group = torch.cat([_groups(m, batch, generator) for m in config.modalities], 1)
    noise = {
        m.name: torch.randn(tokens[m.name].shape, generator=generator, dtype=dtype)
        for m in config.modalities
        if m.role == "target" or (m.name == "context" and schedule.context_noise > 0)
    }
    noise = {name: x1.to(first.device) for name, x1 in noise.items()}
    return noised(tokens, noise, torch.stack([condition, t, s], 1), group, config)


def noised(
    tokens: Tokens, noise: Tokens, tau: Tensor, group: Tensor, config: ModelConfig
) -> Noised:
    """Tokens moved towards their noise by each token's own time; without noise they stay clean."""
    device = next(iter(tokens.values())).device
    tau, group = tau.to(device), group.to(device)
    per_token = tau.gather(1, group).split([m.length for m in config.modalities], 1)
    moved = {
        m.name: interpolate(tokens[m.name], noise[m.name], own)
        if m.name in noise
        else tokens[m.name]
        for m, own in zip(config.modalities, per_token, strict=True)
    }
    velocity = {m.name: noise[m.name] - tokens[m.name] for m in config.targets}
    return Noised(moved, tau, group, velocity)


def teacher_view(student: Noised, clean: Tokens, config: ModelConfig) -> Noised:
    """The same noise with every target at min(t, s); conditions are the student's own."""
    cleaner = student.tau[:, T:].amin(1, keepdim=True)
    tau = torch.cat([student.tau[:, :T], cleaner, cleaner], 1)
    tokens = {
        m.name: clean[m.name] + cleaner[..., None] * student.velocity[m.name]
        for m in config.targets
    }
    return replace(student, tokens=student.tokens | tokens, tau=tau)


def flow_loss(velocity: Tokens, target: Tokens, mask: Tokens) -> dict[str, Tensor]:
    """Per modality the mean squared error in fp32 over what the mask (float, broadcasts) leaves;
    0 where it leaves nothing."""
    losses = {}
    for name, x in velocity.items():
        weight = mask[name].expand_as(x)
        error = (x.float() - target[name].float()).square()
        losses[name] = (error * weight).sum() / weight.sum().clamp(min=1)
    return losses


def representation_loss(
    student: Float[Tensor, "B L D"],
    teacher: Float[Tensor, "B L D"],
    valid: Bool[Tensor, "B L"],
) -> Tensor:
    """1 - cosine in fp32, mean over all valid tokens, masked or not; none to the teacher."""
    with torch.autocast(student.device.type, enabled=False):
        cosine = F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)
    return 1 - (cosine * valid).sum() / valid.sum().clamp(min=1)


def _groups(modality, batch: int, generator: Generator) -> Tensor:
    if modality.role == "condition":
        return torch.full((batch, modality.length), CONDITION)
    masked = torch.rand(batch, modality.length, generator=generator) < modality.mask_ratio
    return torch.where(masked, S, T)
