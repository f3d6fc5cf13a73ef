"""Statistics of actions and proprioception by embodiment, and the scaling that policies use.

The six arm dimensions of an action are scaled so that the 1 % and 99 % quantiles become -1 and 1,
and clipped there (real data have outliers of 22 m); the gripper is left alone, 0 .. 1. A dimension
whose quantiles are equal is constant: it becomes 0, and that constant again on the way back.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from selfflow.datasets.episodes import EpisodeSource
from selfflow.datasets.rotations import to_matrix
from selfflow.datasets.spec import (
    GRIPPER,
    OPENING,
    PROPRIO_DIM,
    TOOL_POSITION,
    TOOL_QUATERNION,
    Embodiment,
    UserError,
)

Row = tuple[float, ...]
FEATURES = 10  # of proprio_features
CONSTANT = 1e-6  # m or rad: quantiles closer than this are equal
CONVENTIONS = ("control_hz", "frame", "rotation", "gripper", "limits")  # as in Embodiment


@dataclass(frozen=True)
class Statistics:
    """Of one embodiment, over valid actions and valid proprioception in physical units."""

    control_hz: float
    frame: str
    rotation: str
    gripper: str
    limits: Row
    action_q01: Row
    action_q99: Row
    action_mean: Row
    action_std: Row
    action_min: Row
    action_max: Row
    proprio_q01: Row  # -1 and 1 where there was no proprioception
    proprio_q99: Row
    n: int  # actions counted
    sources: tuple[str, ...]


def fit(sources: Sequence[EpisodeSource]) -> dict[str, Statistics]:
    """Statistics by embodiment name; none for an embodiment without a single valid action.

    Raises UserError if sources of one embodiment disagree about its conventions.
    """
    groups: dict[str, list[EpisodeSource]] = {}
    for source in sources:
        groups.setdefault(source.embodiment.name, []).append(source)
    found = {name: _fit_one(group) for name, group in groups.items()}
    return {name: statistics for name, statistics in found.items() if statistics is not None}


def normalize_action(a: Float[np.ndarray, "*b 7"], stat: Statistics) -> Float[np.ndarray, "*b 7"]:
    """Arm dimensions to -1 .. 1, clipped; the gripper as it is."""
    scaled = _scale(a, stat.action_q01, stat.action_q99).clip(-1, 1)
    scaled[..., GRIPPER] = a[..., GRIPPER]
    return scaled.astype(a.dtype)


def denormalize_action(a: Float[np.ndarray, "*b 7"], stat: Statistics) -> Float[np.ndarray, "*b 7"]:
    """The inverse of `normalize_action`, within the quantiles."""
    low, high = np.asarray(stat.action_q01), np.asarray(stat.action_q99)
    span = np.where(high - low < CONSTANT, 0.0, high - low)
    physical = low + (a.astype(np.float64) + 1) / 2 * span
    physical[..., GRIPPER] = a[..., GRIPPER]
    return physical.astype(a.dtype)


def proprio_features(
    p: Float[np.ndarray, "*b 8"], stat: Statistics | None
) -> Float[np.ndarray, "*b 10"]:
    """What a model sees of proprioception, all about -1 .. 1.

    Position scaled by its quantiles (in metres if `stat` is None) and clipped at ±2; the first two
    columns of the rotation matrix, which, unlike a quaternion, never jump; 2 · opening - 1.
    """
    position = p[..., TOOL_POSITION].astype(np.float64)
    if stat is not None:
        position = _scale(
            position, stat.proprio_q01[TOOL_POSITION], stat.proprio_q99[TOOL_POSITION]
        )
    columns = np.swapaxes(to_matrix(p[..., TOOL_QUATERNION])[..., :2], -1, -2)
    parts = [
        position.clip(-2, 2),
        columns.reshape(*p.shape[:-1], 6),
        p[..., OPENING, None] * 2.0 - 1.0,
    ]
    return np.concatenate(parts, axis=-1).astype(p.dtype)


def of_embodiment(statistics: Mapping[str, Statistics], name: str) -> Statistics:
    """The entry for this embodiment. Raises UserError with those there are."""
    if name not in statistics:
        have = ", ".join(sorted(statistics))
        raise UserError(f"no statistics for embodiment {name!r}; this checkpoint has: [{have}]")
    return statistics[name]


def check_conventions(stat: Statistics, embodiment: Embodiment) -> None:
    """Raises UserError unless the statistics were computed for the embodiment as it is now."""
    for key in CONVENTIONS:
        there, here = getattr(stat, key), getattr(embodiment, key)
        if there != here:
            raise UserError(
                f"statistics of {embodiment.name!r} have {key}={there}, the robot has {here}; "
                "they belong to another action space"
            )


def to_json(statistics: Mapping[str, Statistics]) -> dict[str, Any]:
    """As plain lists and numbers."""
    return {name: json.loads(json.dumps(asdict(stat))) for name, stat in statistics.items()}


def from_json(values: Mapping[str, Any]) -> dict[str, Statistics]:
    """The inverse of `to_json`. Raises UserError if an entry is not as it should be."""
    expected = {f.name for f in fields(Statistics)}
    found = {}
    for name, entry in values.items():
        wrong = expected.symmetric_difference(entry)
        if wrong:
            raise UserError(f"statistics of {name!r}: missing or unknown: {sorted(wrong)}")
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()
        }
        found[name] = Statistics(**plain)
    return found


def load(path: str | Path) -> dict[str, Statistics]:
    """Statistics of a stats.json. Raises UserError if there is none or it cannot be read."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise UserError(
            f"{path}: no statistics ({e}); a checkpoint without them is unusable"
        ) from e
    return from_json(values)


