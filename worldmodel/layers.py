"""Parts of the transformer: time embedding, attention, adaLN-Zero block, projector.

B batch, L tokens, H heads, D width, d = D / H, G noise groups, C channels, N any number; time t: 0
data, 1 noise.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]  # each (B, H, L, d)
FREQUENCIES = 256  # sinusoids of the time embedding
ROPE_BASE = 2000.0  # FLUX.2's; the paper states only 24 channels a dimension
SHORT = 512 * 512  # queries x keys up to which plain products serve bf16 on a CPU


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, products keep the precision of their factors; a meta device knows no autocast."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class TimeEmbedding(nn.Module):
    """Raw t in [0, 1] -> D, by 256 sinusoids and a two-layer MLP, in the weights' precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Float[Tensor, "B G"]) -> Float[Tensor, "B G D"]:
        """One embedding for every noise group."""
        # bf16 would merge neighbouring times; there are only B x G rows, so fp32 costs nothing
        with without_autocast(t.device):
            return self.mlp(sinusoids(t.float(), FREQUENCIES).to(next(self.mlp.parameters()).dtype))


def sinusoids(t: Tensor, count: int) -> Tensor:
    """(...,) -> (..., count): cosines, then sines, of frequencies 1 .. 1/10000."""
    half = count // 2
    steps = torch.arange(half, device=t.device, dtype=t.dtype) / half
    angle = t[..., None] * torch.exp(-math.log(10_000) * steps)
    return torch.cat([angle.cos(), angle.sin()], -1)


