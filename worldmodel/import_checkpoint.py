"""python worldmodel/import_checkpoint.py selfflow_imagenet256.pt out=checkpoints/imagenet

Turns the published ImageNet weights of Self-Flow (SiT-XL/2, 675 M) into a checkpoint of kind
"image": draw from it with eval/sample_images.py, or start a video-action model from it with
worldmodel/train.py init=imagenet. Nothing is unpickled but tensors.

The published network's conventions end here. It embeds u = 1 - t, and cos(f - ft), sin(f - ft) are
linear in cos(ft), sin(ft): a rotation that is folded into the first linear of the time MLP. Its
output is negated, ordered (row, column, channel), and half of it is thrown away (learn_sigma): rows
of the output linear. All of this is done in float64, so that our forward has no special case.
"""

import math
import os
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfflow.configs.entry import launch
from selfflow.datasets.spec import UserError
from selfflow.worldmodel.batches import user_errors
from selfflow.worldmodel.checkpoint import (
    FORMAT,
    Checkpoint,
    RunError,
    Weights,
    parts_of,
    write_json,
)
from selfflow.worldmodel.layers import FREQUENCIES, Projector, image_positions
from selfflow.worldmodel.transformer import Modality, ModelConfig, VideoActionTransformer

IMAGE = "image"  # the one modality's name
CHANNELS, PATCH = 4, 2  # of SD-VAE latents and of the published model
SCALE = 0.18215  # of SD-VAE latents
PUBLISHED_HEADS = {1152: 16}
WRAPPERS = ("model", "state_dict")
LINEARS = {  # published name -> ours
    "t_embedder.mlp.0": "backbone.time.mlp.0",
    "t_embedder.mlp.2": "backbone.time.mlp.2",
    "x_embedder.proj": f"backbone.inputs.{IMAGE}.project",
    "final_layer.adaLN_modulation.1": "backbone.final",
    "final_layer.linear": f"backbone.outputs.{IMAGE}",
    "projector.linear1": "projector.mlp.0",
    "projector.linear2": "projector.mlp.2",
}
IN_BLOCK = {
    "adaLN_modulation.1": "modulation",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
TABLE = "y_embedder.embedding_table.weight"


@dataclass(frozen=True)
class ImportConfig:
    """Every key of configs/import_checkpoint.yaml, which explains them."""

    source: str
    out: str
    part: str | None
    heads: int | None
    student_block: int | None
    teacher_block: int | None


@dataclass(frozen=True)
class Transfer:
    """What an initialisation took (our names), left behind (theirs), and what stayed fresh."""

    taken: tuple[str, ...]
    left: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"taken: {_grouped(self.taken)}\n"
            f"left: {_grouped(self.left)}; fresh: {_grouped(self.fresh)}"
        )


def main(config: ImportConfig) -> None:
    """Reads, converts, writes."""
    source, out = Path(config.source), Path(config.out)
    with user_errors():
        state = read(source, config.part)
        model, weights = convert(state, config.heads)
        blocks = {
            "student_block": config.student_block or model.block_at(0.3),
            "teacher_block": config.teacher_block or model.block_at(0.7),
        }
        for key, block in blocks.items():
            if not 1 <= block <= model.depth:
                raise RunError(f"{key}={block}: choose 1 .. {model.depth}")
        write(out, model, weights, blocks | {"provenance": {"source": source.name}})
    millions = sum(v.numel() for k, v in weights.items() if k.startswith("backbone.")) / 1e6
    print(
        f"{source.name}: {millions:.1f} M weights, {model.hidden} x {model.depth} x {model.heads}, "
        f"{model.classes} classes -> {out}/model.safetensors, config.json, stats.json"
    )


def check(config: ImportConfig) -> None:
    """Raises UserError for whatever can be wrong before work begins."""
    if not Path(config.source).is_file():
        raise UserError(f"source={config.source}: no such file")
    if Path(config.out).exists():
        raise UserError(f"out={config.out}: exists; give a new folder, or delete it first")


def read(path: Path, part: str | None = None) -> Weights:
    """The published state dict of a .pt or .safetensors file, without wrappers and `module.`."""
    try:
        if path.suffix == ".safetensors":
            values: Any = load_file(path)
        else:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, UnpicklingError, SafetensorError) as e:
        reason = " ".join(str(e).split())[:200]
        raise RunError(f"{path}: cannot be read safely as tensors ({reason})") from e
    return unwrapped(values, part, path)


