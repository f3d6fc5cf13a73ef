"""Statistics of actions and proprioception by embodiment, and the scaling that policies use.

The six arm dimensions of an action are scaled so that the 1 % and 99 % quantiles become -1 and 1,
and clipped there (real data have outliers of 22 m); the gripper is left alone, 0 .. 1. A dimension
whose quantiles are equal is constant: it becomes 0, and that constant again on the way back.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from selfflow.datasets.episodes import EpisodeSource, Signals
from selfflow.datasets.quantiles import Columns
from selfflow.datasets.rotations import to_matrix
from selfflow.datasets.spec import (
    ACTION_DIM,
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
LOOKED_AT = 50  # episodes
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
    proprio_mean: Row = ()  # for reading, not for scaling: () in older files and without any
    proprio_std: Row = ()
    proprio_min: Row = ()
    proprio_max: Row = ()


class Tally:
    """Totals of one embodiment, episode by episode; what they come to is `statistics`."""

    def __init__(self, embodiment: Embodiment) -> None:
        self.embodiment = embodiment
        self.actions, self.proprio = Columns(ACTION_DIM), Columns(PROPRIO_DIM)
        self.sources: dict[str, None] = {}

    def add(self, source: EpisodeSource, signals: Signals) -> None:
        """Counts an episode. Raises UserError if its source means another robot by the name, or if
        a value that is marked valid is not finite."""
        if source.embodiment != self.embodiment:
            raise UserError(
                f"{', '.join(self.sources)} and {source.name} mean different robots by "
                f"{self.embodiment.name!r}: {self.embodiment} and {source.embodiment}"
            )
        self.sources[source.name] = None
        for what, columns, rows in (
            ("action", self.actions, signals.actions[signals.action_valid]),
            ("proprioception", self.proprio, signals.proprio[signals.proprio_valid]),
        ):
            if not np.isfinite(rows).all():
                raise UserError(f"{source.name}: a valid {what} is not finite")
            columns.add(rows)

    def statistics(self) -> Statistics | None:
        """None without a single valid action."""
        actions, proprio = self.actions, self.proprio
        if actions.n == 0:
            return None
        seen = proprio.n > 0
        ones = np.ones(PROPRIO_DIM)
        return Statistics(
            **{key: getattr(self.embodiment, key) for key in CONVENTIONS},
            action_q01=_row(actions.quantile(0.01)),
            action_q99=_row(actions.quantile(0.99)),
            action_mean=_row(actions.mean()),
            action_std=_row(actions.std()),
            action_min=_row(actions.low()),
            action_max=_row(actions.high()),
            proprio_q01=_row(proprio.quantile(0.01) if seen else -ones),
            proprio_q99=_row(proprio.quantile(0.99) if seen else ones),
            n=actions.n,
            sources=tuple(self.sources),
            proprio_mean=_row(proprio.mean()) if seen else (),
            proprio_std=_row(proprio.std()) if seen else (),
            proprio_min=_row(proprio.low()) if seen else (),
            proprio_max=_row(proprio.high()) if seen else (),
        )


def fit(sources: Sequence[EpisodeSource]) -> dict[str, Statistics]:
    """Statistics by embodiment name; none for an embodiment without a single valid action.

    One pass in constant memory (quantiles.py). Raises UserError if sources of one embodiment
    disagree about its conventions.
    """
    tallies: dict[str, Tally] = {}
    for source in sources:
        tally = tallies.setdefault(source.embodiment.name, Tally(source.embodiment))
        for i in range(len(source)):
            tally.add(source, source.signals(i))
    found = {name: tally.statistics() for name, tally in tallies.items()}
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


def statistics_for(
    sources: Sequence[EpisodeSource], given: Mapping[str, Statistics], where: str
) -> dict[str, Statistics]:
    """Those of `given`, which come from `where`, that belong to these sources' robots.

    Raises UserError if one is missing whose source has actions, or was computed for other
    conventions.
    """
    found = {}
    for source in sources:
        robot = source.embodiment
        if robot.name in given:
            check_conventions(given[robot.name], robot)
            found[robot.name] = given[robot.name]
        elif has_actions(source):
            raise UserError(
                f"{where} has no statistics of {robot.name!r}, the robot of {source.name}; it has "
                f"[{', '.join(sorted(given))}]; python datasets/stats.py makes them"
            )
    return found


def has_actions(source: EpisodeSource) -> bool:
    """Whether one of the first LOOKED_AT episodes has a valid action."""
    return any(source.signals(i).action_valid.any() for i in range(min(len(source), LOOKED_AT)))


def to_json(statistics: Mapping[str, Statistics]) -> dict[str, Any]:
    """As plain lists and numbers."""
    return {name: json.loads(json.dumps(asdict(stat))) for name, stat in statistics.items()}


def from_json(values: Mapping[str, Any]) -> dict[str, Statistics]:
    """The inverse of `to_json`. Raises UserError if an entry is not as it should be."""
    known = {f.name for f in fields(Statistics)}
    needed = {f.name for f in fields(Statistics) if f.default is MISSING}
    found = {}
    for name, entry in values.items():
        wrong = (needed - set(entry)) | (set(entry) - known)
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


def _row(values: np.ndarray) -> Row:
    return tuple(float(v) for v in values)


def _scale(x: np.ndarray, low: Sequence[float], high: Sequence[float]) -> np.ndarray:
    """low .. high to -1 .. 1 in float64, constant dimensions to 0."""
    a, span = np.asarray(low), np.asarray(high) - np.asarray(low)
    constant = span < CONSTANT
    return np.where(constant, 0.0, (x.astype(np.float64) - a) / np.where(constant, 1, span) * 2 - 1)