def grid_positions(
    grid: tuple[int, int, int], width: int, clock: tuple[float, float] = (0.0, 1.0)
) -> Float[Tensor, "L D"]:
    """Fixed sin-cos code of (frame, row, column), a third of the width each; the rest is zero.

    Frame i lies at start + i · step of the clock.
    """
    part = 2 * (width // 6)
    code = torch.cat([sinusoids(axis, part) for axis in coordinates(grid, clock)], -1)
    return F.pad(code, (0, width - 3 * part))


def image_positions(
    grid: tuple[int, int, int], width: int, clock: tuple[float, float] = (0.0, 1.0)
) -> Float[Tensor, "L D"]:
    """The published 2-D code, the same for every frame: half the width says the column, half the
    row, each by sines, then cosines, of frequencies 1 / 10000^(4k / D), k = 0 .. D/4 - 1."""
    if width % 4:
        raise ValueError(f"positions=sincos2d: hidden={width} must be a multiple of 4")
    _, row, column = coordinates(grid, clock)
    frequency = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [axis[:, None].double() * frequency for axis in (column, row)]
    return torch.cat([f for angle in angles for f in (angle.sin(), angle.cos())], -1).float()


def rotary(
    grid: tuple[int, int, int], width: int, clock: tuple[float, float] = (0.0, 1.0)
) -> Float[Tensor, "L d"]:
    """Cosines, then sines, of the rotary angles of heads of that width: a third of the channel
    pairs turns with the clock time, one with the row, one with the column."""
    if width % 6:
        raise ValueError(f"positions=rope: a head's width {width} must be a multiple of 6")
    frequency = ROPE_BASE ** (-torch.arange(width // 6, dtype=torch.float32) / (width // 6))
    angles = torch.cat([axis[:, None] * frequency for axis in coordinates(grid, clock)], -1)
    return torch.cat([angles.cos(), angles.sin()], -1)


def coordinates(
    grid: tuple[int, int, int], clock: tuple[float, float]
) -> tuple[Float[Tensor, "L"], Float[Tensor, "L"], Float[Tensor, "L"]]:
    """Clock time, row and column of every token of a grid, frame by frame and row by row."""
    start, step = clock
    frames, rows, columns = (torch.arange(n, dtype=torch.float32) for n in grid)
    time, row, column = torch.meshgrid(start + frames * step, rows, columns, indexing="ij")
    return time.flatten(), row.flatten(), column.flatten()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine, then (1 + scale) · x + shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def spread(modulation: Tensor, select: Tensor | None) -> Tensor:
    """(B, G, N) per group -> (B, L, N) per token, by the one-hot select (B, L, G).

    Without select it is (B, L, N) already, or (B, 1, N), which broadcasts over the tokens.
    """
    if select is None:
        return modulation
    # a gather written as a product: its backward is a product too, not a scatter
    return torch.bmm(select.to(modulation.dtype), modulation)


class Signal(NamedTuple):
    """What tokens know of their noise level and label: `rows` (B, G, N), one a noise group, and the
    one-hot `select` (B, L, G). Without select there is a row a token, or one row for all.
    split: the tokens before it all have row 0 and the others row 1: cut there, each needs one row.
    """

    rows: Tensor
    select: Tensor | None = None
    split: int = 0

    def through(self, layer: Callable[[Tensor], Tensor], parts: int = 1) -> tuple[Tensor, ...]:
        """The layer's values per token, computed once a row, in `parts` of (B, L or 1, N).

        Parted before spread: the backward pass then joins gradients by row, not by token.
        """
        return tuple(spread(part, self.select) for part in layer(self.rows).chunk(parts, -1))

    def first(self) -> "Signal":
        """Of tokens that all share the first one's group: one row for all of them."""
        if self.select is None:
            return self
        return Signal(torch.bmm(self.select[:, :1].to(self.rows.dtype), self.rows))

    def cut(self, first: int, stop: int | None = None) -> "Signal":
        """The signal of tokens first .. stop - 1."""
        if self.split and self.split in (first, stop):
            return Signal(self.rows[:, 1:] if first else self.rows[:, :1])
        if self.select is not None:
            return Signal(self.rows, self.select[:, first:stop])
        return self if self.rows.shape[1] == 1 else Signal(self.rows[:, first:stop])


class Context(NamedTuple):
    """What a block is told about the tokens (B, L, D) of one pass."""

    signal: Signal
    rope: Tensor | None = None  # (L, d): cosines, then sines, of the tokens' rotary angles
    text: int = 0  # the first so many tokens are text: they have their own weights in double blocks


class Attention(nn.Module):
    """Multi-head attention with fused, biased qkv."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        memory: KeyValue | None = None,
        rope: Float[Tensor, "L d"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], KeyValue]:
        """Attends to itself and to memory's keys and values; also returns its own."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        attended, own = remember(query, key, value, memory, rope)
        return self.out(attended), own


def remember(
    query: Tensor, key: Tensor, value: Tensor, memory: KeyValue | None, rope: Tensor | None
) -> tuple[Float[Tensor, "B L D"], KeyValue]:
    """Rotates, then attends to these keys and to memory's; returns the rotated keys too."""
    own = (rotate(key, rope), value)
    seen = own
    if memory is not None:
        seen = (torch.cat([memory[0], own[0]], 2), torch.cat([memory[1], own[1]], 2))
    return attend(rotate(query, rope), *seen), own


def rotate(x: Float[Tensor, "B H L d"], rope: Float[Tensor, "L d"] | None) -> Tensor:
    """Turns the channel pairs (k, k + d/2) by the k-th angle, in fp32."""
    if rope is None:
        return x
    cos, sin = rope.chunk(2, -1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def split_heads(x: Float[Tensor, "B L D"], heads: int) -> Float[Tensor, "B H L d"]:
    """D = H x d."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Float[Tensor, "B L D"]:
    """Softmax attention of (B, H, L, d) with the heads joined again."""
    short = query.shape[-2] * key.shape[-2] <= SHORT
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and short:
        # the fused kernel's bf16 backward takes 65 ms where these products take 9 (64 x 83 tokens);
        # but they keep all scores, which for thousands of tokens do not fit
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        attended = scores.softmax(-1) @ value
    else:
        attended = F.scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).flatten(2)


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Linear, tanh-GELU, Linear."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
    )


class Block(nn.Module):
    """adaLN-Zero: attention, then MLP, each normed, shifted, scaled and gated by the time."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads)
        self.mlp = mlp(width, hidden)

    def forward(
        self, x: Float[Tensor, "B L D"], context: Context, memory: KeyValue | None = None
    ) -> tuple[Float[Tensor, "B L D"], KeyValue]:
        """x and memory, keys and values that it may see besides its own; the signal has D values.

        Returns the residual stream and this block's keys and values of x.
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = context.signal.through(
            self.modulation, 6
        )
        attended, own = self.attention(modulate(x, shift, scale), memory, context.rope)
        x = torch.addcmul(x, gate, attended)
        x = torch.addcmul(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp)))
        return x, own


def sit_blocks(
    width: int, heads: int, hidden: int, depth: int, double_blocks: int
) -> tuple[nn.Module, nn.ModuleList]:
    """What the blocks share of the signal (nothing: each has its own modulation), and the blocks;
    `hidden` is the MLP's."""
    return nn.Identity(), nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))


class Projector(nn.Module):
    """Student feature -> teacher's feature space; training only, fp32, student side only.

    Two linears are the released one (5.3 M at width 1152), three are REPA's, nearer to the paper's
    "around 10M parameters"; `aim` is the teacher's width where it is another.
    """

    def __init__(self, width: int, aim: int | None = None, layers: int = 2) -> None:
        super().__init__()
        sizes = [width, *[2 * width] * (layers - 1), aim or width]
        linears = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.mlp = nn.Sequential(linears[0])
        for linear in linears[1:]:
            self.mlp.extend([nn.SiLU(), linear])

    def forward(self, feature: Float[Tensor, "B L D"]) -> Float[Tensor, "B L W"]:
        """fp32 whatever autocast says: the cosine loss needs it."""
        with without_autocast(feature.device):
            return self.mlp(feature.float())


def initialise(module: nn.Module) -> None:
    """Xavier-uniform linears with zero bias; embedding tables and the time MLP normal 0.02."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    for child in module.modules():
        if isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=0.02)
        if isinstance(child, TimeEmbedding):
            for layer in (child.mlp[0], child.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]


def zero(layer: nn.Linear) -> None:
    """Zero weight and bias, so that a fresh block is the identity and a fresh model predicts 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
