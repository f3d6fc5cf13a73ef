"""Signs that actions are not in the project's convention: what `datasets/stats.py` warns of.

| sign | how it is found |
|---|---|
| constant dimension | least and largest value are equal |
| q01 = q99 | 98 % of values are one: scaling makes them 0 and clips the rest |
| scale | q01 or q99 beyond the robot's limits, or below 1/500 of them (other units?) |
| range | q99 - q01 is more than 5 times, or less than a fifth, of the published data set's |
| gripper inverted | where the sensed opening moves, it moves away from the action's target |
| gripper never used | its target is the same throughout |
| both inverted? | most episodes begin with the gripper closed |
| motion reversed | a position delta and the displacement that follows are of opposite sign |
| rate | the data's own rate, or its timestamps', is not the robot's |

The gripper's test is of direction, not of correlation of values: where the opening changes by more
than MOVES in a step, the target must lie in that direction. Both being inverted shows in neither;
only how episodes begin hints at it.
"""

from collections import Counter

import numpy as np
from jaxtyping import Float

from selfflow.datasets.episodes import EpisodeSource, Measures, Signals
from selfflow.datasets.normalize import CONSTANT, Statistics, Tally
from selfflow.datasets.reference import Reference
from selfflow.datasets.spec import ACTION_NAMES, GRIPPER, OPENING, TOOL_POSITION

MOVES = 0.02  # of the opening's 0 .. 1 in a step
ENOUGH = 20  # moves of the gripper, or steps of motion, for a judgement
REVERSED = -0.2  # correlation
TINY, WIDE = 1 / 500, 5.0
RATE_OFF = 0.05  # relative
LOOKED_AT = 50  # episodes whose rate is read, of every source


class Checks:
    """What the warnings need beside the totals, of one embodiment, episode by episode."""

    def __init__(self) -> None:
        self.towards = self.away = 0  # steps at which the gripper moved to the target, or from it
        self.begin_open = self.begin_closed = 0  # episodes
        self.rates: Counter[float] = Counter()
        self._pairs = np.zeros((6, 3))  # n, x, y, xx, yy, xy: delta and displacement, by axis

    def add(self, source: EpisodeSource, i: int, signals: Signals) -> None:
        """Looks at episode i."""
        if i < LOOKED_AT and (rate := own_rate(source, i)) is not None:
            self.rates[round(rate, 3)] += 1
        sensed = np.flatnonzero(signals.proprio_valid)
        if len(sensed) == 0:
            return
        opening = signals.proprio[:, OPENING].astype(np.float64)
        begins_open = opening[sensed[0]] > 0.5
        self.begin_open += begins_open
        self.begin_closed += not begins_open
        both = signals.proprio_valid[:-1] & signals.proprio_valid[1:] & signals.action_valid[:-1]
        change, target = np.diff(opening), signals.actions[:-1, GRIPPER] - opening[:-1]
        moving = both & (np.abs(change) > MOVES)
        self.towards += int((change[moving] * target[moving] > 0).sum())
        self.away += int((change[moving] * target[moving] <= 0).sum())
        limits = np.array(source.embodiment.limits[:3])
        delta = signals.actions[:-1, :3][both].astype(np.float64).clip(-limits, limits)
        moved = np.diff(signals.proprio[:, TOOL_POSITION].astype(np.float64), axis=0)[both]
        columns = (np.ones_like(delta), delta, moved, delta**2, moved**2, delta * moved)
        self._pairs += [column.sum(0) for column in columns]

    def following(self) -> Float[np.ndarray, "3"]:
        """Correlation, by axis, of a position delta with the displacement in the step after it; nan
        where there is no motion, or too little of it to tell."""
        n, x, y, xx, yy, xy = self._pairs
        if n[0] < ENOUGH:
            return np.full(3, np.nan)
        told, done = (xx - x * x / n).clip(0), (yy - y * y / n).clip(0)
        still = np.minimum(told, done) / n < CONSTANT**2
        spread = np.sqrt(np.where(still, 1, told * done))
        return np.where(still, np.nan, (xy - x * y / n) / spread)


def own_rate(source: EpisodeSource, i: int) -> float | None:
    """Steps a second of episode i: by its timestamps, else as its format says."""
    if isinstance(source, Measures) and "timestamp" in source.measures:
        times = source.measured(i, "timestamp")
        if times is not None and len(times) > 1:
            step = float(np.median(np.diff(times.reshape(len(times), -1)[:, 0].astype(np.float64))))
            return 1 / step if step > 0 else None
    rate = source.metadata(i).get("fps")
    return float(rate) if rate else None


