"""What is in a source of episodes: features, lengths and instructions, as tables."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from selfflow.datasets.amounts import in_time
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
    console.print(metadata(source))
    console.print(lengths(source), soft_wrap=True)
    console.print(instructions(found, len(source)))


def features(source: EpisodeSource, found: Survey) -> Table:
    """Keys, shapes, types and rates of what comes by step."""
    table = Table(title="by step", title_justify="left")
    for name in ("key", "shape", "type", "about"):
        table.add_column(name, overflow="fold")
    rate = fps_of(source, 0)
    for n, camera in enumerate(source.cameras):
        shape = source.frames(0, [0], camera)[0].shape
        default = ", the default" if n == 0 else ""
        table.add_row(f"camera {camera}", _times(shape), "uint8", f"RGB, {rate:g} Hz{default}")
    of = max(found.steps, 1)
    rows = (("actions", ACTION_NAMES, found.actions), ("proprio", STATE_NAMES, found.poses))
    for key, names, valid in rows:
        about = f"{', '.join(names)}; {100 * valid / of:.1f} % valid"
        table.add_row(key, str(len(names)), "float32", about)
    ends = f"in {found.terminated} of {found.episodes} episodes"
    table.add_row("terminate", "1", "bool", ends)
    kinds = f"{len(found.instructions)} different"
    table.add_row("instruction", "1", "text", kinds, end_section=True)
    if isinstance(source, Measures):
        for key in source.measures:
            array = source.measured(0, key)
            if array is not None:
                table.add_row(key, _times(array.shape[1:]), str(array.dtype), "measured")
    return table


def metadata(source: EpisodeSource) -> Table:
    """What is known of an episode as a whole."""
    table = Table(title="by episode", title_justify="left")
    table.add_column("key", overflow="fold", min_width=20)
    table.add_column("type", min_width=5)
    table.add_column("of the first", overflow="ellipsis", no_wrap=True, max_width=36)
    for key, value in source.metadata(0).items():
        table.add_row(key, type(value).__name__, str(value))
    return table


def lengths(source: EpisodeSource) -> str:
    """A line on the lengths of all episodes."""
    steps = np.array([source.length(i) for i in range(len(source))])
    return (
        f"lengths: {steps.min()} to {steps.max()} steps, median {np.median(steps):g}, "
        f"{steps.sum()} in all, {in_time(steps.sum() / fps_of(source, 0))}"
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


def check_episode(source: EpisodeSource, i: int) -> None:
    """Raises UserError unless there is such an episode."""
    if not 0 <= i < len(source):
        raise UserError(f"episode={i}: {source.name} has 0..{len(source) - 1}")


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "1"
