"""Jerk-limited joint paths between control steps, as SIMPLER's planner makes them (ruckig)."""

import numpy as np
from jaxtyping import Float
from ruckig import InputParameter, Result, Ruckig, Trajectory

AT_REST = 1e-8  # rad and rad/s (or m)


class JerkLimited:
    """Time-optimal joint paths under limits on velocity, acceleration and jerk.

    Each `plan` starts where the executed part of the last path ended, with its velocity but without
    its acceleration (the original's rule: its recorded drive targets are met to 1e-7 rad), so a
    command that is replaced before it is finished goes on without a jump. Limits are per joint, in
    rad (or m) per s, s², s³.
    """

    def __init__(self, joints: int, velocity: float, acceleration: float, jerk: float) -> None:
        self._otg, self._input = Ruckig(joints), InputParameter(joints)
        self._path = Trajectory(joints)
        self._input.max_velocity = [velocity] * joints
        self._input.max_acceleration = [acceleration] * joints
        self._input.max_jerk = [jerk] * joints
        self._limit = velocity
        self.reset(np.zeros(joints))

    def reset(self, position: np.ndarray, velocity: np.ndarray | None = None) -> None:
        """Starts from rest at `position`, or at `velocity` clipped to the limit."""
        self.position = np.array(position, np.float64)
        self.velocity = np.clip(
            np.zeros_like(self.position) if velocity is None else velocity,
            -self._limit,
            self._limit,
        )

    def plan(
        self, target: np.ndarray, times: Float[np.ndarray, "n"]
    ) -> tuple[Float[np.ndarray, "n J"], Float[np.ndarray, "n J"]]:
        """Positions and velocities at `times` (s from now) on the way to rest at `target`."""
        target = np.asarray(target, np.float64)
        # ruckig fails on joints that are off their target by rounding only: those are there
        there = (np.abs(self.position - target) < AT_REST) & (np.abs(self.velocity) < AT_REST)
        self._input.current_position = np.where(there, target, self.position)
        self._input.current_velocity = np.where(there, 0.0, self.velocity)
        self._input.target_position = target
        result = self._otg.calculate(self._input, self._path)
        if result not in (Result.Working, Result.Finished):
            raise RuntimeError(f"no jerk-limited path from {self.position} to {target}: {result}")
        states = [self._path.at_time(float(t))[:2] for t in times]
        positions, velocities = (np.array(part) for part in zip(*states, strict=True))
        self.position, self.velocity = positions[-1], velocities[-1]
        return positions, velocities
