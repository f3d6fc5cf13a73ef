"""What an ablation keeps: a line of JSON a finished job, small enough for the repository.

| kind | of it |
|---|---|
| all | job, kind, arguments, minutes (of all sittings) |
| pretrain, finetune | steps, median seconds of one, the log as means over 20 stretches |
| curve | by checkpoint: held-out loss and probe, each with its interval |
| video | imagined video and open-loop actions of the last checkpoint, each with its interval |
| rollout | by episode: success, and the task's own measures of progress |

The file is also the memory of what is done: a job without a line is run.
"""

import json
import math
from pathlib import Path
from statistics import fmean, median
from typing import Any

from selfflow.datasets.spec import UserError
from selfflow.eval.ablation_config import AblationConfig
from selfflow.eval.ablation_plan import CURVE, ROLLOUT, VIDEO, Job
from selfflow.eval.results import read_episodes, read_lines, write_text

Record = dict[str, Any]
Cells = dict[str, list[Any]]  # column -> value, low, high; None where it is not a number
STRETCHES = 20
TERMS = ("loss", "video", "action", "rep", "cosine", "policy", "self_flow", "samples_per_s")
PROBED = ("video tau=0.5: drawer", "video tau=0.5: apple", "video tau=0.5: gripper")


def read_records(path: Path) -> dict[str, Record]:
    """By job. A torn last line is none. Raises UserError for a damaged one."""
    return dict(read_lines(path, lambda record: (record["job"], record), "job"))


def write_records(path: Path, records: dict[str, Record]) -> None:
    """All of them, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(record) + "\n" for record in records.values()))


def check_records(config: AblationConfig, jobs: list[Job], records: dict[str, Record]) -> None:
    """Raises UserError where a job was done with other arguments than now."""
    for job in jobs:
        if job.name not in records:
            continue
        was, now = records[job.name]["arguments"], identity(config, job)
        if was != now:
            other = sorted(set(was) ^ set(now))
            raise UserError(
                f"{config.records}: {job.name} was done otherwise ({', '.join(other)[:300]}); "
                "choose another out, records and document, or the config that it had"
            )


def identity(config: AblationConfig, job: Job) -> list[str]:
    """The job's arguments, wherever `out` lies."""
    return [argument.replace(f"{config.out}/", "OUT/") for argument in job.arguments]


def harvest(config: AblationConfig, job: Job, minutes: float) -> Record:
    """The line of a job that is done. Raises UserError where its files do not hold it."""
    head = {"job": job.name, "kind": job.kind, "arguments": identity(config, job)}
    try:
        if job.steps:
            found = _training(job)
        elif job.kind in (CURVE, VIDEO):
            found = _world(job)
        else:
            assert job.kind == ROLLOUT
            found = _rollout(config, job)
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{job.out}: does not hold what {job.kind} leaves ({e!r})") from e
    return head | {"minutes": round(minutes, 2)} | found


def _training(job: Job) -> Record:
    rows = [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()]
    config = json.loads((job.out / "config.json").read_text())
    size = max(1, math.ceil(len(rows) / STRETCHES))
    curve = []
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        known = [term for term in TERMS if term in part[-1]]
        means = {term: round(fmean(row[term] for row in part), 5) for term in known}
        curve.append({"step": part[-1]["step"]} | means)
    seconds = [config["batch"] / row["samples_per_s"] for row in rows]
    early = next((row["step"] for row in rows if row.get("cosine", 0) > 0.9), None)
    return {
        "steps": rows[-1]["step"],
        "step_s": round(median(seconds), 4),
        "train_minutes": round(sum(seconds) / 60, 2),
        "cosine_above_0.9": early,
        "log": curve,
    }


def _world(job: Job) -> Record:
    results = json.loads((job.out / "results.json").read_text())
    names = [Path(path).name for path in results["config"]["checkpoint"]]
    parts = ("loss", "probe_summary") if job.kind == CURVE else ("video", "actions")
    cells: dict[str, Cells] = {name: {} for name in names}
    for part in parts:
        for cell in results[part]:
            name, _, rest = cell["row"].partition(", ")
            if name in cells:  # others are differences, or what stands in for a model
                column = f"{rest}: {cell['column']}" if rest else cell["column"]
                numbers = [cell[k] for k in ("value", "low", "high")]
                cells[name][column] = [None if x is None else round(x, 5) for x in numbers]
    episodes = sum(len(e) for e in results["episodes"].values())
    return {
        "episodes": episodes,
        "cells": {str(int(n.split("-")[-1])): c for n, c in cells.items()},
    }


def _rollout(config: AblationConfig, job: Job) -> Record:
    """Of all planned seeds and no others."""
    found = {e.seed: e for e in read_episodes(job.out)}
    episodes = [found[s] for s in range(config.seed, config.seed + config.episodes)]
    names = sorted({name for e in episodes for name in e.progress})
    return {
        "seeds": [e.seed for e in episodes],
        "success": [int(e.success) for e in episodes],
        "ever": [int(e.ever) for e in episodes],
        "progress": {
            name: [round(e.progress.get(name, 0.0), 3) for e in episodes] for name in names
        },
    }


def loss_of(cells: Cells) -> float:
    """Held-out flow loss: video and action together, as they are weighted in training."""
    return number(cells, "video") + number(cells, "action")


def probe_of(cells: Cells) -> float:
    """Mean R² over blocks and targets where trained models leave random ones behind: tau = 0.5."""
    return fmean(number(cells, column) for column in PROBED)


def number(cells: Cells, column: str) -> float:
    """The value of a cell; nan where it was none."""
    value = cells[column][0]
    return math.nan if value is None else float(value)


def curve_of(record: Record, what: str) -> tuple[list[float], list[float]]:
    """Steps and values of `loss` or `probe` along a pretraining."""
    read = {"loss": loss_of, "probe": probe_of}[what]
    points = sorted((float(step), read(cells)) for step, cells in record["cells"].items())
    return [step for step, _ in points], [value for _, value in points]
