"""python policies/export.py checkpoint=outputs/policy out=outputs/bundle

Makes a robot bundle of a policy: a folder with all that acting needs (model.safetensors,
config.json, stats.json, vectors of the instructions), spec.json (names, shapes, units and frames of
observations and actions) and MODEL_CARD.md with the evaluations that `evaluation=[...]` names.
selfflow.policies.load.load(folder) gives the same actions in any process. Every key is explained in
configs/export.yaml.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from selfflow.configs.entry import launch
from selfflow.datasets.normalize import from_json
from selfflow.datasets.spec import UserError
from selfflow.policies.acting import check_contract, robot_of, text_dropout_of
from selfflow.policies.bundle import Evaluation, model_card, spec
from selfflow.worldmodel.batches import user_errors
from selfflow.worldmodel.checkpoint import (
    Checkpoint,
    load,
    parts_of,
    read_json,
    write_json,
    write_text,
)

# the last three where there are such
COPIED = ("model.safetensors", "stats.json", "text.safetensors", "value.safetensors", "value.json")


@dataclass(frozen=True)
class ExportConfig:
    """Every key of configs/export.yaml, which explains them."""

    checkpoint: str
    out: str
    name: str | None = None
    evaluation: list[str] = field(default_factory=list)


def check(config: ExportConfig) -> None:
    """Raises UserError for everything that can be wrong."""
    out = Path(config.out)
    if out.exists():
        raise UserError(f"out={out} exists; choose another out")
    with user_errors():
        given = load(config.checkpoint, "policy")
        with parts_of(given.path):
            for name in from_json(given.statistics):
                check_contract(given, robot_of(given, name))
        evaluations(config, given)


def main(config: ExportConfig) -> None:
    """Writes the bundle under another name, and renames it when it is complete."""
    out = Path(config.out)
    draft = out.with_name(f".draft-{out.name}")
    with user_errors():
        given = load(config.checkpoint, "policy")
        results = evaluations(config, given)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name in COPIED:
        if (given.path / name).is_file():
            shutil.copyfile(given.path / name, draft / name)
    write_json(draft / "config.json", given.config | {"text_dropout": text_dropout_of(given)})
    write_json(draft / "spec.json", spec(given))
    write_text(draft / "MODEL_CARD.md", model_card(given, config.name or out.name, results))
    os.rename(draft, out)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"bundle: {out}, {size:.1f} MB, of {given.path}\ncard: {out / 'MODEL_CARD.md'}")


def evaluations(config: ExportConfig, given: Checkpoint) -> list[Evaluation]:
    """The rollouts' summaries. Raises UserError or CheckpointError if there is none in a folder, or
    one of another checkpoint's weights."""
    with open(given.path / "model.safetensors", "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()[:16]
    found = []
    for folder in config.evaluation:
        summary = read_json(Path(folder) / "summary.json")
        if not all(isinstance(summary.get(key), int) for key in ("successes", "episodes")):
            raise UserError(f"evaluation={folder}: its summary.json counts no successes")
        if digest not in str(summary.get("checkpoint")):
            raise UserError(
                f"evaluation={folder}: was of {summary.get('checkpoint') or 'no checkpoint'}, not "
                f"of {given.path} (sha256 {digest}); roll this one out, or leave it out"
            )
        found.append(Evaluation(folder, summary))
    return found


if __name__ == "__main__":
    launch(ExportConfig, main, "export", check)
