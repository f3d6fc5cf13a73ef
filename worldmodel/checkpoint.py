"""Run folders and checkpoints: safetensors and JSON only, nothing is ever unpickled.

    out/config.json, log.jsonl
    out/checkpoints/step-000500/
        model.safetensors   moving-average weights, what a user loads
        config.json         kind, model, layout, embodiments, text encoder, action space, provenance
        stats.json          normalisation statistics by embodiment
        train/              state.json, student.safetensors, optimizer.safetensors, and
                            average.safetensors where model.safetensors is not float32, or not the
                            whole of what is trained
        train/shards/       instead of those three, where FSDP has sharded them (sharded.py)

A checkpoint is written under another name and renamed when complete, so that a folder called
step-... is always whole. A run goes on from either form with any number of processes.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from selfflow.worldmodel import parallel
from selfflow.worldmodel.errors import CheckpointError
from selfflow.worldmodel.errors import RunError as RunError  # its callers know it from here
from selfflow.worldmodel.parallel import ALONE, Weights, World

DTYPES = {"float32": torch.float32, "float16": torch.float16}
FORMAT = 1  # of config.json
SHARDS = Path("train") / "shards"
_STEP = re.compile(r"step-(\d{6,})")
_WORLDMODEL = ("model", "layout", "embodiments", "text_encoder", "action")
KEYS = {"worldmodel": _WORLDMODEL, "policy": (*_WORLDMODEL, "head", "decision")}  # by kind
COUNTERS = ("step", "samples", "skipped", "skipped_in_row")


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to use a model."""

    path: Path
    config: dict[str, Any]
    statistics: dict[str, Any]
    weights: Weights

    def part(self, prefix: str) -> Weights:
        """The weights below `prefix.`, without it."""
        start = prefix + "."
        return {k[len(start) :]: v for k, v in self.weights.items() if k.startswith(start)}


@dataclass(frozen=True)
class Training:
    """What is needed to go on training."""

    average: Weights
    student: Weights
    optimizer: Weights
    state: dict[str, Any]


def folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of that step."""
    return run / "checkpoints" / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """Inverse of `folder`."""
    return int(path.name.removeprefix("step-"))


def last(run: Path) -> Path | None:
    """The run's latest checkpoint, if it has any."""
    return next(reversed(_all(run)), None)