def _fit_one(sources: list[EpisodeSource]) -> Statistics | None:
    embodiment = sources[0].embodiment
    for other in sources[1:]:
        if other.embodiment != embodiment:
            raise UserError(
                f"{sources[0].name} and {other.name} mean different robots by {embodiment.name!r}: "
                f"{embodiment} and {other.embodiment}"
            )
    signals = [source.signals(i) for source in sources for i in range(len(source))]
    actions = np.concatenate([s.actions[s.action_valid] for s in signals]).astype(np.float64)
    if len(actions) == 0:
        return None
    proprio = np.concatenate([s.proprio[s.proprio_valid] for s in signals])
    if len(proprio) == 0:
        proprio = np.stack([-np.ones(PROPRIO_DIM), np.ones(PROPRIO_DIM)])
    (action_q01, action_q99), (proprio_q01, proprio_q99) = map(_quantiles, (actions, proprio))
    return Statistics(
        **{key: getattr(embodiment, key) for key in CONVENTIONS},
        action_q01=action_q01,
        action_q99=action_q99,
        action_mean=_row(actions.mean(0)),
        action_std=_row(actions.std(0)),
        action_min=_row(actions.min(0)),
        action_max=_row(actions.max(0)),
        proprio_q01=proprio_q01,
        proprio_q99=proprio_q99,
        n=len(actions),
        sources=tuple(source.name for source in sources),
    )


def _quantiles(values: np.ndarray) -> tuple[Row, Row]:
    low, high = np.quantile(values.astype(np.float64), (0.01, 0.99), axis=0)
    return _row(low), _row(high)


def _row(values: np.ndarray) -> Row:
    return tuple(float(v) for v in values)


def _scale(x: np.ndarray, low: Sequence[float], high: Sequence[float]) -> np.ndarray:
    """low .. high to -1 .. 1 in float64, constant dimensions to 0."""
    a, span = np.asarray(low), np.asarray(high) - np.asarray(low)
    constant = span < CONSTANT
    return np.where(constant, 0.0, (x.astype(np.float64) - a) / np.where(constant, 1, span) * 2 - 1)
