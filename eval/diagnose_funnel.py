"""How far the episodes of a rollout came: a row a phase, and the first failing one of each failure.

A success has passed every phase, however it came to be one.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from selfflow.datasets.spec import Task
from selfflow.eval.phases import END, first_missing, phases_of
from selfflow.eval.report import percentile, wilson
from selfflow.eval.rollout import Episode

COLUMNS = ("phase", "came through", "of those before", "lost here", "at step", "missed by")


@dataclass(frozen=True)
class Step:
    """A phase of the funnel; n episodes in all."""

    phase: str
    through: int  # episodes that passed this phase and all before
    before: int  # that passed all before
    n: int
    at_step: float | None  # median of the steps at which it was reached
    missed_by: float | None  # median gap (m) of those lost here at their nearest

    @property
    def lost(self) -> int:
        """Failures of which this is the first failing phase."""
        return self.before - self.through

    def cells(self) -> list[str]:
        """For a table with COLUMNS."""
        return [
            self.phase,
            rate(self.through, self.n),
            rate(self.through, self.before),
            str(self.lost),
            "-" if self.at_step is None else f"{self.at_step:.0f}",
            "-" if self.missed_by is None else f"{100 * self.missed_by:.1f} cm",
        ]

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"lost": self.lost, "wilson_95": wilson(self.through, self.n)}


@dataclass(frozen=True)
class Failure:
    """An episode that failed: where, and when it was nearest to going on."""

    seed: int
    phase: str  # the first failing one
    step: int  # at which that phase was nearest; of END the last with success; else the episode's
    missed_by: float | None  # m; None for END
    since: int  # step at which the phase before was reached
    steps: int
    reason: str

    def cells(self) -> list[str]:
        """For a table: seed, phase, since, step, missed by, end."""
        if self.phase == END:
            missed = "it had succeeded" if self.step < self.steps else "never a success"
        else:
            missed = "-" if self.missed_by is None else f"{100 * self.missed_by:.1f} cm"
        end = f"{self.steps} ({self.reason})"
        return [str(self.seed), self.phase, str(self.since), str(self.step), missed, end]


FAILURE_COLUMNS = ("seed", "first failing phase", "since step", "nearest at step", "missed by")
FAILURE_COLUMNS += ("ended at step",)


def funnel(task: Task, episodes: Sequence[Episode]) -> list[Step]:
    """A row a phase, END the last."""
    phases = phases_of(task)
    names = [*(p.name for p in phases), END]
    lost = [None if e.success else names.index(first_missing(phases, e.phases)) for e in episodes]
    rows = []
    for i, name in enumerate(names):
        before = sum(k is None or k >= i for k in lost)
        through = sum(k is None or k > i for k in lost)
        reached = [e.phases[name] for e in episodes if name in e.phases]
        gaps = [e.nearest[1] for e, k in zip(episodes, lost, strict=True) if k == i and e.nearest]
        known = name != END and gaps
        rows.append(
            Step(
                name,
                through,
                before,
                len(episodes),
                percentile(reached, 50) if reached else None,
                float(np.median(gaps)) if known else None,
            )
        )
    return rows


def failures(task: Task, episodes: Sequence[Episode]) -> list[Failure]:
    """Those without success at the last step, in the order given."""
    return [_failure(task, e) for e in episodes if not e.success]


def _failure(task: Task, episode: Episode) -> Failure:
    phases = phases_of(task)
    name = first_missing(phases, episode.phases)
    names = [p.name for p in phases]
    earlier = names[: names.index(name)] if name != END else names
    since = max((episode.phases.get(k, 0) for k in earlier), default=0)
    step, gap = episode.nearest or (episode.steps, None)
    if name == END:
        step, gap = (step if gap == 0 else episode.steps), None
    return Failure(episode.seed, name, step, gap, since, episode.steps, episode.reason)


def table(rows: Sequence[Step]) -> Table:
    """For the terminal."""
    out = Table(title=f"Phases of {rows[0].n} episodes", title_justify="left")
    for column in COLUMNS:
        out.add_column(column)
    for row in rows:
        out.add_row(*row.cells())
    return out


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a file."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def rate(successes: int, trials: int) -> str:
    """k/n with percent and Wilson's 95 % interval."""
    if not trials:
        return "-"
    low, high = wilson(successes, trials)
    share = 100 * successes / trials
    return f"{successes}/{trials} = {share:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