def resolve(path: str | Path) -> Path:
    """The checkpoint of a checkpoint or run folder. Raises CheckpointError if there is none."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"checkpoint {path}: no such folder; give a run or a checkpoint folder"
        )
    found = path if (path / "model.safetensors").is_file() else last(path)
    if found is None:
        raise CheckpointError(
            f"checkpoint {path}: no checkpoint (model.safetensors), nor a run that has saved one"
        )
    return found


def save(
    run: Path,
    model: Weights,
    config: dict[str, Any],
    statistics: dict[str, Any],
    training: Training,
    dtype: str = "float32",
    keep: int = 2,
    world: World = ALONE,
) -> Path:
    """Writes the checkpoint of `training.state["step"]` and deletes all but the last `keep`.

    All processes of the run call it; rank 0 alone writes, but for sharded training states.
    """
    final = folder(run, training.state["step"])
    draft = final.with_name(f".draft-{final.name}")
    if world.main:
        shutil.rmtree(draft, ignore_errors=True)
        (draft / "train").mkdir(parents=True)
    if parallel.has_shards(training.student):
        from selfflow.worldmodel import sharded

        world.meet()
        sharded.save(draft / SHARDS, training.average, training.student, training.optimizer, world)
    elif world.main:
        _write_tensors(draft / "train" / "student.safetensors", training.student)
        _write_tensors(draft / "train" / "optimizer.safetensors", training.optimizer)
        if dtype != "float32" or model.keys() != training.average.keys():
            _write_tensors(draft / "train" / "average.safetensors", training.average)
    if world.main:
        weights = {k: v.to(DTYPES[dtype]) for k, v in model.items()}
        _write_tensors(draft / "model.safetensors", weights)
        write_json(draft / "config.json", config)
        write_json(draft / "stats.json", statistics)
        if (run / "text.safetensors").is_file():  # vectors of the data's instructions
            shutil.copyfile(run / "text.safetensors", draft / "text.safetensors")
        write_json(draft / "train" / "state.json", training.state)
        if final.exists():
            shutil.rmtree(final)
        draft.rename(final)
        prune(run, keep)
    world.meet()
    return final


def is_sharded(path: Path) -> bool:
    """Whether FSDP's processes saved the checkpoint's training state, each its own part."""
    return (path / SHARDS).is_dir()


def prune(run: Path, keep: int) -> None:
    """Deletes drafts of killed processes and all but the last `keep` checkpoints."""
    for draft in (run / "checkpoints").glob(".draft-*"):
        shutil.rmtree(draft, ignore_errors=True)
    for old in _all(run)[:-keep]:
        shutil.rmtree(old)


def _all(run: Path) -> list[Path]:
    """The run's checkpoints by step; a user's own step-000500.bak is none."""
    found = [p for p in (run / "checkpoints").glob("step-*") if _STEP.fullmatch(p.name)]
    return sorted(found, key=step_of)


def load(path: str | Path, kind: str | None = None) -> Checkpoint:
    """A checkpoint for use. Raises CheckpointError if a part is missing, damaged or of another
    format, or the kind is another."""
    path = resolve(path)
    config = read_json(path / "config.json")
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / 'config.json'}: format is {config.get('format')}, not {FORMAT}; "
            "give a checkpoint of this version of selfflow"
        )
    if kind is not None and config.get("kind") != kind:
        cure = {
            "policy": "; make a policy from it with policies/finetune.py init=" + str(path),
            "worldmodel": "; give a run of worldmodel/train.py",
        }.get(kind, "")
        names = {"worldmodel": "a world model", "policy": "a policy", "image": "an image model"}
        found, wanted = (names.get(str(k), f"of kind {k}") for k in (config.get("kind"), kind))
        raise CheckpointError(f"checkpoint {path} is {found}, not {wanted}{cure}")
    missing = [key for key in KEYS.get(str(config.get("kind")), ("kind",)) if key not in config]
    if missing:
        raise CheckpointError(f"{path / 'config.json'}: {', '.join(missing)} missing")
    if not (path / "stats.json").is_file():
        raise CheckpointError(f"checkpoint {path}: stats.json is missing, so actions have no units")
    statistics = read_json(path / "stats.json")
    return Checkpoint(path, config, statistics, _read_tensors(path / "model.safetensors"))


def load_training(path: Path) -> Training:
    """The part below train/. Raises CheckpointError if it was not kept, or is damaged."""
    train = path / "train"
    state = load_training_state(path)
    average = train / "average.safetensors"
    return Training(
        _read_tensors(average if average.is_file() else path / "model.safetensors"),
        _read_tensors(train / "student.safetensors"),
        _read_tensors(train / "optimizer.safetensors"),
        state,
    )


def load_training_state(path: Path) -> dict[str, Any]:
    """train/state.json: COUNTERS, seed, and what the run noted."""
    state = read_json(path / "train" / "state.json")
    missing = [key for key in COUNTERS if not isinstance(state.get(key), int)]
    if missing:
        raise CheckpointError(f"{path / 'train' / 'state.json'}: {', '.join(missing)} missing")
    return state


def fill(module: nn.Module, weights: Weights, where: str) -> None:
    """Strict loading. Raises CheckpointError that names the first keys that do not fit."""
    own = module.state_dict()
    weights = {k: parallel.alike(v, own[k]) if k in own else v for k, v in weights.items()}
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as e:
        raise CheckpointError(f"{where} does not fit this model: {_one_line(e)}") from e


@contextmanager
def parts_of(path: Path) -> Iterator[None]:
    """Around making parts from a checkpoint's JSON: CheckpointError where it says nonsense."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        what = f"{type(e).__name__}: {_one_line(e)}"
        raise CheckpointError(f"checkpoint {path}: damaged or foreign ({what})") from e


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> Weights:
    """The optimiser's state as tensors, by parameter name."""
    return {
        f"{name}:{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def fill_optimizer(optimizer: Optimizer, module: nn.Module, tensors: Weights) -> None:
    """Inverse of optimizer_tensors. A name of another model is a KeyError."""
    parameters = dict(module.named_parameters())
    for name, value in tensors.items():
        parameter_name, key = name.rsplit(":", 1)
        parameter = parameters[parameter_name]
        optimizer.state[parameter][key] = parallel.alike(value.to(parameter.device), parameter)


def write_json(path: Path, value: Any) -> None:
    """Atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Atomically."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def _write_tensors(path: Path, tensors: Weights) -> None:
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)


def _read_tensors(path: Path) -> Weights:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path}: cannot be read ({_one_line(e)})") from e


def read_json(path: Path) -> dict[str, Any]:
    """The file's object. Raises CheckpointError if it is missing, damaged, or no object."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be read ({_one_line(e)})") from e
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not an object")
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
