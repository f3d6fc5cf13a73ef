"""Parts of the transformer: time embedding, positions, adaLN-Zero block, projector.

B batch, L tokens, H heads, D width, G noise groups, C channels; time t: 0 data, 1 noise.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]  # each (B, H, L, D / H)
FREQUENCIES = 256  # sinusoids of the time embedding


class TimeEmbedding(nn.Module):
    """Raw t in [0, 1] -> D, by 256 sinusoids and a two-layer MLP, in the weights' precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Float[Tensor, "B G"]) -> Float[Tensor, "B G D"]:
        """One embedding for every noise group."""
        # bf16 would merge neighbouring times; there are only B x G rows, so fp32 costs nothing
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(sinusoids(t.float(), FREQUENCIES).to(next(self.mlp.parameters()).dtype))


def sinusoids(t: Tensor, count: int) -> Tensor:
    """(...,) -> (..., count): cosines, then sines, of frequencies 1 .. 1/10000."""
    half = count // 2
    steps = torch.arange(half, device=t.device, dtype=t.dtype) / half
    angle = t[..., None] * torch.exp(-math.log(10_000) * steps)
    return torch.cat([angle.cos(), angle.sin()], -1)


def grid_positions(grid: tuple[int, int, int], width: int) -> Float[Tensor, "L D"]:
    """Fixed sin-cos code of (frame, row, column), a third of the width each; the rest is zero."""
    part = 2 * (width // 6)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    code = torch.cat([sinusoids(axis.flatten(), part) for axis in axes], -1)
    return F.pad(code, (0, width - 3 * part))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine, then (1 + scale) · x + shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def spread(modulation: Tensor, select: Tensor | None) -> Tensor:
    """(B, G, N) per group -> (B, L, N) per token, by the one-hot select (B, L, G).

    Without select there is one group, and (B, 1, N) broadcasts over the tokens.
    """
    if select is None:
        return modulation
    # a gather written as a product: its backward is a product too, not a scatter
    return torch.bmm(select.to(modulation.dtype), modulation)


class Attention(nn.Module):
    """Multi-head attention with fused, biased qkv."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B L D"], memory: KeyValue | None = None
    ) -> tuple[Float[Tensor, "B L D"], KeyValue]:
        """Attends to itself and to memory's keys and values; also returns its own."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        own = (key, value)
        if memory is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(memory, own, strict=True))
        return self.out(attend(query, key, value)), own


def split_heads(x: Float[Tensor, "B L D"], heads: int) -> Float[Tensor, "B H L d"]:
    """D = H x d."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Float[Tensor, "B L D"]:
    """Softmax attention of (B, H, L, d) with the heads joined again."""
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        # the fused kernel's bf16 backward takes 65 ms where these products take 9 (64 x 83 tokens)
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

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads)
        self.mlp = mlp(width, int(width * mlp_ratio))

    def forward(
        self, x: Tensor, c: Tensor, select: Tensor | None, memory: KeyValue | None = None
    ) -> tuple[Float[Tensor, "B L D"], KeyValue]:
        """x (B, L, D), c = SiLU(time embedding) (B, G, D), select: see `spread`.

        Returns the residual stream and this block's keys and values of x.
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = spread(
            self.modulation(c), select
        ).chunk(6, -1)
        attended, own = self.attention(modulate(x, shift, scale), memory)
        x = torch.addcmul(x, gate, attended)
        x = torch.addcmul(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp)))
        return x, own


class Projector(nn.Module):
    """Student feature -> teacher's feature space; training only, fp32, student side only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, feature: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """fp32 whatever autocast says: the cosine loss needs it."""
        with torch.autocast(feature.device.type, enabled=False):
            return self.mlp(feature.float())


def initialise(module: nn.Module) -> None:
    """Xavier-uniform linears with zero bias; embeddings and the time MLP normal 0.02."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    for child in module.modules():
        if isinstance(child, TimeEmbedding):
            for layer in (child.mlp[0], child.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]


def zero(layer: nn.Linear) -> None:
    """Zero weight and bias, so that a fresh block is the identity and a fresh model predicts 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
