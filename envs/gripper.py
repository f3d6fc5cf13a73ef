"""From a policy's gripper opening target (1 = open) to what the Google robot's fingers are told.

SIMPLER's own gripper action is relative: +1 closes, -1 opens, as a change of the last drive target.
All modes live in the environment, so that policies and data know one convention only.
"""

import numpy as np
from jaxtyping import Float

CLOSED = 1.31  # rad; a little beyond the joint limit of 1.3, so that closing squeezes
GOAL_LIMITS = (-0.0101, 1.31)  # the joint's limits, widened by 0.01 as SIMPLER does
HOLD_BELOW = 1e-3  # a smaller relative action repeats the last goal


class OpeningGripper:
    """mode "opening": the fingers go to (1 - opening) of their closed angle."""

    def reset(self, fingers: Float[np.ndarray, "2"]) -> None:
        """Starts an episode with the fingers at these angles (rad)."""

    def goal(self, opening: float, drive: Float[np.ndarray, "2"]) -> Float[np.ndarray, "2"]:
        """Finger angles (rad) to go to; `drive` are the last drive targets."""
        del drive
        return np.full(2, (1.0 - opening) * CLOSED)


class RelativeGripper:
    """mode "relative": SIMPLER's raw gripper action r, given as the opening (1 - r) / 2.

    The goal is the last drive target + 1.31 rad × r, within GOAL_LIMITS; an r of almost nothing
    repeats the last goal. So 1 opens, 0 closes and 0.5 holds.
    """

    def __init__(self) -> None:
        self.reset(np.zeros(2))

    def reset(self, fingers: Float[np.ndarray, "2"]) -> None:
        """Starts an episode with the fingers at these angles (rad)."""
        self._goal = np.array(fingers, np.float64)

    def relative(self, opening: float) -> float:
        """SIMPLER's raw gripper action for this opening; +1 closes, -1 opens."""
        return 1.0 - 2.0 * opening

    def goal(self, opening: float, drive: Float[np.ndarray, "2"]) -> Float[np.ndarray, "2"]:
        """Finger angles (rad) to go to; `drive` are the last drive targets."""
        return self.raw_goal(self.relative(opening), drive)

    def raw_goal(self, relative: float, drive: Float[np.ndarray, "2"]) -> Float[np.ndarray, "2"]:
        """The same for a raw relative action."""
        if abs(relative) >= HOLD_BELOW:
            self._goal = np.clip(drive + relative * CLOSED, *GOAL_LIMITS)
        return self._goal


class StickyGripper(RelativeGripper):
    """mode "sticky": the raw action that SIMPLER's policies send, from their opening targets.

    | step | relative action |
    |---|---|
    | first of an episode | 0 |
    | otherwise | last opening target - this one |
    | where that is beyond ±0.5 | it is sent for `repeat` steps, whatever comes in between |
    """

    def __init__(self, repeat: int = 15) -> None:
        self._repeat = repeat
        super().__init__()

    def reset(self, fingers: Float[np.ndarray, "2"]) -> None:
        """Starts an episode with the fingers at these angles (rad)."""
        self._previous: float | None = None
        self._latched, self._left = 0.0, 0
        super().reset(fingers)

    def relative(self, opening: float) -> float:
        """SIMPLER's raw gripper action for this opening target; +1 closes, -1 opens."""
        change = 0.0 if self._previous is None else self._previous - opening
        self._previous = opening
        if self._left == 0 and abs(change) > 0.5:
            self._latched, self._left = change, self._repeat
        if self._left == 0:
            return change
        self._left -= 1
        return self._latched


GRIPPERS = {"opening": OpeningGripper, "relative": RelativeGripper, "sticky": StickyGripper}
