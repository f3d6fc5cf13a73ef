"""Training samples: windows of frames and action chunks, drawn from a weighted mixture of sources.

    B batch, F frames of a window, K actions of a chunk, T observation steps of an episode

Which windows a step gets depends on (seed, step) and the data alone (order.py): nothing is carried
from one step to the next. So the sampler's position *is* the training step, and resuming at step n
needs no saved state.

Padding at the borders of an episode, for a sample at step t:

- a frame before the first or after the last repeats that one, with frame_valid False;
- an action after the end, or from the step on at which the instruction changes, is no motion with
  the gripper target of the last action before, and action_valid is False;
- a measured row (`extra`) outside the episode, or of a source that does not measure it, is zeros,
  and extra_valid is False;
- terminate[k] is True once the subtask was declared done, or the instruction changed, within
  t .. t + k. It is a label up to the end of the episode, also where the action no longer is; after
  it, and in an episode without any action, terminate_valid is False.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
from rich.console import Console
from rich.progress import track

from selfflow.datasets.augment import Augment, Change, apply, draw, resize
from selfflow.datasets.episodes import EpisodeSource, Measures, Signals
from selfflow.datasets.order import Turns, key_of, permuted
from selfflow.datasets.spec import ACTION_DIM, GRIPPER, UserError

__all__ = ["Batch", "Loader", "Mixture", "Place", "WindowSpec", "resize"]

KEPT_BYTES = 64 * 2**20  # of signals held in memory, some 10 KB an episode of 130 steps
TELL = 2000  # episodes from which on reading them all shows its progress
UNCHANGED = Change()


@dataclass(frozen=True)
class WindowSpec:
    """What one sample holds."""

    frames: tuple[int, ...]  # offsets from t in control steps; negative ones are history
    chunk: int  # K
    height: int  # of the frames, pixels
    width: int
    shift: int = 0  # random-shift augmentation: at most this many pixels each way
    augment: Augment = field(default_factory=Augment)
    only_with_actions: bool = False  # sample only steps that have a valid action
    every: int = 1  # t is a multiple of it: where clips were encoded beforehand
    # key -> (rows from t on, values a row) of what sources measure beside actions
    extra: dict[str, tuple[int, int]] = field(default_factory=dict)
    pictures: bool = True  # without, frames are zeros of size 1 x 1: encoded latents stand for them

    def __post_init__(self) -> None:
        if (
            not self.frames
            or min(self.chunk, self.height, self.width, self.every) < 1
            or self.shift < 0
        ):
            raise ValueError(f"a window needs frames, a chunk and a size: {self}")


@dataclass(frozen=True)
class Batch:
    """B samples. Actions are in physical units; see the module for padding and flags."""

    frames: UInt8[np.ndarray, "B F H W 3"]
    frame_valid: Bool[np.ndarray, "B F"]
    proprio: Float32[np.ndarray, "B 8"]
    proprio_valid: Bool[np.ndarray, "B"]
    actions: Float32[np.ndarray, "B K 7"]
    action_valid: Bool[np.ndarray, "B K"]
    terminate: Bool[np.ndarray, "B K"]
    terminate_valid: Bool[np.ndarray, "B K"]
    instruction: list[str]
    embodiment: list[str]
    ids: list[tuple[str, int, int]]  # source name, episode, t
    extra: dict[str, Float32[np.ndarray, "B _ _"]] = field(default_factory=dict)
    extra_valid: dict[str, Bool[np.ndarray, "B _"]] = field(default_factory=dict)


class Place(NamedTuple):
    """A window: step t of an episode of a source. `number` is the sample's, of the whole run; its
    augmentation is drawn by it. None: as it is."""

    source: int
    episode: int
    t: int
    number: int | None = None


class Loader:
    """Reads windows of sources by place."""

    def __init__(self, sources: Sequence[EpisodeSource], spec: WindowSpec, seed: int = 0) -> None:
        self.sources, self.spec, self.seed = list(sources), spec, seed
        self._kept = _Kept(KEPT_BYTES)

    def load(self, places: Sequence[Place]) -> Batch:
        """The samples at these places, in order."""
        spec = self.spec
        size = (spec.height, spec.width) if spec.pictures else (1, 1)
        frames = np.zeros((len(places), len(spec.frames), *size, 3), np.uint8)
        samples = [self._sample(*each) for each in zip(places, frames, strict=True)]
        return Batch(frames, *(_joined(column) for column in zip(*samples, strict=True)))

    def _sample(self, place: Place, frames: UInt8[np.ndarray, "F H W 3"]) -> tuple:
        """Fills the frames; returns the rest of a sample, in the order of Batch's fields."""
        number, index, t, _ = place
        source, spec = self.sources[number], self.spec
        episode = self._kept.get(number, index, source)
        wanted = t + np.array(spec.frames)
        if spec.pictures:
            self._show(place, wanted.clip(0, episode.steps - 1), frames)
        extra = {k: _rows(source, index, t, k, *shape) for k, shape in spec.extra.items()}
        return (
            (wanted >= 0) & (wanted < episode.steps),
            episode.proprio[t],
            episode.proprio_valid[t],
            *episode.chunk(t, spec.chunk),
            episode.texts[t],
            source.embodiment.name,
            (source.name, index, t),
            {k: rows for k, (rows, _) in extra.items()},
            {k: valid for k, (_, valid) in extra.items()},
        )

    def _show(self, place: Place, steps: np.ndarray, out: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Writes the frames of these steps, changed as was drawn for the sample."""
        spec, change = self.spec, UNCHANGED
        if place.number is not None and (spec.shift or spec.augment != Augment()):
            rng = np.random.default_rng([self.seed, place.number])
            change = draw(rng, spec.augment, spec.shift)
        once, which = np.unique(steps, return_inverse=True)
        images = self.sources[place.source].frames(place.episode, once.tolist())
        small = [resize(image, spec.height, spec.width, change.box) for image in images]
        for k, number in enumerate(which.tolist()):
            out[k] = small[number]
        apply(change, out)


class Mixture(Loader):
    """Draws windows from sources by weight; of each source every window once an epoch.

    With `only_with_actions` the signals of all episodes are read first, to know the windows.
    """

    def __init__(
        self,
        sources: Sequence[EpisodeSource],
        weights: Sequence[float],
        spec: WindowSpec,
        seed: int,
    ) -> None:
        if not sources or len(sources) != len(weights):
            raise ValueError(f"{len(sources)} sources with {len(weights)} weights")
        empty = [source.name for source in sources if len(source) == 0]
        if empty:
            raise UserError(f"data: no episode in {', '.join(empty)}; record some, or leave it out")
        super().__init__(sources, spec, seed)
        self.windows = [_Windows(source, spec) for source in sources]
        self.turns = Turns(list(weights))

    def batch(self, step: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        """The `size` samples that this rank of `world` trains on at this step."""
        return self.load(self.places(step, size, rank, world))

    def places(self, step: int, size: int, rank: int = 0, world: int = 1) -> list[Place]:
        """Where they are. A run sees the same windows whatever number of processes shares them."""
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        first = (step * world + rank) * size
        turns = [self.turns.at(first + j) for j in range(size)]
        found: list[Place] = [Place(0, 0, 0)] * size
        for source, windows in enumerate(self.windows):
            rows = [j for j, (who, _) in enumerate(turns) if who == source]
            epochs, n = np.divmod(np.array([turns[j][1] for j in rows], np.int64), windows.count)
            keys = np.array([key_of(self.seed, source, int(e)) for e in epochs], np.uint64)
            episodes, steps = windows.at(permuted(n, windows.count, keys))
            for j, episode, t in zip(rows, episodes.tolist(), steps.tolist(), strict=True):
                found[j] = Place(source, episode, t, first + j)
        return found

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source has been gone through after so many samples, by its name."""
        had, found = self.turns.counts(samples), {}
        for i, (source, windows) in enumerate(zip(self.sources, self.windows, strict=True)):
            name = source.name if source.name not in found else f"{source.name}#{i}"
            found[name] = had[i] / windows.count
        return found

    def try_all(self) -> None:
        """Loads a window of every source, so that what is wrong with one is said early."""
        for i, windows in enumerate(self.windows):
            episodes, steps = windows.at(np.array([windows.count // 2]))
            self.load([Place(i, int(episodes[0]), int(steps[0]))])


class _Windows:
    """The windows of a source, numbered 0 .. count - 1."""

    def __init__(self, source: EpisodeSource, spec: WindowSpec) -> None:
        self.every = spec.every
        lengths = np.array([source.length(i) for i in range(len(source))], np.int64)
        self._ends = np.cumsum(-(-lengths // self.every))
        self.count = int(self._ends[-1])
        self._chosen: np.ndarray | None = None
        if spec.only_with_actions:
            episodes, told = range(len(source)), Console(stderr=True, quiet=len(source) < TELL)
            note = f"{source.name}: windows with actions"
            valid = [
                source.signals(i).action_valid[:: self.every]
                for i in track(episodes, note, console=told, transient=True)
            ]
            self._chosen = np.flatnonzero(np.concatenate(valid)).astype(np.int64)
            self.count = len(self._chosen)
            if not self.count:
                raise UserError(
                    f"data: {source.name} has no actions to learn from; leave it out here, or "
                    "pretrain on it"
                )

    def at(
        self, n: Int64[np.ndarray, "B"]
    ) -> tuple[Int64[np.ndarray, "B"], Int64[np.ndarray, "B"]]:
        """Episode and step of these windows."""
        flat = n if self._chosen is None else self._chosen[n]
        episodes = np.searchsorted(self._ends, flat, side="right")
        starts = np.append(0, self._ends)[episodes]
        return episodes, (flat - starts) * self.every


class _Kept:
    """Episodes' signals that were used last, up to so many bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[tuple[int, int], _Episode] = OrderedDict()

    def get(self, source: int, index: int, of: EpisodeSource) -> "_Episode":
        """Episode `index` of source number `source`, read if it is not here."""
        key = source, index
        if key not in self._kept:
            self._kept[key] = episode = _Episode(of.signals(index))
            self.size += episode.size
            while self.size > self.limit and len(self._kept) > 1:
                self.size -= self._kept.popitem(last=False)[1].size
        self._kept.move_to_end(key)
        return self._kept[key]


def _rows(
    source: EpisodeSource, episode: int, t: int, key: str, length: int, channels: int
) -> tuple[Float32[np.ndarray, "{length} {channels}"], Bool[np.ndarray, "{length}"]]:
    """What the source measured under `key` at steps t .. t + length - 1, and which rows it has."""
    rows = np.zeros((length, channels), np.float32)
    found = source.measured(episode, key) if isinstance(source, Measures) else None
    if found is None:
        return rows, np.zeros(length, bool)
    if found[0].size != channels:
        raise UserError(
            f"extra: {source.name} measures {found[0].size} values of {key} a step, not {channels}"
        )
    own = found[t : t + length].reshape(-1, channels)
    rows[: len(own)] = own
    return rows, np.arange(length) < len(own)


def _joined(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {k: np.stack([v[k] for v in values]) for k in values[0]}
    return list(values) if isinstance(values[0], str | tuple) else np.stack(values)


class _Episode:
    """Signals of an episode and what padding needs to know of it."""

    def __init__(self, signals: Signals) -> None:
        self.proprio, self.proprio_valid = signals.proprio, signals.proprio_valid
        self._actions, self._valid = signals.actions, signals.action_valid
        self.steps = len(signals.actions)
        once: dict[str, str] = {}  # readers may make a new text of every step
        self.texts = [once.setdefault(text, text) for text in signals.instruction]
        changes = np.array([a != b for a, b in pairwise(self.texts)], bool)
        # The step, exclusive, up to which each step's instruction lasts.
        ends = np.append(np.flatnonzero(changes) + 1, self.steps)
        self._lasts = ends[np.searchsorted(ends, np.arange(self.steps), side="right")]
        # Number of steps up to and including this one at which the subtask was declared done.
        self._done = np.cumsum(signals.terminate)
        # Gripper target to hold at a step without a valid action: the last one, else the first.
        valid = np.flatnonzero(signals.action_valid)
        self._has_actions = len(valid) > 0
        targets = signals.actions[:, GRIPPER]
        if self._has_actions:
            last = np.searchsorted(valid, np.arange(self.steps), side="right") - 1
            self._hold = targets[valid[last.clip(0)]]
        else:
            self._hold = np.ones_like(targets)
        arrays = (v for v in vars(self).values() if isinstance(v, np.ndarray))
        self.size = sum(a.nbytes for a in arrays) + 8 * self.steps + sum(map(len, once)) + 2000

    def chunk(
        self, t: int, k: int
    ) -> tuple[
        Float32[np.ndarray, "K 7"],
        Bool[np.ndarray, "K"],
        Bool[np.ndarray, "K"],
        Bool[np.ndarray, "K"],
    ]:
        """Actions, action_valid, terminate and terminate_valid of steps t .. t + k - 1."""
        steps, last = t + np.arange(k), int(self._lasts[t])
        at = steps.clip(max=last - 1)
        valid = self._valid[at] & (steps < last)
        actions = np.zeros((k, ACTION_DIM), np.float32)
        actions[:, GRIPPER] = self._hold[at]
        actions[valid] = self._actions[at[valid]]
        inside = steps.clip(max=self.steps - 1)
        before = self._done[t - 1] if t else 0
        changed = (steps >= last) & (last < self.steps)
        terminate = (self._done[inside] > before) | changed
        return actions, valid, terminate, (steps < self.steps) & self._has_actions