def unwrapped(values: Any, part: str | None, path: Path) -> Weights:
    """The part of that name, else `values` itself or its `model` or `state_dict`."""
    names = [part] if part else [n for n in WRAPPERS if isinstance(values, dict) and n in values]
    for name in names:
        if not isinstance(values, dict) or name not in values:
            have = ", ".join(map(str, values))[:200] if isinstance(values, dict) else "no parts"
            raise RunError(f"part={name}: {path} has {have}")
        values = values[name]
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        nested = isinstance(values, dict)
        have = ", ".join(str(k) for k, v in values.items() if isinstance(v, dict)) if nested else ""
        raise RunError(f"{path}: no state dict; name one of its parts with part=... ({have})")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in values.items()}


def convert(state: Weights, heads: int | None = None) -> tuple[ModelConfig, Weights]:
    """Our config and `backbone.*`, `projector.*` in fp32. Raises RunError naming keys or shapes."""
    config = geometry(state, heads)
    names = LINEARS | {
        f"blocks.{i}.{name}": f"backbone.blocks.{i}.{ours}"
        for i in range(config.depth)
        for name, ours in IN_BLOCK.items()
    }
    _check_keys(state, {f"{n}.{p}" for n in names for p in ("weight", "bias")})
    weights = {
        f"{ours}.{part}": state[f"{name}.{part}"].float()
        for name, ours in names.items()
        for part in ("weight", "bias")
    }
    first, output = "t_embedder.mlp.0.weight", "final_layer.linear"
    weights["backbone.time.mlp.0.weight"] = reversed_time(state[first].double()).float()
    rows = output_rows(len(state[f"{output}.weight"]))
    for part in ("weight", "bias"):
        weights[f"{LINEARS[output]}.{part}"] = -state[f"{output}.{part}"][rows].float()
    for part in ("embedding", "null"):  # which the published model does not have
        weights[f"backbone.inputs.{IMAGE}.{part}"] = torch.zeros(config.hidden)
    weights["backbone.labels.weight"] = state[TABLE].float()
    _check_fit(weights, state["pos_embed"], config)
    return config, weights


def geometry(state: Weights, heads: int | None = None) -> ModelConfig:
    """Sizes read off the tensors. Raises RunError where they cannot be."""
    needed = (TABLE, "pos_embed", "x_embedder.proj.weight", "blocks.0.mlp.fc1.weight")
    if missing := [key for key in needed if key not in state]:
        raise RunError(f"not the published layout: {', '.join(missing)} missing")
    rows, width = state[TABLE].shape
    if heads is None and width not in PUBLISHED_HEADS:
        raise RunError(f"heads=... is required: width {width} does not tell (1152 has 16)")
    heads = heads or PUBLISHED_HEADS[width]
    if heads < 1 or width % heads:
        raise RunError(f"heads={heads}: width {width} does not divide by it")
    tokens, values = state["pos_embed"].shape[1], state["x_embedder.proj.weight"].shape[1]
    side = math.isqrt(tokens)
    if side * side != tokens or values != CHANNELS * PATCH**2:
        raise RunError(f"{tokens} tokens of {values} values: not a square of {CHANNELS} x 2 x 2")
    return ModelConfig(
        hidden=width,
        depth=len({k.split(".")[1] for k in state if k.startswith("blocks.")}),
        heads=heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        attention="full",
        modalities=(Modality(IMAGE, values, tokens, "target", (1, side, side), mask_ratio=0.25),),
        positions="sincos2d",
        classes=rows,
    )


def reversed_time(weight: Tensor) -> Tensor:
    """The first linear of the time MLP for t where the given one is for 1 - t; its own inverse."""
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=weight.dtype) / half
    frequency = torch.exp(-math.log(10_000) * steps)
    cos, sin = frequency.cos(), frequency.sin()
    w_cos, w_sin = weight.chunk(2, 1)
    return torch.cat([w_cos * cos + w_sin * sin, w_cos * sin - w_sin * cos], 1)


def output_rows(count: int) -> Tensor:
    """Which published output each of our (channel, row, column) values is; sigma's are left out."""
    order = torch.arange(count).reshape(PATCH, PATCH, -1)[..., :CHANNELS]
    return order.permute(2, 0, 1).flatten()


