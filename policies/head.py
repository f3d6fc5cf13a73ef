"""The action head: a small flow-matching transformer that reads the backbone's condition features.

B batch, N noise draws a sample, K actions, C = 8 channels, L memory tokens, D width, H heads;
time tau: 1 noise, 0 data; velocity = noise - actions.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfflow.worldmodel.layers import (
    Attention,
    KeyValue,
    Projector,
    TimeEmbedding,
    attend,
    grid_positions,
    initialise,
    mlp,
    split_heads,
    zero,
)
from selfflow.worldmodel.objective import respond
from selfflow.worldmodel.transformer import ModelConfig, Tokens, VideoActionTransformer

Memory = tuple[KeyValue, ...]  # per block, of the condition features
# per block nine of (B, 1, D), then the output's two: each shift, 1 + scale and, in blocks, gate
Modulations = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of the head."""

    hidden: int
    depth: int
    heads: int
    mlp_ratio: float
    chunk: int  # K
    channels: int  # C
    memory: int  # width of the condition features

    def __post_init__(self) -> None:
        if min(self.depth, self.heads, self.chunk) < 1 or self.hidden % self.heads:
            raise ValueError(f"head: hidden must be a multiple of heads, sizes at least 1: {self}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def modulate(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """LayerNorm without affine, then factor · x + shift; at a decision all rows share both."""
    if factor.shape[0] == 1 and factor.dtype == x.dtype:  # in one pass
        return F.layer_norm(x, x.shape[-1:], factor.flatten(), shift.flatten(), 1e-6)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), factor)


class HeadBlock(nn.Module):
    """adaLN-Zero: attention over the K actions, attention to memory, MLP."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden, config.heads
        self.modulation = nn.Linear(width, 9 * width)
        self.attention = Attention(width, config.heads)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(config.memory, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = mlp(width, int(width * config.mlp_ratio))

    def read(self, memory: Float[Tensor, "B L M"]) -> KeyValue:
        """Keys and values of the memory, the same for every tau."""
        key, value = (split_heads(part, self.heads) for part in self.key_value(memory).chunk(2, -1))
        return key, value

    def parts(self, c: Float[Tensor, "BN 1 D"]) -> tuple[Tensor, ...]:
        """Shift, 1 + scale and gate of attention, look and MLP."""
        s1, a1, g1, s2, a2, g2, s3, a3, g3 = self.modulation(c).chunk(9, -1)
        return s1, 1 + a1, g1, s2, 1 + a2, g2, s3, 1 + a3, g3

    def forward(
        self, x: Tensor, modulation: tuple[Tensor, ...], memory: KeyValue
    ) -> Float[Tensor, "BN K D"]:
        """x (B·N, K, D); modulation as of `parts`."""
        s1, a1, g1, s2, a2, g2, s3, a3, g3 = modulation
        x = torch.addcmul(x, g1, self.attention(modulate(x, s1, a1))[0])
        x = torch.addcmul(x, g2, self._look(modulate(x, s2, a2), memory))
        return torch.addcmul(x, g3, self.mlp(modulate(x, s3, a3)))

    def _look(self, x: Tensor, memory: KeyValue) -> Tensor:
        # the N draws of a sample ask side by side, so that its memory is not copied N times
        query = self.query(x).view(memory[0].shape[0], -1, x.shape[-1])
        return self.out(attend(split_heads(query, self.heads), *memory)).view(x.shape)


class ActionHead(nn.Module):
    """Noised action chunk, its time and the memory -> velocity."""

    positions: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden
        self.time = TimeEmbedding(width)
        self.input = nn.Linear(config.channels, width)
        self.embedding = nn.Parameter(torch.randn(config.chunk, width) * 0.02)
        self.register_buffer(
            "positions", grid_positions((config.chunk, 1, 1), width), persistent=False
        )
        self.blocks = nn.ModuleList(HeadBlock(config) for _ in range(config.depth))
        self.final = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, config.channels)
        initialise(self)
        for block in self.blocks:
            zero(block.modulation)  # type: ignore[arg-type]
        zero(self.final)
        zero(self.output)

    def read(self, features: Float[Tensor, "B L M"]) -> Memory:
        """The condition features as every block's keys and values; once a decision."""
        normed = F.layer_norm(features, features.shape[-1:], eps=1e-6)
        return tuple(block.read(normed) for block in self.blocks)  # type: ignore[operator]

    def modulations(self, tau: Float[Tensor, "BN"]) -> Modulations:
        """What the head needs of the time; a policy keeps it, since its times never change."""
        c = F.silu(self.time(tau[:, None]))
        shift, scale = self.final(c).chunk(2, -1)
        return (*(block.parts(c) for block in self.blocks), (shift, 1 + scale))  # type: ignore[operator]

    def forward(
        self, x: Float[Tensor, "BN K C"], modulations: Modulations, memory: Memory
    ) -> Float[Tensor, "BN K C"]:
        """Velocity at these modulations' time; N consecutive rows of x share one of memory."""
        x = self.input(x) + (self.positions + self.embedding)
        for i, block in enumerate(self.blocks):
            x = block(x, modulations[i], memory[i])
        return self.output(modulate(x, *modulations[-1]))

    def velocity(
        self, x: Float[Tensor, "BN K C"], tau: Float[Tensor, "BN"], memory: Float[Tensor, "B L M"]
    ) -> Float[Tensor, "BN K C"]:
        """`forward` at time tau on unread condition features."""
        return self(x, self.modulations(tau), self.read(memory))


class PolicyModel(nn.Module):
    """The backbone, or its part that reads conditions, and the head that acts on block `read`
    (1-based; the last by default). With projector layers it can also be pretrained further.
    """

    def __init__(
        self, backbone: ModelConfig, head: HeadConfig, read: int | None = None, projector: int = 0
    ) -> None:
        super().__init__()
        self.read = read or backbone.depth
        self.backbone = VideoActionTransformer(backbone)
        self.head = ActionHead(head)
        if projector:
            self.projector = Projector(backbone.hidden, layers=projector)

    def memory(self, tokens: Tokens, valid: Tokens) -> Float[Tensor, "B L D"]:
        """Features of clean conditions after block `read`."""
        text = next(iter(tokens.values()))
        clean = torch.zeros(len(text), device=text.device)
        return self.backbone.condition_features(tokens, clean, valid, self.read)

    def respond(self, *seen: Any, **how: Any) -> tuple[Tokens, Tensor | None]:
        """As a world model in pretraining does; see worldmodel.objective.respond."""
        return respond(self.backbone, self.projector, *seen, **how)

    def forward(self, job: Callable[["PolicyModel"], Any]) -> Any:
        """job(self). Whatever is trained is computed in one such call, so that DDP and FSDP see
        the whole model called."""
        return job(self)


def head_loss(
    head: ActionHead,
    actions: Float[Tensor, "B K C"],
    weight: Float[Tensor, "B K C"],
    memory: Float[Tensor, "B L M"],
    noise: Float[Tensor, "N B K C"],
    tau: Float[Tensor, "N B"],
) -> Tensor:
    """Weighted mean squared error of the velocity, over N noise draws that share the memory.

    An entry of weight 0 (an action after the episode's end, an unknown channel) has no gradient.
    """
    time = tau.T[..., None, None]
    x1, x0 = noise.transpose(0, 1), actions[:, None]
    x = torch.lerp(x0.expand_as(x1), x1, time).flatten(0, 1)
    predicted = head.velocity(x, tau.T.flatten(), memory).float().view(x1.shape)
    per_entry = (predicted - (x1 - x0)).square().mean(1)
    return (per_entry * weight).sum() / weight.sum().clamp(min=1)
