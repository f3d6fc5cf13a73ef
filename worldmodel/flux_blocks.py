"""FLUX.2-style blocks: double ones (text and the rest by weights of their own), then single ones.

All double blocks share two modulations (text, main) and all single blocks one, computed once a
forward. Linears have biases; SwiGLU's hidden size is mlp_ratio · D, and its input linear is twice
that: so 7 double and 14 single blocks of D = 1152, ratio 4 come to the paper's 625 M (App. D, E).
Queries and keys are RMS-normed, as in FLUX.2; the paper does not say.

B batch, L tokens, H heads, D width, d = D / H, N any number.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfflow.worldmodel.layers import (
    Context,
    KeyValue,
    Signal,
    modulate,
    remember,
    split_heads,
)

TEXT, MAIN, SINGLE, END = 0, 6, 12, 15  # where each one's vectors of D start in the modulation


def flux_blocks(
    width: int, heads: int, hidden: int, depth: int, double_blocks: int
) -> tuple[nn.Module, nn.ModuleList]:
    """The shared modulation and the blocks; `hidden` is SwiGLU's."""
    double = [DoubleBlock(width, heads, hidden) for _ in range(double_blocks)]
    single = [SingleBlock(width, heads, hidden) for _ in range(depth - double_blocks)]
    return SharedModulation(width), nn.ModuleList([*double, *single])


class SharedModulation(nn.Module):
    """6 D values for text and 6 D for the rest in double blocks, 3 D for single blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, END * width)

    def forward(self, signal: Signal) -> Signal:
        """SiLU(time + label) of D values -> 15 D values a token; spread once for all blocks."""
        return Signal(signal.through(self.modulation)[0])


class HeadNorm(nn.Module):
    """Splits q, k, v into heads and RMS-norms the queries and keys of each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.ones(width // heads))
        self.key = nn.Parameter(torch.ones(width // heads))

    def forward(self, qkv: Float[Tensor, "B L N"]) -> tuple[Tensor, Tensor, Tensor]:
        """N = 3 D -> each (B, H, L, d)."""
        query, key, value = (split_heads(part, self.heads) for part in qkv.chunk(3, -1))
        return _rms_norm(query, self.query), _rms_norm(key, self.key), value


class Stream(nn.Module):
    """One set of weights of a double block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = HeadNorm(width, heads)
        self.out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, 2 * hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def ask(self, x: Tensor, modulation: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, L, D)."""
        shift, scale, *_ = modulation
        return self.norm(self.qkv(modulate(x, shift, scale)))

    def add(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """x with what was attended to, then with the MLP."""
        _, _, gate, shift, scale, gate_mlp = modulation
        x = torch.addcmul(x, gate, self.out(attended))
        return torch.addcmul(
            x, gate_mlp, self.mlp_out(_swiglu(self.mlp_in(modulate(x, shift, scale))))
        )


class DoubleBlock(nn.Module):
    """Joint attention of text and main tokens, each by its own weights."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.text = Stream(width, heads, hidden)
        self.main = Stream(width, heads, hidden)

    def forward(
        self, x: Float[Tensor, "B L D"], context: Context, memory: KeyValue | None = None
    ) -> tuple[Float[Tensor, "B L D"], KeyValue]:
        """As layers.Block; the first context.text tokens are text."""
        n = context.text
        text, main = x[:, :n], x[:, n:]
        for_text = _vectors(context.signal.cut(0, n), TEXT, MAIN)
        for_main = _vectors(context.signal.cut(n), MAIN, SINGLE)
        both = zip(self.text.ask(text, for_text), self.main.ask(main, for_main), strict=True)
        query, key, value = (torch.cat(pair, 2) for pair in both)
        attended, own = remember(query, key, value, memory, context.rope)
        text = self.text.add(text, attended[:, :n], for_text)
        main = self.main.add(main, attended[:, n:], for_main)
        return torch.cat([text, main], 1), own


class SingleBlock(nn.Module):
    """Attention and MLP side by side, by one linear in and one linear out."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.sizes = [3 * width, 2 * hidden]
        self.into = nn.Linear(width, sum(self.sizes))
        self.norm = HeadNorm(width, heads)
        self.out = nn.Linear(width + hidden, width)

    def forward(
        self, x: Float[Tensor, "B L D"], context: Context, memory: KeyValue | None = None
    ) -> tuple[Float[Tensor, "B L D"], KeyValue]:
        """As layers.Block."""
        shift, scale, gate = _vectors(context.signal, SINGLE, END)
        qkv, hidden = self.into(modulate(x, shift, scale)).split(self.sizes, -1)
        query, key, value = self.norm(qkv)
        attended, own = remember(query, key, value, memory, context.rope)
        out = self.out(torch.cat([attended, _swiglu(hidden)], -1))
        return torch.addcmul(x, gate, out), own


def _vectors(signal: Signal, first: int, stop: int) -> tuple[Tensor, ...]:
    """Vectors first .. stop - 1 of the shared modulation, each (B, L or 1, D)."""
    return signal.rows.chunk(END, -1)[first:stop]


def _swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def _rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    # in x's own type: with fp32 weights beside bf16 activations torch would leave its fused kernel
    return F.rms_norm(x, x.shape[-1:], scale.to(x.dtype), 1e-6)
