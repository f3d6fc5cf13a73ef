"""Training samples: windows of frames and action chunks, drawn from a weighted mixture of sources.

    B batch, F frames of a window, K actions of a chunk, T observation steps of an episode

A batch depends on (seed, step) and the data alone: nothing is carried from one to the next.
So the sampler's position *is* the training step, and resuming at step n needs no saved state.

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

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from selfflow.datasets.episodes import EpisodeSource, Measures, Signals
from selfflow.datasets.spec import ACTION_DIM, GRIPPER, UserError

EPISODES_KEPT = 20_000  # signals held in memory, some 10 KB each for 130 steps
TRIES = 1000  # draws until a step with a valid action must have turned up


@dataclass(frozen=True)
class WindowSpec:
    """What one sample holds."""

    frames: tuple[int, ...]  # offsets from t in control steps; negative ones are history
    chunk: int  # K
    height: int  # of the frames, pixels
    width: int
    shift: int = 0  # random-shift augmentation: at most this many pixels each way
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


def resize(
    image: UInt8[np.ndarray, "_ _ 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """The image at another size by averaging boxes of whole pixels, squashed if its aspect differs.

    Where the ratio is whole this is the area average; enlarging repeats pixels. Training and
    policies both use it, so that they see the same picture.
    """
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    picture = Image.fromarray(image)
    if h % height == 0 and w % width == 0:  # whole blocks: the same, in half the time
        return np.array(picture.reduce((w // width, h // height)))
    return np.array(picture.resize((width, height), Image.Resampling.BOX))


class Mixture:
    """Draws samples from sources by weight, within a source uniformly over all its steps."""

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
        self.sources, self.spec, self.seed = list(sources), spec, seed
        self.weights = np.asarray(weights, np.float64) / np.sum(weights)
        self._ends = [np.cumsum([s.length(i) for i in range(len(s))]) for s in sources]
        self._episode = lru_cache(EPISODES_KEPT)(self._load)

    def batch(self, step: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        """The `size` samples that this rank of `world` trains on at this step.

        All ranks draw the same size x world samples and load their own part of them, so that a run
        sees the same data whatever number of processes it has.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        rng = np.random.default_rng([self.seed, step, 0])
        limit = self.spec.shift
        drawn = [
            (self._draw(rng), rng.integers(-limit, limit + 1, 2).tolist())
            for _ in range(size * world)
        ]
        samples = [self._sample(*one) for one in drawn[rank * size : (rank + 1) * size]]
        return Batch(*(_joined(column) for column in zip(*samples, strict=True)))

    def _load(self, source: int, episode: int) -> "_Episode":
        return _Episode(self.sources[source].signals(episode))

    def _draw(self, rng: np.random.Generator) -> tuple[int, int, int]:
        """(source, episode, t) of a sample."""
        source = int(rng.choice(len(self.sources), p=self.weights))
        ends = self._ends[source]
        for _ in range(TRIES):
            flat = int(rng.integers(ends[-1]))
            episode = int(np.searchsorted(ends, flat, side="right"))
            t = flat - (int(ends[episode - 1]) if episode else 0)
            t -= t % self.spec.every
            if not self.spec.only_with_actions:
                return source, episode, t
            if self._episode(source, episode).signals.action_valid[t]:
                return source, episode, t
        raise UserError(
            f"data: {self.sources[source].name} has no actions to learn from "
            f"({TRIES} steps tried); leave it out here, or pretrain on it"
        )

    def _sample(self, drawn: tuple[int, int, int], shift: list[int]) -> tuple:
        """One sample, in the order of Batch's fields."""
        number, index, t = drawn
        source, episode, spec = self.sources[number], self._episode(number, index), self.spec
        wanted = t + np.array(spec.frames)
        steps, inverse = np.unique(wanted.clip(0, episode.steps - 1), return_inverse=True)
        images = self._images(source, index, steps.tolist())
        signals = episode.signals
        extra = {k: _rows(source, index, t, k, *shape) for k, shape in spec.extra.items()}
        return (
            shifted(images, *shift)[inverse],
            (wanted >= 0) & (wanted < episode.steps),
            signals.proprio[t],
            signals.proprio_valid[t],
            *episode.chunk(t, spec.chunk),
            signals.instruction[t],
            source.embodiment.name,
            (source.name, index, t),
            {k: rows for k, (rows, _) in extra.items()},
            {k: valid for k, (_, valid) in extra.items()},
        )

    def _images(self, source: EpisodeSource, index: int, steps: list[int]) -> np.ndarray:
        if not self.spec.pictures:
            return np.zeros((len(steps), 1, 1, 3), np.uint8)
        images = source.frames(index, steps)
        return np.stack([resize(image, self.spec.height, self.spec.width) for image in images])


def shifted(images: UInt8[np.ndarray, "F H W 3"], dy: int, dx: int) -> UInt8[np.ndarray, "F H W 3"]:
    """All images moved down by dy and right by dx pixels, their edges repeated."""
    if dy == dx == 0:
        return images
    h, w = images.shape[1:3]
    margin = max(abs(dy), abs(dx))
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="edge")
    return padded[:, margin - dy :, margin - dx :][:, :h, :w]


def prefetch(
    mixture: Mixture, steps: Iterable[int], size: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Batches of these training steps, in order; the next one loads while one is in use.

    An error while loading is raised where its batch would have come.
    """
    with ThreadPoolExecutor(1, "prefetch") as pool:
        coming = None
        for step in steps:
            ready, coming = coming, pool.submit(mixture.batch, step, size, rank, world)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


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
        self.signals = signals
        self.steps = len(signals.actions)
        texts = signals.instruction
        changes = np.array([a != b for a, b in pairwise(texts)], bool)
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
        valid = self.signals.action_valid[at] & (steps < last)
        actions = np.zeros((k, ACTION_DIM), np.float32)
        actions[:, GRIPPER] = self._hold[at]
        actions[valid] = self.signals.actions[at[valid]]
        inside = steps.clip(max=self.steps - 1)
        before = self._done[t - 1] if t else 0
        changed = (steps >= last) & (last < self.steps)
        terminate = (self._done[inside] > before) | changed
        return actions, valid, terminate, (steps < self.steps) & self._has_actions
