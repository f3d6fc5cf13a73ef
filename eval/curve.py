"""python eval/curve.py runs=[outputs/rollout_a,outputs/rollout_b]

Success, with Wilson's 95 % intervals, against the samples and against the demonstrations that a
policy was fine-tuned on. A run of policies/finetune.py gives the checkpoints that its selection has
rolled out; rollouts of eval/simpler_rollout.py give theirs:

    python eval/curve.py runs=[outputs/policy] against=[samples]
    python eval/curve.py 'runs=[outputs/roll_50,outputs/roll_100,outputs/roll_400]'

Writes curve.png, curve.md and curve.json to `out`. Every key: configs/curve.yaml.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfflow.configs.entry import launch, one_of
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import UserError
from selfflow.eval.chart import Line, Panel, save_chart
from selfflow.eval.diagnose_funnel import markdown
from selfflow.eval.report import wilson
from selfflow.eval.results import SUMMARY, write_json, write_text
from selfflow.policies.selection import ROWS
from selfflow.worldmodel.batches import user_errors
from selfflow.worldmodel.checkpoint import last, load_training_state, read_json

AXES = {
    "samples": "fine-tuning samples",
    "demonstrations": "demonstrations",
    "steps": "fine-tuning steps",
}
COLUMNS = ("line", *AXES.values(), "successes / episodes", "success", "95 % interval")


@dataclass(frozen=True)
class CurveConfig:
    """Every key of configs/curve.yaml, which explains them."""

    runs: list[str]
    against: list[str]
    names: list[str] | None
    out: str


@dataclass(frozen=True)
class Point:
    """One checkpoint's score; None where nothing says how much it was trained."""

    line: str
    steps: int | None
    samples: int | None
    demonstrations: int | None
    successes: int
    episodes: int
    source: str

    @property
    def rate(self) -> float:
        """Of success."""
        return self.successes / self.episodes

    def cells(self) -> list[str]:
        """For a table with COLUMNS."""
        low, high = wilson(self.successes, self.episodes)
        amounts = (getattr(self, axis) for axis in AXES)
        return [
            self.line,
            *("-" if n is None else str(n) for n in amounts),
            f"{self.successes} / {self.episodes}",
            f"{100 * self.rate:.1f} %",
            f"{100 * low:.1f} % to {100 * high:.1f} %",
        ]


def check(config: CurveConfig) -> None:
    """Raises UserError for what can be known before anything is written."""
    for axis in config.against:
        one_of("against", axis, AXES)
    if not config.against or not config.runs:
        raise UserError("runs and against: give at least one of each")
    if config.names is not None and len(config.names) != len(config.runs):
        raise UserError(f"names={config.names}: give one for each of {config.runs}")
    assert points(config)


