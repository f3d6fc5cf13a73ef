"""What every reader of episodes offers.

An episode has T observation steps. Its frames are read one by one, at random; everything else of it
(`Signals`) is small and read at once, already in the project's convention: selfflow.datasets.spec.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from selfflow.datasets.spec import ACTION_DIM, PROPRIO_DIM, Embodiment, UserError

Metadata = dict[str, str | int | float | bool]


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
    """How one dataset's own arrays, in whatever file format, become the project's.

    Written in code (bridge.py), or in YAML for one's own data (describe.py). A reader hands
    `convert` every key of `numbers` as (T, values) float64, and one text a step: that under
    `instruction`, else `text`.
    """

    embodiment: Embodiment
    cameras: Mapping[str, str]  # camera name -> key of its frames; the first is the default
    instruction: str | None  # key of the text of every step; None: `text` is that of all steps
    numbers: Mapping[str, int]  # key -> values a step, 0 = as many as there are
    # {key: (T, values) array}, instruction of every step -> the project's convention
    convert: Callable[[dict[str, np.ndarray], list[str]], Signals]
    text: str = ""


@runtime_checkable
class EpisodeSource(Protocol):
    """Episodes of one embodiment, numbered 0 .. len - 1."""

    name: str
    embodiment: Embodiment
    cameras: tuple[str, ...]  # the first is the default
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

    def metadata(self, i: int) -> Metadata:
        """What the format says of episode i as a whole, under names that all formats share:

        episode (its number in the original), seed, success, fps (the data's own rate), task, file;
        the rest is named as it is there. {} where the format says nothing.
        """
        ...


@runtime_checkable
class Measures(Protocol):
    """A source that also holds other measurements by step: forces, object poses, joint angles, or
    the format's own arrays before any conversion."""

    measures: tuple[str, ...]  # keys that some episode has

    def measured(self, i: int, key: str) -> np.ndarray | None:
        """(T, ...) of episode i, or None where there is no such key."""
        ...


def no_signals(instruction: list[str]) -> Signals:
    """Those of an episode that has frames and a text at every step, and nothing else."""
    t = len(instruction)
    return Signals(
        proprio=np.zeros((t, PROPRIO_DIM), np.float32),
        proprio_valid=np.zeros(t, bool),
        actions=np.zeros((t, ACTION_DIM), np.float32),
        action_valid=np.zeros(t, bool),
        terminate=np.zeros(t, bool),
        instruction=instruction,
    )


def check_camera(camera: str | None, cameras: Sequence[str], source: str) -> str:
    """The camera asked for, the first one by default. Raises UserError with the choices."""
    if camera is None:
        return cameras[0]
    if camera not in cameras:
        raise UserError(f"camera={camera}: {source} has {', '.join(cameras)}")
    return camera
