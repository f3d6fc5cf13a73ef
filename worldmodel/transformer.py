"""The video-action transformer: conditions and noised targets in, a velocity per target token out.

B batch, L tokens, D width, G noise groups, C channels; t = 1 noise, t = 0 data.
The sequence is the concatenation of all modalities in config order, conditions first. Every token
belongs to a noise group of its sample: `tau[b, group[b, l]]` is token l's time, and adaLN is
computed once a group; with `group=None`, tau holds one time a token, or one for all.
Conditions all belong to one group.
`attention="prefix"`: condition tokens see only one another, so that their pass can be kept
(`prefix`) while the targets are sampled (`decode`); "full": all see all.
`family="sit"`: adaLN-Zero blocks that modulate by their own weights. "flux": see flux_blocks.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfflow.worldmodel.flux_blocks import flux_blocks
from selfflow.worldmodel.layers import (
    Context,
    KeyValue,
    Signal,
    TimeEmbedding,
    grid_positions,
    image_positions,
    initialise,
    modulate,
    rotary,
    sit_blocks,
    zero,
)
from selfflow.worldmodel.model_config import Modality, ModelConfig

BLOCKS = {"sit": sit_blocks, "flux": flux_blocks}  # by family

LEAST_TIME = 0.05  # by which at least the error of predicted data is divided

Tokens = dict[str, Tensor]  # modality name -> (B, L_m, C_m)
Valid = dict[str, Tensor] | None  # modality name -> bool (B, L_m); a missing name means all valid


@dataclass(frozen=True)
class Prefix:
    """The condition pass, kept: per block its keys and values and its output (B, Lc, D)."""

    keys_values: tuple[KeyValue, ...]
    features: tuple[Tensor, ...]


class ModalityInput(nn.Module):
    """One linear input projection, a learned embedding, a learned stand-in for absent tokens."""

    positions: Tensor | None  # (L, D), added
    rope: Tensor | None  # (L, d), for the blocks; text lies at the origin

    def __init__(self, modality: Modality, config: ModelConfig) -> None:
        super().__init__()
        m, width = modality, config.hidden
        self.project = nn.Linear(m.channels, width)
        self.embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.null = nn.Parameter(torch.randn(width) * 0.02)
        positions = rope = None
        if config.positions == "rope":
            origin = m.stream == "text"
            grid, clock = ((m.length, 1, 1), (0.0, 0.0)) if origin else (m.grid, m.clock)
            rope = rotary(grid, width // config.heads, clock)
        else:
            code = grid_positions if config.positions == "sincos3d" else image_positions
            positions = code(m.grid, width, m.clock)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("rope", rope, persistent=False)

    def forward(self, x: Float[Tensor, "B L C"], valid: Bool[Tensor, "B L"] | None) -> Tensor:
        """(B, L, D)."""
        x = self.project(x)
        if valid is not None:
            x = torch.where(valid[..., None], x, self.null.to(x.dtype))
        return x + (self.embedding if self.positions is None else self.positions + self.embedding)


class VideoActionTransformer(nn.Module):
    """See the module's docstring; `forward` is the whole model.

    activation_checkpointing: keep only every block's inputs for the backward pass and run the block
    again there; may be set at any time.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        width = config.hidden
        self.time = TimeEmbedding(width)
        if config.classes:
            self.labels = nn.Embedding(config.classes, width)
        self.inputs = nn.ModuleDict({m.name: ModalityInput(m, config) for m in config.modalities})
        self.shared, self.blocks = BLOCKS[config.family](
            width, config.heads, int(width * config.mlp_ratio), config.depth, config.double_blocks
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
        group: Int[Tensor, "B L"] | None = None,
        valid: Valid = None,
        label: Int[Tensor, "B"] | None = None,
    ) -> Tokens:
        """The velocity x1 - x0 of every target modality, (B, L_m, C_m) each."""
        return self.forward_with_feature(tokens, tau, group, valid, label=label)[0]

    def forward_with_feature(
        self,
        tokens: Tokens,
        tau: Float[Tensor, "B G"],
        group: Int[Tensor, "B L"] | None = None,
        valid: Valid = None,
        block: int | None = None,
        label: Int[Tensor, "B"] | None = None,
    ) -> tuple[Tokens, Tensor | None]:
        """`forward`, and the residual stream (B, L, D) after `block` (1-based) if one is named."""
        if block is not None:
            self._checked(block)
        signal = self._signal(tau, group, label)
        streams, feature = [], None
        for n, streams in enumerate(self._trunk(tokens, signal, valid), start=1):
            if n == block:
                feature = torch.cat(streams, 1)
        first = self.config.prefix_length
        targets = streams[-1][:, -self.config.target_length :]
        time = tau if group is None else tau.gather(1, group)
        return self._velocity(
            targets, signal.cut(first), tokens, time[:, -targets.shape[1] :]
        ), feature

    def features(
        self,
        tokens: Tokens,
        tau: Float[Tensor, "B G"],
        group: Int[Tensor, "B L"] | None = None,
        valid: Valid = None,
        block: int = 1,
        label: Int[Tensor, "B"] | None = None,
        by_role: bool = False,
    ) -> Float[Tensor, "B L D"]:
        """The raw residual stream after `block` (1-based); later blocks are not run.

        by_role says that group is 0 for all conditions and 1 for all targets, which saves work.
        """
        signal = self._signal(tau, group, label)
        if by_role:
            signal = signal._replace(split=self.config.prefix_length)
        trunk = self._trunk(tokens, signal, valid)
        streams = [next(trunk) for _ in range(self._checked(block))][-1]
        return torch.cat(streams, 1)

    def prefix(
        self,
        tokens: Tokens,
        tau: Float[Tensor, "B"],
        valid: Valid = None,
        block: int | None = None,
        label: Int[Tensor, "B"] | None = None,
    ) -> Prefix:
        """The pass over condition tokens alone, all at time tau, through `block` blocks."""
        if not self.config.conditions:
            raise ValueError("prefix: this model has no conditions")
        signal = self.shared(self._signal(tau[:, None], None, label))
        x, context = self._enter(self.config.conditions, tokens, valid, signal)
        keys_values, features = [], []
        for layer in self.blocks[: self._checked(block or self.config.depth)]:
            x, own = self._run(layer, x, context, None)
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
        group: Int[Tensor, "B Lt"] | None,
        prefix: Prefix,
        valid: Valid = None,
        label: Int[Tensor, "B"] | None = None,
    ) -> Tokens:
        """`forward` of the target tokens on a kept condition pass; group is of the targets only."""
        if self.config.attention != "prefix":
            raise ValueError("decode needs attention=prefix: with full, conditions see the targets")
        signal = self._signal(tau, group, label)
        x, context = self._enter(self.config.targets, tokens, valid, self.shared(signal))
        for layer, memory in zip(self.blocks, prefix.keys_values, strict=True):
            x, _ = self._run(layer, x, context, memory)
        return self._velocity(x, signal, tokens, tau if group is None else tau.gather(1, group))

    def _trunk(self, tokens: Tokens, signal: Signal, valid: Valid) -> Iterator[list[Tensor]]:
        """The streams after each block.

        prefix: a condition stream, all of it in one noise group unless `group` is None, then a
        target stream that also attends to the former's keys and values. full: one stream.
        """
        config, signal = self.config, self.shared(signal)
        if config.attention == "prefix":
            here = config.prefix_length
            shown, made = signal.cut(0, here).first(), signal.cut(here)
            parts = [(config.conditions, shown), (config.targets, made)]
        else:
            parts = [(config.modalities, signal)]
        entered = [self._enter(part, tokens, valid, own) for part, own in parts if part]
        streams = [x for x, _ in entered]
        for layer in self.blocks:
            memory = None
            for i, (_, context) in enumerate(entered):
                streams[i], memory = self._run(layer, streams[i], context, memory)
            yield list(streams)

    def _run(
        self, layer: nn.Module, x: Tensor, context: Context, memory: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        if not self.activation_checkpointing:
            return layer(x, context, memory)
        # nothing in a block is random
        return checkpoint(layer, x, context, memory, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]

    def _signal(self, tau: Tensor, group: Tensor | None, label: Tensor | None) -> Signal:
        c = self.time(tau)
        if self.config.classes:
            if label is None:
                label = torch.full_like(tau[:, 0], self.config.classes - 1, dtype=torch.long)
            c = c + self.labels(label)[:, None]
        elif label is not None:
            raise ValueError("a label was given to a model of classes=0")
        if group is None:
            return Signal(F.silu(c))
        groups = torch.arange(tau.shape[1], device=group.device)
        return Signal(F.silu(c), (group[..., None] == groups).to(tau.dtype))

    def _enter(
        self, part: tuple[Modality, ...], tokens: Tokens, valid: Valid, signal: Signal
    ) -> tuple[Tensor, Context]:
        """Embeds these modalities: x (B, L, D), and what the blocks are told of it."""
        valid, inputs = valid or {}, [self.inputs[m.name] for m in part]
        x = torch.cat(
            [f(tokens[m.name], valid.get(m.name)) for f, m in zip(inputs, part, strict=True)], 1
        )
        ropes = [f.rope for f in inputs if isinstance(f.rope, Tensor)]
        text = sum(m.length for m in part if m.stream == "text")
        return x, Context(signal, torch.cat(ropes) if ropes else None, text)

    def _velocity(self, x: Tensor, signal: Signal, tokens: Tokens, time: Tensor) -> Tokens:
        """From the last block; `time` is (B, L) of the targets, or (B, 1)."""
        x = modulate(x, *signal.through(self.final, 2))
        lengths = [m.length for m in self.config.targets]
        times = time.expand(-1, sum(lengths)).split(lengths, 1)
        velocity = {}
        for m, part, t in zip(self.config.targets, x.split(lengths, 1), times, strict=True):
            answer = self.outputs[m.name](part)
            if m.answer == "data":  # x_t = x0 + t v
                answer = (tokens[m.name] - answer) / t[..., None].clamp(min=LEAST_TIME)
            velocity[m.name] = answer
        return velocity

    def _checked(self, block: int) -> int:
        if not 1 <= block <= self.config.depth:
            raise ValueError(f"block={block}: choose 1 .. {self.config.depth}")
        return block

    def _initialise(self) -> None:
        initialise(self)
        # adaLN-Zero: a fresh block is the identity, and a fresh model predicts zero
        for name, layer in self.named_modules():
            if name.endswith("modulation"):
                zero(layer)  # type: ignore[arg-type]
        if self.config.targets:
            for layer in (self.final, *self.outputs.values()):
                zero(layer)  # type: ignore[arg-type]
