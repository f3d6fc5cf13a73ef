"""How far a demonstration has come: the target of a value head (value.py), by source and step.

B windows, T steps of an episode.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from selfflow.datasets.episodes import EpisodeSource
from selfflow.datasets.windows import Place


class Progress:
    """What share of its subtask is done at a step, for every source's episodes.

    An episode that its format calls a failure shows no progress: its weight is 0.
    """

    def __init__(self, sources: Sequence[EpisodeSource], ahead: int) -> None:
        self._sources, self._ahead = sources, ahead
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def of(self, places: Sequence[Place]) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Target and weight of each window, `ahead` steps after its beginning."""
        done, weight = [], []
        for place in places:
            begin, end, counts = self._episode(place.source, place.episode)[:, place.t]
            done.append(share(place.t + self._ahead, int(begin), int(end)))
            weight.append(float(counts))
        return torch.tensor(done), torch.tensor(weight)

    def _episode(self, source: int, episode: int) -> np.ndarray:
        """(3, T): first step and last of each step's subtask, and whether it counts."""
        key = source, episode
        if key not in self._known:
            own = self._sources[source]
            begins, ends = runs(own.signals(episode).instruction)
            counts = np.full_like(begins, not failed(own, episode))
            self._known[key] = np.stack([begins, ends, counts])
        return self._known[key]


def failed(source: EpisodeSource, episode: int) -> bool:
    """Whether its format calls it a failure, by whatever kind of number; not where it is silent."""
    success = source.metadata(episode).get("success")
    return success is not None and not success


def runs(instruction: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """First and last step of the run of equal instructions that each step lies in."""
    changes = [i for i, (a, b) in enumerate(pairwise(instruction), start=1) if a != b]
    edges = np.array([0, *changes, len(instruction)])
    lengths = np.diff(edges)
    return np.repeat(edges[:-1], lengths), np.repeat(edges[1:] - 1, lengths)


def share(step: int, begin: int, end: int) -> float:
    """Of the subtask that is done at this step: 0 at its first one, 1 at its last and after."""
    return min(1.0, (step - begin) / max(1, end - begin))
