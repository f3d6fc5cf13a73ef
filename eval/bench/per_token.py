"""The published per-token SiT-XL/2, written plainly from its description: baseline and reference.

Every token has its own time, so the time embedding and adaLN run once a token. Nothing here is
used by the product: eval/bench/model.py times it, and tests compare it with our model. Names and
shapes are those of the published state dict; the conventions too: it is given paper time (1 is
noise), embeds 1 - t, and negates its output.

B batch, L tokens, D width, H heads, C channels of a token. Source: ../shared/docs/self_flow.md 3.2.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

FREQUENCIES = 256


@dataclass(frozen=True)
class Published:
    """Sizes; the defaults are those of the released ImageNet checkpoint."""

    size: int = 32  # latent rows and columns
    patch: int = 2
    channels: int = 4  # of the latent
    hidden: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: int = 4
    classes: int = 1001  # the last one is null
    learn_sigma: bool = True

    @property
    def side(self) -> int:
        """Tokens a row."""
        return self.size // self.patch

    @property
    def values(self) -> int:
        """Of an input token, ordered (channel, row, column)."""
        return self.channels * self.patch**2


class PerTokenDiT(nn.Module):
    """See the module's docstring; freshly made its weights are torch's defaults, so load some."""

    pos_embed: Tensor

    def __init__(self, sizes: Published) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.hidden
        self.register_buffer("pos_embed", sincos_2d(sizes.side, width)[None])
        self.x_embedder = nn.ModuleDict({"proj": nn.Linear(sizes.values, width)})
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(sizes.classes, width)})
        self.blocks = nn.ModuleList(
            DiTBlock(width, sizes.heads, sizes.mlp_ratio) for _ in range(sizes.depth)
        )
        self.final_layer = FinalLayer(width, sizes.values * (2 if sizes.learn_sigma else 1))
        self.projector = Head(width)

    def forward(
        self, x: Float[Tensor, "B L C"], t: Tensor, y: Int[Tensor, "B"]
    ) -> Float[Tensor, "B L C"]:
        """The velocity noise - data; t is paper time, (B,) or (B, L)."""
        return self.with_stream(x, t, y)[0]

    def with_stream(
        self, x: Float[Tensor, "B L C"], t: Tensor, y: Int[Tensor, "B"], block: int | None = None
    ) -> tuple[Float[Tensor, "B L C"], Tensor | None]:
        """`forward`, and the residual stream (B, L, D) after `block` (1-based)."""
        if t.ndim == 1:
            t = t[:, None].expand(-1, x.shape[1])
        c = self.t_embedder(1 - t) + self.y_embedder["embedding_table"](y)[:, None]
        x = self.x_embedder["proj"](x) + self.pos_embed
        stream = None
        for n, layer in enumerate(self.blocks, start=1):
            x = layer(x, c)
            if n == block:
                stream = x
        return -self._in_input_order(self.final_layer(x, c)), stream

    def _in_input_order(self, x: Tensor) -> Tensor:
        """(row, column, channel) -> (channel, row, column), without the channels of sigma."""
        patch, channels = self.sizes.patch, self.sizes.channels
        x = x.unflatten(-1, (patch, patch, -1))[..., :channels]
        return x.permute(0, 1, 4, 2, 3).flatten(2)


class TimeEmbedder(nn.Module):
    """256 sinusoids of the raw time, then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, u: Float[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """u = 1 - t."""
        half = FREQUENCIES // 2
        exponent = torch.arange(half, device=u.device, dtype=torch.float32) / half
        angle = u[..., None].float() * torch.exp(-math.log(10_000) * exponent)
        waves = torch.cat([angle.cos(), angle.sin()], -1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))  # type: ignore[arg-type]


class DiTBlock(nn.Module):
    """Attention and MLP, both modulated and gated."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.mlp = Mlp(width, mlp_ratio * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x: Float[Tensor, "B L D"], c: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"]:
        """c is the condition of every token."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate * self.attn(normed(x) * (1 + scale) + shift)
        return x + gate_mlp * self.mlp(normed(x) * (1 + scale_mlp) + shift_mlp)


class SelfAttention(nn.Module):
    """Fused qkv with bias, torch's own softmax attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """All tokens see all."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Token by token."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """Modulation, then the output linear."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Float[Tensor, "B L D"], c: Float[Tensor, "B L D"]) -> Tensor:
        """(B, L, values)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(normed(x) * (1 + scale) + shift)


class Head(nn.Module):
    """The projector of the student's feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, 2 * width)
        self.linear2 = nn.Linear(2 * width, width)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Linear, SiLU, Linear."""
        return self.linear2(F.silu(self.linear1(x)))


def normed(x: Tensor) -> Tensor:
    """LayerNorm without affine."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def sincos_2d(side: int, width: int) -> Float[Tensor, "L D"]:
    """Of a square grid, row by row: half the width for the column, half for the row; in float64."""
    quarter = width // 4
    frequencies = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    code = torch.cat([angles.sin(), angles.cos()], -1)  # (side, D / 2)
    columns, rows = code.repeat(side, 1), code.repeat_interleave(side, 0)
    return torch.cat([columns, rows], -1).float()


def randomised(sizes: Published, seed: int = 0) -> PerTokenDiT:
    """A model with no weight at zero, as a trained one: every part then counts in a comparison."""
    torch.manual_seed(seed)
    model = PerTokenDiT(sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[-1]
            std = 0.02 if name.endswith("bias") or "table" in name else fan_in**-0.5
            parameter.normal_(std=std * (0.3 if "adaLN" in name else 1.0))
    return model.eval()
