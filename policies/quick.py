"""Linear layers of a policy that acts on a CPU: the same weights and results, in half the time.

torch hands fp32 products to MKL, which leaves an AMD processor's AVX-512 alone; oneDNN, which torch
brings along, does not (83 x 192 by 192 x 768, one thread of an EPYC: 102 µs instead of 221), and it
makes the GELU in the same pass (121 instead of 292). Few rows are only worth it where the weights
lie as oneDNN likes them, which takes a copy. Gradients, other dtypes and devices, and tracing go
the ordinary way.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY = 32  # rows from which on weights are turned as they are needed
FEW = 4  # rows from which on a turned copy is worth its call
LARGE = 2**16  # numbers in a matrix that is
PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
TURN = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


class QuickLinear(nn.Linear):
    """A linear layer, followed by tanh-GELU where `gelu` is set."""

    gelu = False

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight = None if torch.is_grad_enabled() else self._weight(input)
        if PRODUCT is None or weight is None or torch.compiler.is_compiling():
            x = F.linear(input, self.weight, self.bias)
            return F.gelu(x, approximate="tanh") if self.gelu else x
        after = ("gelu", [], "tanh") if self.gelu else ("none", [], "")
        return PRODUCT(input, weight, self.bias, *after)

    def turn(self) -> None:
        """Keeps a copy of the weights for few rows; they must not change any more."""
        if TURN is not None and self.weight.numel() >= LARGE:
            self._turned = TURN(self.weight.detach().clone(), FEW)

    def _weight(self, input: Tensor) -> Tensor | None:
        """What oneDNN multiplies by, where it is quicker."""
        if input.dtype != torch.float32 or input.device.type != "cpu":
            return None
        rows = input.numel() // self.in_features
        if rows >= MANY:
            return self.weight
        return getattr(self, "_turned", None) if rows >= FEW else None


def quicken(model: nn.Module, copies: bool = False) -> None:
    """Replaces the linear layers, in place; with `copies` also for few rows, in twice the memory.

    Call it when the weights are in; it does nothing where torch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, _quick(child, copies))
        if isinstance(module, nn.Sequential):
            _join_gelu(module)


def _quick(layer: nn.Linear, copies: bool) -> QuickLinear:
    """With the layer's own parameters."""
    has_bias = layer.bias is not None
    made = QuickLinear(layer.in_features, layer.out_features, has_bias, device="meta")
    made.weight, made.bias = layer.weight, layer.bias
    if copies:
        made.turn()
    return made


def _join_gelu(layers: nn.Sequential) -> None:
    for i, (first, second) in enumerate(pairwise(list(layers)), start=1):
        tanh = isinstance(second, nn.GELU) and second.approximate == "tanh"
        if isinstance(first, QuickLinear) and tanh:
            first.gelu, layers[i] = True, nn.Identity()
