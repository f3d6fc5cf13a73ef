"""The video-action transformer: conditions and noised targets in, a velocity per target token out.

B batch, L tokens, D width, G noise groups, C channels; t = 1 noise, t = 0 data.
The sequence is the concatenation of all modalities in config order, conditions first. Every token
belongs to a noise group of its sample: `tau[b, group[b, l]]` is token l's time, and adaLN is
computed once a group. `attention="prefix"`: condition tokens see only one another, so that their
pass can be kept (`prefix`) while the targets are sampled (`decode`); "full": all see all.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfflow.worldmodel.layers import (
    Block,
    KeyValue,
    TimeEmbedding,
    grid_positions,
    initialise,
    modulate,
    spread,
    zero,
)

Tokens = dict[str, Tensor]  # modality name -> (B, L_m, C_m)
Valid = dict[str, Tensor] | None  # modality name -> bool (B, L_m); a missing name means all valid


@dataclass(frozen=True)
class Modality:
    """A kind of token. `grid` (frames, rows, columns) gives positions; its product is `length`."""

    name: str
    channels: int
    length: int
    role: str  # "condition" or "target"
    grid: tuple[int, int, int]
    mask_ratio: float = 0.0  # R_M: share of target tokens at the second timestep
    weight: float = 1.0  # of this modality in the loss

    def __post_init__(self) -> None:
        frames, rows, columns = self.grid
        if self.role not in ("condition", "target"):
            raise ValueError(f"{self.name}: role={self.role}; choose condition or target")
        if self.channels < 1 or self.length < 1 or frames * rows * columns != self.length:
            raise ValueError(f"{self.name}: {self.length} tokens do not fill the grid {self.grid}")
        if not 0 <= self.mask_ratio <= 0.5:
            raise ValueError(f"{self.name}: mask_ratio={self.mask_ratio} is not within 0 .. 0.5")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the weights' shapes and meaning."""

    hidden: int
    depth: int
    heads: int
    mlp_ratio: float
    attention: str  # "prefix" or "full"
    modalities: tuple[Modality, ...]  # conditions come first

    def __post_init__(self) -> None:
        if self.depth < 1 or self.heads < 1 or self.hidden % self.heads or self.hidden < 6:
            raise ValueError(
                f"hidden={self.hidden} must be a multiple of heads={self.heads} and >= 6, "
                f"depth={self.depth} >= 1"
            )
        if self.attention not in ("prefix", "full"):
            raise ValueError(f"attention={self.attention}: choose prefix or full")
        names = [m.name for m in self.modalities]
        if len(set(names)) != len(names):
            raise ValueError(f"modality names repeat: {', '.join(names)}")
        roles = [m.role for m in self.modalities]
        if roles != sorted(roles) or "condition" not in roles:
            raise ValueError("modalities: conditions come first, and there is at least one")

    @property
    def conditions(self) -> tuple[Modality, ...]:
        """Modalities that are given."""
        return tuple(m for m in self.modalities if m.role == "condition")

    @property
    def targets(self) -> tuple[Modality, ...]:
        """Modalities that are predicted."""
        return tuple(m for m in self.modalities if m.role == "target")

    @property
    def prefix_length(self) -> int:
        """Number of condition tokens."""
        return sum(m.length for m in self.conditions)

    def block_at(self, fraction: float) -> int:
        """The 1-based block nearest to that fraction of the depth: 0.3 student, 0.7 teacher."""
        nearest = int(round(fraction * self.depth, 9) + 0.5)  # half up; 0.7 * 45 is 31.499...
        return min(self.depth, max(1, nearest))

    def encoder(self, block: int) -> "ModelConfig":
        """The part that reads conditions up to that block: what a policy keeps."""
        return replace(self, depth=block, modalities=self.conditions)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Inverse of to_dict."""
        modalities = [Modality(**m | {"grid": tuple(m["grid"])}) for m in values["modalities"]]
        rest = {k: v for k, v in values.items() if k != "modalities"}
        return cls(**rest, modalities=tuple(modalities))


@dataclass(frozen=True)
class Prefix:
    """The condition pass, kept: per block its keys and values and its output (B, Lc, D)."""

    keys_values: tuple[KeyValue, ...]
    features: tuple[Tensor, ...]


class ModalityInput(nn.Module):
    """One linear input projection, a learned embedding, a learned stand-in for absent tokens."""

    positions: Tensor

    def __init__(self, modality: Modality, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(modality.channels, width)
        self.embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.null = nn.Parameter(torch.randn(width) * 0.02)
        self.register_buffer("positions", grid_positions(modality.grid, width), persistent=False)

    def forward(self, x: Float[Tensor, "B L C"], valid: Bool[Tensor, "B L"] | None) -> Tensor:
        """(B, L, D)."""
        x = self.project(x)
        if valid is not None:
            x = torch.where(valid[..., None], x, self.null.to(x.dtype))
        return x + (self.positions + self.embedding)


class VideoActionTransformer(nn.Module):
    """See the module's docstring; `forward` is the whole model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden
        self.time = TimeEmbedding(width)
        self.inputs = nn.ModuleDict({m.name: ModalityInput(m, width) for m in config.modalities})
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )
        if config.targets:
            self.final = nn.Linear(width, 2 * width)
            self.outputs = nn.ModuleDict(
                {m.name: nn.Linear(width, m.channels) for m in config.targets}
            )
        self._initialise()

    def forward(
        self,
        tokens: Tokens,
        tau: Float[Tensor, "B G"],
        group: Int[Tensor, "B L"],
        valid: Valid = None,
    ) -> Tokens:
        """The velocity x1 - x0 of every target modality, (B, L_m, C_m) each."""
        return self.forward_with_feature(tokens, tau, group, valid)[0]

    def forward_with_feature(
        self,
        tokens: Tokens,
        tau: Float[Tensor, "B G"],
        group: Int[Tensor, "B L"],
        valid: Valid = None,
        block: int | None = None,
    ) -> tuple[Tokens, Tensor | None]:
        """`forward`, and the residual stream (B, L, D) after `block` (1-based) if one is named."""
        c, select = self._condition(tau, group)
        feature = streams = None
        for n, (streams, _) in enumerate(self._trunk(tokens, c, select, valid), start=1):
            if n == block:
                feature = torch.cat(streams, 1)
        assert streams is not None
        target = torch.cat(streams, 1) if len(streams) == 1 else streams[-1]
        count = sum(m.length for m in self.config.targets)
        return self._velocity(target[:, -count:], c, select[:, -count:]), feature

    def features(
        self,
        tokens: Tokens,
        tau: Float[Tensor, "B G"],
        group: Int[Tensor, "B L"],
        valid: Valid = None,
        block: int = 1,
    ) -> Float[Tensor, "B L D"]:
        """The raw residual stream after `block` (1-based); later blocks are not run."""
        c, select = self._condition(tau, group)
        trunk = self._trunk(tokens, c, select, valid)
        streams = [next(trunk)[0] for _ in range(self._checked(block))][-1]
        return torch.cat(streams, 1)

    def prefix(
        self, tokens: Tokens, tau: Float[Tensor, "B"], valid: Valid = None, block: int | None = None
    ) -> Prefix:
        """The pass over condition tokens alone, all at time tau, through `block` blocks."""
        c = F.silu(self.time(tau[:, None]))
        x = self._embed(self.config.conditions, tokens, valid)
        keys_values, features = [], []
        for layer in self.blocks[: self._checked(block or self.config.depth)]:
            x, own = layer(x, c, None)
            keys_values.append(own)
            features.append(x)
        return Prefix(tuple(keys_values), tuple(features))

    def condition_features(
        self, tokens: Tokens, tau: Float[Tensor, "B"], valid: Valid, block: int
    ) -> Float[Tensor, "B Lc D"]:
        """Condition tokens after `block`, by themselves; as in `features` if attention=prefix."""
        return self.prefix(tokens, tau, valid, block).features[-1]

    def decode(
        self,
        tokens: Tokens,
        tau: Float[Tensor, "B G"],
        group: Int[Tensor, "B Lt"],
        prefix: Prefix,
        valid: Valid = None,
    ) -> Tokens:
        """`forward` of the target tokens on a kept condition pass; group is of the targets only."""
        if self.config.attention != "prefix":
            raise ValueError("decode needs attention=prefix: with full, conditions see the targets")
        c, select = self._condition(tau, group)
        x = self._embed(self.config.targets, tokens, valid)
        for layer, memory in zip(self.blocks, prefix.keys_values, strict=True):
            x, _ = layer(x, c, select, memory)
        return self._velocity(x, c, select)

    def _trunk(
        self, tokens: Tokens, c: Tensor, select: Tensor, valid: Valid
    ) -> Iterator[tuple[list[Tensor], KeyValue]]:
        """After each block: the streams, and the last one's keys and values.

        prefix: a condition stream, then a target stream that also attends to the former's keys and
        values. full: one stream of everything.
        """
        prefix = self.config.attention == "prefix"
        parts = (
            (self.config.conditions, self.config.targets) if prefix else (self.config.modalities,)
        )
        streams = [self._embed(part, tokens, valid) for part in parts if part]
        selects = select.split([x.shape[1] for x in streams], 1)
        for layer in self.blocks:
            memory = None
            for i, x in enumerate(streams):
                streams[i], memory = layer(x, c, selects[i], memory)
            assert memory is not None
            yield list(streams), memory

    def _condition(self, tau: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        select = F.one_hot(group.long(), tau.shape[1]).to(tau.dtype)
        return F.silu(self.time(tau)), select

    def _embed(self, modalities: tuple[Modality, ...], tokens: Tokens, valid: Valid) -> Tensor:
        valid = valid or {}
        parts = [self.inputs[m.name](tokens[m.name], valid.get(m.name)) for m in modalities]
        return torch.cat(parts, 1)

    def _velocity(self, x: Tensor, c: Tensor, select: Tensor) -> Tokens:
        x = modulate(x, *spread(self.final(c), select).chunk(2, -1))
        targets = self.config.targets
        parts = x.split([m.length for m in targets], 1)
        return {m.name: self.outputs[m.name](part) for m, part in zip(targets, parts, strict=True)}

    def _checked(self, block: int) -> int:
        if not 1 <= block <= self.config.depth:
            raise ValueError(f"block={block}: choose 1 .. {self.config.depth}")
        return block

    def _initialise(self) -> None:
        initialise(self)
        for block in self.blocks:
            zero(block.modulation)  # type: ignore[arg-type]
        if self.config.targets:
            zero(self.final)
            for output in self.outputs.values():
                zero(output)  # type: ignore[arg-type]