def main(config: CurveConfig) -> list[dict[str, Any]]:
    """Reads, draws, prints; returns what curve.json holds."""
    found, out = points(config), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    save_chart([panel(found, axis) for axis in config.against], out / "curve.png", 2)
    rows = [asdict(p) | {"wilson_95": wilson(p.successes, p.episodes)} for p in found]
    write_json(out / "curve.json", {"against": config.against, "points": rows})
    write_text(out / "curve.md", markdown(COLUMNS, [p.cells() for p in found]))
    console = Console() if Console().is_terminal else Console(width=160)
    table = Table(title="Success against training", title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for point in found:
        table.add_row(*point.cells())
    console.print(table)
    for axis in config.against:
        missing = sum(getattr(p, axis) is None for p in found)
        if missing:
            console.print(f"{missing} points say no {AXES[axis]} and are not drawn there")
    console.print(f"Chart, table and numbers: {out}", soft_wrap=True)
    return rows


def points(config: CurveConfig) -> list[Point]:
    """Of all folders, by line and amount of training. Raises UserError for one without a score."""
    found: list[Point] = []
    for i, given in enumerate(config.runs):
        folder, name = Path(given), config.names[i] if config.names else None
        if (folder / SUMMARY).is_file():
            found.append(of_rollout(folder, name))
        elif (folder / ROWS).is_file():
            found += of_run(folder, name)
        else:
            raise UserError(
                f"runs: {folder} has neither {SUMMARY} of a finished rollout nor {ROWS} of a "
                "fine-tuning with select_minutes; leave it out"
            )
    return sorted(found, key=lambda p: (p.line, p.steps or 0, p.demonstrations or 0))


def of_rollout(folder: Path, name: str | None) -> Point:
    """The score of one rollout. Raises UserError where no checkpoint was rolled out."""
    with user_errors():
        summary = read_json(folder / SUMMARY)
        where = summary.get("checkpoint_folder")
        if where is None or not summary.get("episodes"):
            raise UserError(f"runs: {folder} is no rollout of a checkpoint; leave it out")
        held = str(summary.get("checkpoint")).partition(" ")[0]
        steps, samples, demonstrations = training_of(Path(where), held)
    line = ", ".join(str(summary[k]) for k in ("task", "backend", "placement", "split"))
    score = int(summary["successes"]), int(summary["episodes"])
    return Point(name or line, steps, samples, demonstrations, *score, str(folder))


def of_run(folder: Path, name: str | None) -> list[Point]:
    """What a fine-tuning's selection measured: a point a checkpoint and task."""
    with user_errors():
        batch = read_json(folder / "config.json").get("batch")
        newest = last(folder)
        demonstrations = demonstrations_of(newest) if newest else None
    found = []
    for row in _rows(folder / ROWS):
        samples = row["step"] * batch if batch else None
        for task, score in row["by_task"].items():
            own = f"{name or folder.name}, {task}"
            counts = score["successes"], score["episodes"]
            found.append(Point(own, row["step"], samples, demonstrations, *counts, str(folder)))
    return found


def training_of(where: Path, held: str) -> tuple[int | None, int | None, int | None]:
    """Steps, samples and demonstrations of a checkpoint of this name: `where` is its own folder, or
    its run's, whose last one may since be another. Raises CheckpointError."""
    steps = int(held[5:]) if held.startswith("step-") and held[5:].isdigit() else None
    within = where / "checkpoints" / held
    found = within if within.is_dir() else where
    if not (found / "model.safetensors").is_file():  # gone, or a run that has gone on
        return steps, None, None
    made = read_json(found / "config.json").get("provenance", {})
    steps = made.get("step", steps)
    run = next((f for f in (found.parent, found.parent.parent) if last(f) is not None), None)
    if run:
        batch = read_json(run / "config.json").get("batch")
    else:  # a copy: what was typed
        typed = re.search(r"(?:^| )batch=(\d+)", str(made.get("command", "")))
        batch = int(typed[1]) if typed else None
    samples = steps * batch if steps is not None and batch else None
    newest = last(run) if run else None
    return steps, samples, demonstrations_of(newest or found)


def demonstrations_of(checkpoint: Path) -> int | None:
    """Episodes of the data that it was fine-tuned on: as its training noted, else as the data hold
    now; None where they are not there."""
    if (checkpoint / "train").is_dir():
        noted = load_training_state(checkpoint).get("data")
        if isinstance(noted, dict):
            return sum(int(episodes) for episodes, _ in noted.values())
    data = read_json(checkpoint / "config.json").get("provenance", {}).get("data", [])
    try:
        return sum(len(source) for source in open_sources(data)[0]) if data else None
    except UserError:
        return None


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as e:
        raise UserError(f"runs: {path} is damaged ({e}); leave it out") from e


def panel(found: Sequence[Point], axis: str) -> Panel:
    """Success over one axis, a line a name, with bars."""
    lines = []
    for name in dict.fromkeys(p.line for p in found):
        own = [p for p in found if p.line == name and getattr(p, axis) is not None]
        if not own:
            continue
        own.sort(key=lambda p: getattr(p, axis))
        bars = [wilson(p.successes, p.episodes) for p in own]
        x, y = [getattr(p, axis) for p in own], [100 * p.rate for p in own]
        low, high = ([100 * bar[end] for bar in bars] for end in (0, 1))
        lines.append(Line(name, x, y, low, high))
    return Panel("success (%)", AXES[axis], lines, 0, 100)


if __name__ == "__main__":
    launch(CurveConfig, main, "curve", check)
