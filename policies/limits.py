"""The last stage before the robot: actions smoothed and kept within limits, and what that changed.

The order is fixed: low pass, then the largest step, then the workspace, so that what is commanded
never leaves the box. Whoever executes actions calls it once an action (eval/rollout.py does).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from selfflow.datasets.spec import POSITION, ROTATION, UserError

Action = Float[np.ndarray, "7"]


@dataclass(frozen=True)
class Limits:
    """None and 0 limit nothing. Raises UserError for what cannot be."""

    max_metres: float | None = None  # length of an action's position delta
    max_radians: float | None = None  # angle of its rotation delta
    low_pass: float = 0.0  # share of the last action in the next, of the six arm dimensions
    # x, y, z at least and at most, of the tool in the robot's base frame, m
    workspace: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for key in ("max_metres", "max_radians"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise UserError(f"{key}={value}: must be above 0; null for no limit")
        if not 0 <= self.low_pass < 1:
            raise UserError(f"low_pass={self.low_pass}: 0 (none) up to, not including, 1")
        box = self.workspace
        if box is not None and (len(box) != 6 or not np.less(box[:3], box[3:]).all()):
            raise UserError(
                f"workspace={list(box)}: give six numbers, [x, y, z, x, y, z], the least first"
            )


class Limiter:
    """Applies Limits to an episode's actions in turn.

    `counts`: actions seen, and by limit how many it changed. The low pass starts from rest, and
    leaves the gripper alone: a late gripper misses its object.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.reset()

    def reset(self) -> None:
        """Forgets the episode."""
        self._last = np.zeros(6)
        kept = ("max_metres", "max_radians", "workspace")
        self.counts = {"actions": 0} | {
            name: 0 for name in kept if getattr(self.limits, name) is not None
        }

    def __call__(self, action: Action, position: Float[np.ndarray, "3"]) -> Action:
        """The action to execute where the tool is sensed at `position` (m, base frame)."""
        limits, out = self.limits, action.astype(np.float64)
        out[:6] = limits.low_pass * self._last + (1 - limits.low_pass) * out[:6]
        out[POSITION] = self._shortened("max_metres", out[POSITION])
        out[ROTATION] = self._shortened("max_radians", out[ROTATION])
        if limits.workspace is not None:
            here = position.astype(np.float64)
            # a tool that is outside already may stay or come back, but is not thrown back
            low = np.minimum(limits.workspace[:3], here)
            high = np.maximum(limits.workspace[3:], here)
            there = np.clip(here + out[POSITION], low, high)
            if not np.array_equal(there, here + out[POSITION]):
                self.counts["workspace"] += 1
                out[POSITION] = there - here
        self.counts["actions"] += 1
        self._last = out[:6].copy()
        return out.astype(action.dtype)

    def _shortened(self, name: str, delta: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3"]:
        most, length = getattr(self.limits, name), float(np.linalg.norm(delta))
        if most is None or length <= most:
            return delta
        self.counts[name] += 1
        return delta * (most / length)
