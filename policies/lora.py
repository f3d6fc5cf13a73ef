"""Low-rank adapters (LoRA) in the backbone's blocks: y = W x + scale · B A x, with W frozen.

`peft` puts them in and computes them; a saved model has them merged, W + scale · B A, so that
loading needs no peft. There is no dropout: nothing here is random after the start.
"""

import importlib.util

from torch import Tensor, nn

from selfflow.datasets.spec import UserError

Weights = dict[str, Tensor]
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def check() -> None:
    """Raises UserError without peft."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("train=lora: peft is not installed; pip install 'selfflow[lora]'")


def add(backbone: nn.Module, rank: int, alpha: float, blocks: int) -> None:
    """Adapters at the attention's and the MLP's linears of the first so many blocks, in place.

    A fresh adapter changes nothing: B is zero.
    """
    check()
    from peft import LoraConfig, inject_adapter_in_model

    targets = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and _in_blocks(name, blocks)
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), backbone)  # type: ignore[arg-type]


def merged(weights: Weights, scale: float) -> Weights:
    """The weights of the model without adapters that computes the same; others are passed on."""
    plain = {}
    for name, value in weights.items():
        if BASE in name:
            layer, kind = name.split(BASE)
            if kind == "weight":
                value = value + scale * (weights[layer + UP] @ weights[layer + DOWN])
            plain[f"{layer}.{kind}"] = value
        elif not name.endswith((DOWN, UP)):
            plain[name] = value
    return plain


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((DOWN, UP))


def _in_blocks(name: str, blocks: int) -> bool:
    part, _, rest = name.partition(".")
    number, _, layer = rest.partition(".")
    return part == "blocks" and int(number) < blocks and "modulation" not in layer
