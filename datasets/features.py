"""What is in a source of episodes: features, lengths and instructions, as tables."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from selfflow.datasets.episode_film import fps_of
from selfflow.datasets.episodes import EpisodeSource, Measures, Signals
from selfflow.datasets.spec import ACTION_NAMES, UserError

STATE_NAMES = ("x", "y", "z", "qw", "qx", "qy", "qz", "opening")
SHOWN = 20  # instructions


@dataclass
class Survey:
    """Counts over episodes whose signals were read."""

    episodes: int = 0
    steps: int = 0
    actions: int = 0  # steps with a valid one
    poses: int = 0
    terminated: int = 0  # episodes with a step that says so
    succeeded: Counter[str] = field(default_factory=Counter)  # by "yes", "no", "not known"
    instructions: Counter[str] = field(default_factory=Counter)  # episodes that have it

    def add(self, signals: Signals, success: object) -> None:
        """Counts an episode."""
        self.episodes += 1
        self.steps += len(signals.terminate)
        self.actions += int(signals.action_valid.sum())
        self.poses += int(signals.proprio_valid.sum())
        self.terminated += bool(signals.terminate.any())
        known = "not known" if success is None else "yes" if success else "no"
        self.succeeded[known] += 1
        self.instructions.update(dict.fromkeys(signals.instruction, 1))


def survey(source: EpisodeSource, episodes: Sequence[int]) -> Survey:
    """Of these episodes."""
    found, console = Survey(), Console(stderr=True)
    hidden = not console.is_terminal
    for i in track(episodes, source.name, console=console, transient=True, disable=hidden):
        found.add(source.signals(i), source.metadata(i).get("success"))
    return found


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` episodes, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


def print_features(console: Console, source: EpisodeSource, found: Survey) -> None:
    """Prints all tables."""
    robot = source.embodiment
    console.print(
        f"[bold]{source.name}[/]: robot {robot.name} at {robot.control_hz:g} Hz, "
        f"{len(source)} episodes, {source.skipped} records skipped",
        soft_wrap=True,
    )
    console.print(features(source, found))
    console.print(lengths(source))
    console.print(instructions(found, len(source)))


def features(source: EpisodeSource, found: Survey) -> Table:
    """Keys, shapes, types and rates."""
    table = Table(title="features", title_justify="left")
    for name in ("key", "a step", "type", "about"):
        table.add_column(name, overflow="fold")
    rate = fps_of(source, 0)
    for n, camera in enumerate(source.cameras):
        shape = "×".join(map(str, _picture(source, camera)))
        default = ", default" if n == 0 else ""
        table.add_row(f"camera {camera}", shape, "uint8", f"RGB, {rate:g} a second{default}")
    of = max(found.steps, 1)
    rows = (
        ("actions", ACTION_NAMES, found.actions),
        ("proprio", STATE_NAMES, found.poses),
    )
    for key, names, valid in rows:
        share = f"valid at {100 * valid / of:.1f} % of steps: {', '.join(names)}"
        table.add_row(key, str(len(names)), "float32", share)
    ends = f"in {found.terminated} of {found.episodes} episodes"
    table.add_row("terminate", "1", "bool", ends)
    table.add_row("instruction", "1", "text", f"{len(found.instructions)} different", end_section=True)
    if isinstance(source, Measures):
        for key in source.measures:
            array = source.measured(0, key)
            if array is not None:
                shape = "×".join(map(str, array.shape[1:])) or "1"
                table.add_row(f"measured {key}", shape, str(array.dtype), "")
    about = source.metadata(0)
    for n, (key, value) in enumerate(about.items()):
        kind = type(value).__name__
        shown = f"an episode; of the first: {value}"
        table.add_row(f"metadata {key}", "", kind, shown, end_section=n == len(about) - 1)
    return table


def lengths(source: EpisodeSource) -> str:
    """A line on the lengths of all episodes."""
    steps = np.array([source.length(i) for i in range(len(source))])
    hours = steps.sum() / fps_of(source, 0) / 3600
    return (
        f"lengths: {steps.min()} to {steps.max()} steps, median {np.median(steps):g}, "
        f"{steps.sum()} in all, {hours:.2f} h"
    )


def instructions(found: Survey, episodes: int) -> Table:
    """The most frequent ones."""
    part = "" if found.episodes == episodes else f" (of {found.episodes} episodes, evenly spread)"
    table = Table(title=f"instructions{part}", title_justify="left")
    table.add_column("episodes", justify="right")
    table.add_column("text", overflow="fold")
    for text, count in found.instructions.most_common(SHOWN):
        table.add_row(str(count), text or "[dim](none)[/]")
    if (more := len(found.instructions) - SHOWN) > 0:
        table.add_row("", f"[dim]and {more} others[/]")
    success = ", ".join(f"{name} {n}" for name, n in found.succeeded.most_common())
    table.caption = f"success: {success}"
    return table


def _picture(source: EpisodeSource, camera: str) -> tuple[int, ...]:
    return source.frames(0, [0], camera)[0].shape


def check_episode(source: EpisodeSource, i: int) -> None:
    """Raises UserError unless there is such an episode."""
    if not 0 <= i < len(source):
        raise UserError(f"episode={i}: {source.name} has 0..{len(source) - 1}")