def warnings(tally: Tally, checks: Checks, reference: Reference | None) -> list[str]:
    """One line for each sign, the worst mistakes first."""
    stat = tally.statistics()
    if stat is None:
        return []
    return [
        *_gripper(stat, checks),
        *_motion(checks),
        *_rates(tally, checks),
        *_scale(stat),
        *(_range(stat, reference) if reference else ()),
        *_constants(stat),
    ]


def _gripper(stat: Statistics, checks: Checks) -> list[str]:
    found, total = [], checks.towards + checks.away
    if total >= ENOUGH and checks.away > 0.7 * total:
        found.append(
            f"gripper inverted: of {total} steps in which the sensed opening moves, {checks.away} "
            "lead away from the action's target; here 1 = open, in actions and in proprioception"
        )
    elif total >= ENOUGH and checks.away > 0.4 * total:
        found.append(
            f"gripper unrelated: of {total} steps in which the sensed opening moves, {checks.away} "
            "lead away from the action's target; are they the same gripper and the same time?"
        )
    if checks.begin_closed > 2 * checks.begin_open and checks.begin_closed >= ENOUGH / 2:
        episodes = checks.begin_open + checks.begin_closed
        found.append(
            f"gripper closed at the start of {checks.begin_closed} of {episodes} episodes; "
            "that is unusual: is 1 = open?"
        )
    if stat.action_max[GRIPPER] - stat.action_min[GRIPPER] < CONSTANT:
        found.append(f"gripper never used: its target is {stat.action_min[GRIPPER]:g} throughout")
    if stat.action_min[GRIPPER] < -1e-3 or stat.action_max[GRIPPER] > 1 + 1e-3:
        low, high = stat.action_min[GRIPPER], stat.action_max[GRIPPER]
        found.append(f"gripper targets are {low:g} .. {high:g}, not within 0 (closed) .. 1 (open)")
    return found


def _motion(checks: Checks) -> list[str]:
    return [
        f"motion reversed: {name} and the displacement that follows it correlate by {value:.2f}; "
        "are action and state in one frame, and is the sign right?"
        for name, value in zip(ACTION_NAMES, checks.following(), strict=False)
        if value < REVERSED
    ]


def _rates(tally: Tally, checks: Checks) -> list[str]:
    hz, name = tally.embodiment.control_hz, tally.embodiment.name
    total = sum(checks.rates.values())
    return [
        f"rate: {count} of {total} episodes looked at have {rate:g} steps/s, {name} has {hz:g}; "
        "deltas of one are not steps of the other"
        for rate, count in checks.rates.most_common(3)
        if abs(rate / hz - 1) > RATE_OFF
    ]


def _scale(stat: Statistics) -> list[str]:
    found = []
    for k, name in enumerate(ACTION_NAMES[:GRIPPER]):
        low, high, limit = stat.action_q01[k], stat.action_q99[k], stat.limits[k]
        reach = max(abs(low), abs(high))
        if reach > limit:
            found.append(
                f"scale: {name} has q01 {low:.3g} and q99 {high:.3g}, the robot's limit is "
                f"{limit:.3g}; are units m and rad?"
            )
        elif CONSTANT < reach < TINY * limit:
            found.append(
                f"scale: {name} stays within {reach:.2g}, {limit / reach:.0f} times below the "
                f"robot's limit; are units m and rad, and is it scaled back?"
            )
    return found


def _range(stat: Statistics, reference: Reference) -> list[str]:
    found = []
    for k, name in enumerate(ACTION_NAMES[:GRIPPER]):
        own = stat.action_q99[k] - stat.action_q01[k]
        theirs = reference.action["q99"][k] - reference.action["q01"][k]
        if own > CONSTANT and not 1 / WIDE < own / theirs < WIDE:
            found.append(
                f"range: {name} spans {own:.3g}, {own / theirs:.2g} times that of "
                f"{reference.name} (published, {theirs:.3g})"
            )
    return found


def _constants(stat: Statistics) -> list[str]:
    found = []
    for k, name in enumerate(ACTION_NAMES[:GRIPPER]):
        low, high = stat.action_min[k], stat.action_max[k]
        if high - low < CONSTANT:
            found.append(f"constant: {name} is {low:.3g} throughout; scaling makes it 0")
        elif stat.action_q99[k] - stat.action_q01[k] < CONSTANT:
            found.append(
                f"q01 = q99: 98 % of {name} are {stat.action_q01[k]:.3g}, the rest reaches "
                f"{low:.3g} .. {high:.3g} and is lost in scaling"
            )
    return found
