"""What every reader of episodes offers.

An episode has T observation steps. Its frames are read one by one, at random; everything else of it
(`Signals`) is small and read at once, already in the project's convention: selfflow.datasets.spec.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from selfflow.datasets.spec import Embodiment, UserError


@dataclass(frozen=True)
class Signals:
    """All of an episode but its frames, by observation step.

    `actions[t]` is the label action that follows observation t. `terminate[t]` says that at
    observation t, before that action, the subtask is done. Rows that are not valid hold zeros.
    """

    proprio: Float32[np.ndarray, "T 8"]
    proprio_valid: Bool[np.ndarray, "T"]
    actions: Float32[np.ndarray, "T 7"]
    action_valid: Bool[np.ndarray, "T"]
    terminate: Bool[np.ndarray, "T"]
    instruction: list[str]


@dataclass(frozen=True)
class DatasetSpec:
    """How one dataset's own arrays, in whatever file format, become the project's."""

    embodiment: str
    cameras: Mapping[str, str]  # camera name -> key of its frames; the first is the default
    instruction: str  # key of the text of every step
    numbers: Mapping[str, int]  # key -> values a step, of what `convert` needs
    # {key: (T, values) array}, instruction of every step -> the project's convention
    convert: Callable[[dict[str, np.ndarray], list[str]], Signals]


@runtime_checkable
class EpisodeSource(Protocol):
    """Episodes of one embodiment, numbered 0 .. len - 1."""

    name: str
    embodiment: Embodiment
    skipped: int  # records that could not be read and were left out

    def __len__(self) -> int: ...

    def length(self, i: int) -> int:
        """T, the number of observation steps of episode i."""
        ...

    def frames(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Frames of episode i at these steps (each in 0 .. T - 1), native size, RGB.

        `camera` None is the source's first. Raises UserError with the choices on an unknown one.
        """
        ...

    def signals(self, i: int) -> Signals: ...


@runtime_checkable
class Measures(Protocol):
    """A source that also holds other measurements by step: forces, object poses, ..."""

    def measured(self, i: int, key: str) -> np.ndarray | None:
        """(T, ...) of episode i, or None where there is no such key."""
        ...


def check_camera(camera: str | None, cameras: Sequence[str], source: str) -> str:
    """The camera asked for, the first one by default. Raises UserError with the choices."""
    if camera is None:
        return cameras[0]
    if camera not in cameras:
        raise UserError(f"camera={camera}: {source} has {', '.join(cameras)}")
    return camera
