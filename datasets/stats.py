"""python datasets/stats.py source=data/open_drawer_place out=outputs/stats

Statistics of actions and proprioception in one pass and constant memory: mean, std, min, max and
the 1 % and 99 % quantiles of every dimension, in the project's convention, for every robot of the
source or sources. Writes `stats.json`, as checkpoints have it and `statistics=` of the training
scripts takes it, and `histograms.png`, and warns of what looks wrong (data_checks.py). Quantiles
are exact up to a million steps, then within 0.2 % (quantiles.py).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from selfflow.configs.entry import launch
from selfflow.datasets.data_checks import Checks, warnings
from selfflow.datasets.episodes import EpisodeSource, Measures
from selfflow.datasets.histograms import Histogram, save_histograms
from selfflow.datasets.normalize import Statistics, Tally, to_json
from selfflow.datasets.quantiles import Columns
from selfflow.datasets.reference import Reference, reference_of
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import ACTION_NAMES, GRIPPER, UserError

PROPRIO_NAMES = ("x", "y", "z", "qw", "qx", "qy", "qz", "opening")
BINS = 60


@dataclass(frozen=True)
class StatsConfig:
    """Keys are explained in configs/stats.yaml."""

    source: Any
    out: str = "outputs/stats"
    episodes: int | None = None

    def __post_init__(self) -> None:
        if self.episodes is not None and self.episodes < 1:
            raise ValueError(f"episodes={self.episodes}: give at least 1, or null for all")

    @property
    def sources(self) -> list[str]:
        """`source` as a list of strings."""
        one = isinstance(self.source, str)
        return [self.source] if one else [str(item) for item in self.source]


def main(config: StatsConfig) -> Path:
    """Reads the sources, prints and writes what it found; returns the folder."""
    sources = open_sources(config.sources)[0]
    found: dict[str, tuple[Tally, Checks]] = {}
    for source in sources:
        robot = source.embodiment
        tally, checks = found.setdefault(robot.name, (Tally(robot), Checks()))
        read(source, chosen(len(source), config.episodes), tally, checks)
    console, rows, kept = Console(), [], {}
    for name, (tally, checks) in found.items():
        own = [source for source in sources if source.embodiment.name == name]
        for source in own:
            console.print(
                f"{source.name}: {name}, {len(source)} episodes, {source.skipped} skipped",
                soft_wrap=True,
            )
        stat, reference = tally.statistics(), reference_of(name)
        if stat is None:
            console.print(_no_actions(own), soft_wrap=True)
            continue
        kept[name] = stat
        report(console, stat, checks, warnings(tally, checks, reference))
        rows += panels(tally, stat, reference)
    if not kept:
        raise UserError(f"source={config.source}: no episode has a valid action, so no statistics")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    part = out / ".stats.json.part"
    part.write_text(json.dumps(to_json(kept), indent=2) + "\n")
    os.replace(part, out / "stats.json")
    save_histograms(rows, out / "histograms.png")
    console.print(f"wrote {out / 'stats.json'} and {out / 'histograms.png'}", soft_wrap=True)
    return out


def chosen(count: int, episodes: int | None) -> list[int]:
    """All episodes, or so many of them evenly spread."""
    if episodes is None or episodes >= count:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, episodes).round().astype(int)).tolist()


def read(source: EpisodeSource, episodes: list[int], tally: Tally, checks: Checks) -> None:
    """The one pass over these episodes."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    for i in track(episodes, source.name, console=console, transient=True, disable=hidden):
        signals = source.signals(i)
        tally.add(source, signals)
        checks.add(source, i, signals)


def report(console: Console, stat: Statistics, checks: Checks, signs: list[str]) -> None:
    """Prints the table of dimensions and the warnings."""
    console.print(f"{stat.n} valid actions at {stat.control_hz:g} Hz")
    parts = ("mean", "std", "q01", "q99", "min", "max")
    shown = Table(padding=0)  # all digits fit 80 columns
    shown.add_column("dimension", no_wrap=True, min_width=12)
    for heading in parts:
        shown.add_column(heading, justify="right")
    for kind, names in (("action", ACTION_NAMES), ("proprio", PROPRIO_NAMES)):
        rows = [getattr(stat, f"{kind}_{part}") for part in parts]
        for k, name in enumerate(names if all(rows) else ()):
            shown.add_row(name, *(f"{row[k]:.4g}" for row in rows), end_section=k == len(names) - 1)
    console.print(shown)
    following = checks.following()
    if np.isfinite(following).any():
        values = ", ".join(f"{value:.2f}" for value in following)
        console.print(f"correlation of dx, dy, dz with the displacement that follows: {values}")
    for sign in signs:
        console.print(f"[yellow]warning:[/] {sign}", soft_wrap=True)
    if not signs:
        console.print("no warnings")


def panels(
    tally: Tally, stat: Statistics, reference: Reference | None
) -> list[tuple[str, list[Histogram]]]:
    """A row of histograms of the action's dimensions, one of proprioception's."""
    name = tally.embodiment.name
    published = f"; green: published, of {reference.name}" if reference else ""
    marks = list(zip(stat.action_q01, stat.action_q99, strict=True))
    others: list[tuple[float, ...]] = [()] * len(marks)
    if reference is not None:
        pairs = zip(reference.action["q01"], reference.action["q99"], strict=True)
        others = [pair if k != GRIPPER else () for k, pair in enumerate(pairs)]
    rows = [
        (
            f"{name}: actions, {tally.actions.n} steps; red: 1 % and 99 %{published}",
            _histograms(tally.actions, ACTION_NAMES, marks, others),
        )
    ]
    if tally.proprio.n:
        marks = list(zip(stat.proprio_q01, stat.proprio_q99, strict=True))
        shown = _histograms(tally.proprio, PROPRIO_NAMES, marks, [()] * len(marks))
        rows.append((f"{name}: proprioception, {tally.proprio.n} steps", shown))
    return rows


def _histograms(
    columns: Columns,
    names: tuple[str, ...],
    marks: list[tuple[float, float]],
    others: list[tuple[float, ...]],
) -> list[Histogram]:
    """Each over its quantiles and half as much on both sides, as far as there is anything, and the
    published ones."""
    found = []
    for k, name in enumerate(names):
        (low, high), (least, most) = marks[k], (columns.low()[k], columns.high()[k])
        margin = (high - low) / 2
        low, high = max(float(least), low - margin), min(float(most), high + margin)
        low, high = min(low, *others[k], low), max(high, *others[k], high)
        if high <= low:
            low, high = low - 0.5, low + 0.5
        counts = columns.histogram(k, low, high, BINS)
        found.append(Histogram(name, low, high, counts, marks[k], others[k]))
    return found


def _no_actions(sources: Sequence[EpisodeSource]) -> str:
    raw = [key for source in sources if isinstance(source, Measures) for key in source.measures]
    return (
        "no valid action, so no statistics: it serves pretraining on video only; its own arrays "
        f"are {', '.join(raw) or 'none'}"
    )


if __name__ == "__main__":
    launch(StatsConfig, main, "stats")