def transfer(source: Checkpoint, model: VideoActionTransformer) -> Transfer:
    """Starts a video-action transformer from another checkpoint's weights, in place.

    Of an image model time MLP, blocks and final modulation are taken, and what belongs to a
    modality stays fresh; its "no label", which its blocks expect to be added to the time, becomes
    part of the time MLP's last bias. Of a world model everything is taken whose name and shape are
    the same. Raises RunError as `check_fit` does.
    """
    theirs, ours = check_fit(source, model.config), model.config
    weights, own = source.part("backbone"), model.state_dict()
    if source.config.get("kind", "image") == "image":
        taken = tuple(k for k in own if k.startswith(("time.", "blocks.", "final.")))
    else:
        taken = tuple(k for k, v in own.items() if k in weights and weights[k].shape == v.shape)
    with torch.no_grad():
        for name in taken:
            own[name].copy_(weights[name])
        if theirs.classes and not ours.classes:
            own["time.mlp.2.bias"].add_(weights["labels.weight"][-1])
    return Transfer(
        taken,
        tuple(k for k in weights if k not in taken),
        tuple(k for k in own if k not in taken),
    )


def check_fit(source: Checkpoint, ours: ModelConfig) -> ModelConfig:
    """The source's model. Raises RunError where width, heads, MLP or family differ from ours, or
    ours is deeper, CheckpointError where the source does not say."""
    with parts_of(source.path):
        theirs = ModelConfig.from_dict(source.config["model"])
    for key in ("family", "hidden", "heads", "mlp_ratio"):
        if getattr(theirs, key) != getattr(ours, key):
            raise RunError(
                f"{source.path} has {key}={getattr(theirs, key)}, this model "
                f"{key}={getattr(ours, key)}: choose the same model= or another checkpoint"
            )
    if ours.depth > theirs.depth:
        part = (
            ": it is a policy, which keeps the first only"
            if source.config.get("kind") == "policy"
            else ""
        )
        raise RunError(f"{source.path} has {theirs.depth} blocks, this model {ours.depth}{part}")
    return theirs


def write(out: Path, model: ModelConfig, weights: Weights, notes: dict[str, Any]) -> None:
    """The checkpoint folder, which appears when it is complete."""
    side = math.isqrt(model.targets[0].length) * PATCH
    config = {
        "format": FORMAT,
        "kind": "image",
        "model": model.to_dict(),
        "image": {
            "size": side,  # rows and columns of the latent
            "patch": PATCH,
            "channels": CHANNELS,
            "classes": model.classes,
            "codec": "sd_vae",
            "scale": SCALE,
        },
        **notes,
    }
    draft = out.with_name(f".{out.name}.draft-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, draft / "model.safetensors")
    write_json(draft / "config.json", config)
    write_json(draft / "stats.json", {})
    draft.rename(out)


def _check_keys(state: Weights, linears: set[str]) -> None:
    expected = linears | {"pos_embed", TABLE}
    missing, unexpected = expected - set(state), set(state) - expected
    if missing or unexpected:
        raise RunError(
            "not the published layout: "
            + "; ".join(
                f"{len(keys)} {what} ({', '.join(sorted(keys)[:4])}{', …' * (len(keys) > 4)})"
                for what, keys in (("missing", missing), ("unexpected", unexpected))
                if keys
            )
        )


def _check_fit(weights: Weights, positions: Tensor, config: ModelConfig) -> None:
    """Against an empty model of that config: shapes, and the fixed positions' values."""
    side = math.isqrt(config.target_length)
    ours = image_positions((1, side, side), config.hidden)
    if positions.shape[1:] != ours.shape or (positions[0].float() - ours).abs().max() > 1e-4:
        raise RunError("pos_embed is not the published fixed 2-D sin-cos code")
    with torch.device("meta"):
        parts = {"backbone": VideoActionTransformer(config), "projector": Projector(config.hidden)}
    expected = {
        f"{part}.{name}": value.shape
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }
    wrong = [k for k, shape in expected.items() if weights[k].shape != shape]
    if wrong:
        first = wrong[0]
        raise RunError(
            f"{len(wrong)} tensors of another shape: {first} would be "
            f"{tuple(weights[first].shape)}, not {tuple(expected[first])}"
        )


def _grouped(names: tuple[str, ...]) -> str:
    """blocks (280 tensors), time (4): by first part of the name, inputs.video by the first two."""
    deep = ("inputs", "outputs")
    parts = [n.split(".") for n in names]
    found = Counter(".".join(p[: 1 + (p[0] in deep)]) for p in parts)
    return ", ".join(f"{name} ({count} tensors)" for name, count in found.items()) or "nothing"


if __name__ == "__main__":
    # the bare form: a first argument without "=" is the source
    if len(sys.argv) > 1 and "=" not in sys.argv[1] and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"source={sys.argv[1]}"
    launch(ImportConfig, main, "import_checkpoint", check=check)
