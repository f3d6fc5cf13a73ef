"""python eval/experts.py workers=2   (200 episodes a task and placement: about an hour)

How often the scripted experts succeed, on every task of a simulator. A quick look at one:

    python eval/experts.py task=close_top_drawer episodes=5 out=/tmp/experts

Writes to `out`: table.md, summary.json, and of each task and placement a folder of
eval/simpler_rollout.py. The same command continues where it stopped.
"""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from selfflow.configs.entry import compose, launch, one_of
from selfflow.datasets.spec import UserError, task_named
from selfflow.envs.tasks import draw_placement
from selfflow.eval import parts, results
from selfflow.eval.parts import RolloutConfig
from selfflow.eval.simpler_rollout import one_rollout
from selfflow.eval.suite import ALL, TABLE

Row = dict[str, Any]
ROLLOUT = "python eval/simpler_rollout.py"
SAME = ("backend", "randomise", "episodes", "seed", "split", "workers")  # keys of a rollout's


@dataclass(frozen=True)
class ExpertsConfig:
    """Every key of configs/experts.yaml, which explains them."""

    task: str
    placements: list[str]
    backend: str
    randomise: str
    episodes: int
    seed: int
    split: str
    workers: int
    out: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks. Raises UserError."""
        return parts.tasks_of(self.backend) if self.task == ALL else (task_named(self.task).name,)

    def folder(self, task: str, placement: str) -> str:
        """Where one cell of the table lies."""
        return f"{self.out}/{task}_{placement}"

    def arguments(self, task: str, placement: str) -> list[str]:
        """The command line of eval/simpler_rollout.py for one cell of the table."""
        own = {"policy": "expert", "pictures": "false", "videos": 0}
        own |= {"task": task, "placement": placement} | {key: getattr(self, key) for key in SAME}
        return [f"{k}={v}" for k, v in own.items()] + [f"out={self.folder(task, placement)}"]

    def rollouts(self) -> list[RolloutConfig]:
        """One a task and placement, from its command line. Raises UserError."""
        first = compose(RolloutConfig, "rollout", self.arguments(self.tasks[0], self.placements[0]))
        return [
            replace(first, task=task, placement=placement, out=self.folder(task, placement))
            for task in self.tasks
            for placement in self.placements
        ]

    def identity(self) -> Row:
        """What two runs must share so that one may continue the other."""
        return {"policy": "expert"} | {k: getattr(self, k) for k in ("backend", "randomise")}


def check(config: ExpertsConfig) -> None:
    """Everything that can be wrong before work begins. Raises UserError."""
    one_of("backend", config.backend, parts.BACKENDS)
    if not config.placements:
        raise UserError("placements=[]: give at least one, such as [mild, grid]")
    if len(set(config.placements)) < len(config.placements):
        raise UserError(f"placements={config.placements}: give each once")
    results.check_folder(Path(config.out), config.identity())
    for one in config.rollouts():
        parts.check(one)
        results.check_folder(Path(one.out), one.identity())


def main(config: ExpertsConfig) -> Row:
    """Runs what is still missing in `out`; returns the summary that it writes there."""
    folder, rollouts = Path(config.out), config.rollouts()
    console = Console() if Console().is_terminal else Console(width=120)
    folder.mkdir(parents=True, exist_ok=True)
    results.write_json(folder / results.CONFIG, config.identity())
    rows = []
    try:
        for number, one in enumerate(rollouts, start=1):
            command = f"{ROLLOUT} {shlex.join(config.arguments(one.task, one.placement))}"
            console.print(f"{number} of {len(rollouts)}: {command}", soft_wrap=True)
            rows.append(one_rollout(one) | {"starts": starts(one), "command": command})
    except KeyboardInterrupt:
        print(f"stopped; the same command continues {folder}")
        raise
    summary = config.identity() | {"rows": rows}
    results.write_json(folder / results.SUMMARY, summary)
    results.write_text(folder / TABLE, markdown(config, rows))
    console.print(table(config, rows))
    console.print(f"Summary, {TABLE}, and a folder a task and placement: {folder}", soft_wrap=True)
    return summary


def starts(rollout: RolloutConfig) -> int:
    """How many start states differ among those that the seeds draw; a grid has few."""
    drawn = (
        draw_placement(rollout.spec, rollout.placement, np.random.default_rng(seed), seed)
        for seed in rollout.seeds
    )
    return len({tuple(placement.items()) for placement in drawn})


def table_rows(config: ExpertsConfig, rows: list[Row]) -> list[list[str]]:
    """Head, then a line a task: successes and steps to success under each placement."""
    found = {(row["task"], row["placement"]): row for row in rows}
    lines = [["task", *config.placements, "median steps to success", "starts"]]
    for task in config.tasks:
        mine = [found[task, placement] for placement in config.placements]
        steps = [row["median_first_success"] for row in mine]
        medians = " / ".join("-" if step is None else f"{step:g}" for step in steps)
        counts = " / ".join(str(row["starts"]) for row in mine)
        lines.append([task, *map(_score, mine), medians, counts])
    return lines


def _score(row: Row) -> str:
    low, high = (100 * bound for bound in row["wilson_95"])
    return f"{row['successes']}/{row['episodes']} ({low:.1f} to {high:.1f} %)"


def title(config: ExpertsConfig) -> str:
    """What was run."""
    last = config.seed + config.episodes - 1
    return (
        f"Scripted experts, backend={config.backend}, randomise={config.randomise}, "
        f"seeds {config.seed} to {last}; success at the last step, Wilson 95 %"
    )


NOTE = "Starts: how many placements differ among an entry's seeds, which repeat a grid's cells."


def table(config: ExpertsConfig, rows: list[Row]) -> Table:
    """For the terminal."""
    head, *lines = table_rows(config, rows)
    out = Table(*head, title=title(config), title_justify="left", caption=NOTE)
    for line in lines:
        out.add_row(*line)
    return out


def markdown(config: ExpertsConfig, rows: list[Row]) -> str:
    """The same, to be pasted into a document."""
    head, *lines = (f"| {' | '.join(line)} |" for line in table_rows(config, rows))
    rule = "|---" * (len(config.placements) + 3) + "|"
    return "\n".join([title(config), "", head, rule, *lines, "", NOTE, ""])


if __name__ == "__main__":
    launch(ExpertsConfig, main, "experts", check)
