"""Flow matching with dual timesteps, as pure functions; who takes a random draw takes a generator.

One convention: x0 data, x1 noise, x_t = (1 - t) x0 + t x1, v = x1 - x0; t = 1 is pure noise, so
the cleaner of two times is the smaller. Every sample has three noise groups: 0 the conditions, 1 at
time t, 2 at time s. t and s are two draws of the same p(t) and are not sorted; each target token is
in group 2 with its modality's mask ratio, so every token's own time has the marginal p(t).
The other objectives change only what OBJECTIVES says: from one generator all of them draw the same
t, mask and noise.

B batch, L tokens, D width, G noise groups, C channels.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from selfflow.worldmodel.layers import without_autocast
from selfflow.worldmodel.transformer import Modality, ModelConfig, Tokens

# times of a sample's target tokens, and whose features the student's are aligned with
OBJECTIVES = {
    "vanilla": ("one", "none"),  # all at t
    "dual": ("two", "none"),  # at t, or at s with the modality's mask ratio
    "self_flow": ("two", "ema"),
    "sra": ("one", "ema"),
    "repa": ("one", "external"),
    "diffusion_forcing": ("own", "none"),  # every token at a draw of its own
    "full_masking": ("noise", "none"),  # at t, or at 1 with the modality's mask ratio
}
ALIGNMENTS = ("auto", "none", "ema", "external")
DISTRIBUTIONS = ("uniform", "logit_normal", "plateau_logit_normal")
HIGH_NOISE = 0.95  # the extra draws of Schedule.high_noise lie between this and 1
CONDITION, T, S = 0, 1, 2  # noise groups


@dataclass(frozen=True)
class Schedule:
    """p(t) and what is done with it."""

    objective: str = "self_flow"  # a key of OBJECTIVES
    distribution: str = "uniform"  # one of DISTRIBUTIONS
    shift: float = 1.0  # alpha of the logit-normals: images 4.63, video 2.95
    context_noise: float = 0.0  # context frames are noised to U(0, this); the paper has 0.2
    high_noise: float = 0.0  # share of p(t) that is U[0.95, 1] instead; the paper's video has 0.05
    align: str = "auto"  # none, ema, external; auto: what the objective says
    sra_gap: float = 0.0  # an EMA teacher is cleaner by U(0, this); published SRA has 0.2

    def __post_init__(self) -> None:
        for name, value, choices in (  # named as in configs/train.yaml
            ("objective", self.objective, OBJECTIVES),
            ("distribution", self.distribution, DISTRIBUTIONS),
            ("alignment", self.align, ALIGNMENTS),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value}: choose one of {', '.join(choices)}")
        if self.shift <= 0:
            raise ValueError(f"time_shift={self.shift}: must be positive")
        if self.distribution == "uniform" and self.shift != 1:
            raise ValueError(
                f"time_shift={self.shift} shifts logit-normals, not uniform: choose "
                "distribution=logit_normal or plateau_logit_normal"
            )
        for name in ("context_noise", "high_noise", "sra_gap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must lie in 0 .. 1")

    @property
    def times(self) -> str:
        """one, two, own or noise: see OBJECTIVES."""
        return OBJECTIVES[self.objective][0]

    @property
    def alignment(self) -> str:
        """Whose features the student's are aligned with: none, ema or external."""
        return OBJECTIVES[self.objective][1] if self.align == "auto" else self.align

    def sample(
        self, shape: tuple[int, ...], generator: Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Draws of p(t)."""
        return sample_time(shape, generator, self.distribution, self.shift, dtype, self.high_noise)


@dataclass(frozen=True)
class Noised:
    """One noising of a batch: what the model is given, and what it should answer."""

    tokens: Tokens
    tau: Float[Tensor, "B G"]  # a time for each noise group, or for each token where group is None
    group: Int[Tensor, "B L"] | None
    velocity: Tokens  # of the targets
    teacher_time: Float[Tensor, "B"]  # at which an EMA teacher sees every target

    @property
    def token_times(self) -> Float[Tensor, "B L"]:
        """Every token's own time."""
        return self.tau if self.group is None else self.tau.gather(1, self.group)


def sample_time(
    shape: tuple[int, ...],
    generator: Generator,
    distribution: str = "uniform",
    shift: float = 1.0,
    dtype: torch.dtype = torch.float32,
    high_noise: float = 0.0,
) -> Tensor:
    """Draws of p(t) in [0, 1]; the share high_noise of them from U[0.95, 1]."""
    if distribution == "logit_normal":
        # shifting a logit-normal(0, 1) by alpha moves its mean by log(alpha)
        t = torch.randn(shape, generator=generator, dtype=dtype).add(math.log(shift)).sigmoid()
    else:
        t = torch.rand(shape, generator=generator, dtype=dtype)
        if distribution == "plateau_logit_normal":
            t = plateau_quantile(t, shift)
    if high_noise:
        chosen = torch.rand(shape, generator=generator, dtype=dtype) < high_noise
        late = torch.rand(shape, generator=generator, dtype=dtype)
        t = torch.where(chosen, HIGH_NOISE + (1 - HIGH_NOISE) * late, t)
    return t


def plateau_quantile(u: Tensor, shift: float) -> Tensor:
    """Inverse distribution function of the plateau logit-normal, for u in [0, 1].

    Its density is the shifted logit-normal's up to that one's mode, and from there to 1 stays as
    high as it is at the mode (then all is normalised), so that pure noise is trained too. The
    Self-Flow paper names the distribution (RAE, alpha 10) and does not define it: this is our
    reading, and how notes on its authors' FLUX.2 report describe theirs.
    """
    location = math.log(shift)
    peak = location  # the mode's logit solves y = location + tanh(y / 2), a contraction by 1/2
    for _ in range(60):
        peak = location + math.tanh(peak / 2)
    mode = 1 / (1 + math.exp(-peak))
    z = peak - location
    below = 0.5 * (1 + math.erf(z / math.sqrt(2)))
    height = math.exp(-z * z / 2) / (math.sqrt(2 * math.pi) * mode * (1 - mode))
    mass = u * (below + (1 - mode) * height)
    rising = torch.sigmoid(location + torch.special.ndtri(mass.clamp(max=below)))
    return torch.where(mass < below, rising, (mode + (mass - below) / height).clamp(max=1))


def interpolate(x0: Tensor, x1: Tensor, tau: Tensor) -> Tensor:
    """x_tau = x0 + tau (x1 - x0) for x (B, L, C) and tau (B, L)."""
    return torch.lerp(x0, x1, tau[..., None])


def draw(tokens: Tokens, config: ModelConfig, schedule: Schedule, generator: Generator) -> Noised:
    """Noises clean tokens {modality: (B, L_m, C_m)}: times, groups, and one x1 for all."""
    first = tokens[config.modalities[0].name]
    batch, dtype = first.shape[0], first.dtype
    t, s = schedule.sample((2, batch), generator, dtype)
    condition = torch.rand(batch, generator=generator, dtype=dtype) * schedule.context_noise
    group = torch.cat([_groups(m, batch, generator) for m in config.modalities], 1)
    noise = {
        m.name: torch.randn(tokens[m.name].shape, generator=generator, dtype=dtype).to(first.device)
        for m in config.modalities
        if m.role == "target" or (m.name == "context" and schedule.context_noise > 0)
    }
    s = {"one": t, "two": s, "own": s, "noise": torch.ones_like(t)}[schedule.times]
    tau, cleanest = torch.stack([condition, t, s], 1), torch.minimum(t, s)
    if schedule.times == "own":
        own = schedule.sample((batch, group.shape[1] - config.prefix_length), generator, dtype)
        tau = torch.cat([condition[:, None].expand(-1, config.prefix_length), own], 1)
        group, cleanest = None, own.amin(1)
    if schedule.sra_gap:
        gap = torch.rand(batch, generator=generator, dtype=dtype) * schedule.sra_gap
        cleanest = (cleanest - gap).clamp(min=0)
    return noised(tokens, noise, tau, group, cleanest, config)


def noised(
    tokens: Tokens,
    noise: Tokens,
    tau: Tensor,
    group: Tensor | None,
    teacher_time: Tensor,
    config: ModelConfig,
) -> Noised:
    """Tokens moved towards their noise by each token's own time; without noise they stay clean."""
    device = next(iter(tokens.values())).device
    group = None if group is None else group.to(device)
    velocity = {m.name: noise[m.name] - tokens[m.name] for m in config.targets}
    result = Noised(tokens, tau.to(device), group, velocity, teacher_time.to(device))
    per_token = result.token_times.split([m.length for m in config.modalities], 1)
    moved = {
        m.name: interpolate(tokens[m.name], noise[m.name], own)
        if m.name in noise
        else tokens[m.name]
        for m, own in zip(config.modalities, per_token, strict=True)
    }
    return replace(result, tokens=moved)


def teacher_view(student: Noised, clean: Tokens, config: ModelConfig) -> Noised:
    """What an EMA teacher is given: the same noise with every target at the teacher's time, which
    is the least of the sample's times; conditions are the student's own. It has groups 0 and 1.
    """
    cleaner = student.teacher_time[:, None]
    tokens = {
        m.name: clean[m.name] + cleaner[..., None] * student.velocity[m.name]
        for m in config.targets
    }
    group = torch.ones_like(student.token_times, dtype=torch.long)
    group[:, : config.prefix_length] = CONDITION
    tau = torch.cat([student.tau[:, :T], cleaner], 1)
    return replace(student, tokens=student.tokens | tokens, tau=tau, group=group)


def dropped(
    tokens: Tokens, valid: Tokens, shares: dict[str, float], generator: Generator
) -> Tokens:
    """`valid` with a named condition absent from a share of the samples: {"text": 0.1}.

    The model reads absent tokens as their learned null. Once a batch, so that student and teacher
    miss the same (Self-Flow issue 10).
    """
    absent = {}
    for name, share in shares.items():
        if share > 0:
            x = tokens[name]
            keep = (torch.rand(len(x), generator=generator) >= share).to(x.device)[:, None]
            before = valid.get(name, keep)
            absent[name] = (before & keep).expand(x.shape[:2])
    return valid | absent


def dropped_label(
    label: Int[Tensor, "B"], null: int, share: float, generator: Generator
) -> Int[Tensor, "B"]:
    """A share of the class labels replaced by the null class, once a batch as in `dropped`."""
    drop = (torch.rand(len(label), generator=generator) < share).to(label.device)
    return torch.where(drop, null, label)


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
    with without_autocast(student.device):
        cosine = F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)
    return 1 - (cosine * valid).sum() / valid.sum().clamp(min=1)


def _groups(modality: Modality, batch: int, generator: Generator) -> Tensor:
    if modality.role == "condition":
        return torch.full((batch, modality.length), CONDITION)
    masked = torch.rand(batch, modality.length, generator=generator) < modality.mask_ratio
    return torch.where(masked, S, T)
