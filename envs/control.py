"""Another way to command a robot: `AbsolutePose(env)`, where the tool shall be instead of how far.

    env = AbsolutePose(gymnasium.make("selfflow.envs.registration:selfflow/Simpler-MoveNear-v0"))
    env.step([0.6, 0.0, 0.9, 0.0, 1.57, 0.0, 1.0])

The grippers' modes are in envs/gripper.py.
"""

from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float

from selfflow.datasets.rotations import compose, from_axis_angle, inverse, rotate, to_axis_angle
from selfflow.datasets.spec import (
    ACTION_DIM,
    POSITION,
    ROTATION,
    TOOL_POSITION,
    TOOL_QUATERNION,
)
from selfflow.envs.base import RobotEnv

REACH = 2.0  # m from the base in each direction


class AbsolutePose(gymnasium.ActionWrapper):
    """Actions are poses of the tool in the robot's base frame.

    | entry | what | range |
    |---|---|---|
    | 0..2 | position, m | ± 2 |
    | 3..5 | orientation, axis-angle, rad | ± pi |
    | 6 | gripper opening | 0 to 1 |

    The environment is given the delta that leads there, clips it to its own limits (1 m and 90° a
    step along each axis) and counts that in `info["clipped"]`. What is not finite or of wrong shape
    is its ValueError.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        high = np.array([REACH] * 3 + [np.pi] * 3 + [1.0], np.float32)
        low = np.array([*-high[:6], 0.0], np.float32)
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)

    def action(self, action: Any) -> Float[np.ndarray, "..."]:
        """The delta that leads from where the tool is to that pose."""
        goal = np.array(action, np.float64)
        if goal.shape != (ACTION_DIM,) or not np.all(np.isfinite(goal)):
            return goal  # the environment says what is wrong
        centre, position, quaternion = _commanded(self.unwrapped)
        turn = compose(from_axis_angle(goal[ROTATION]), inverse(quaternion))
        # what the environment does with a delta, solved for it; without `moved` it is goal - sensed
        moved = rotate(turn, position - centre)
        goal[POSITION] -= centre + moved
        goal[ROTATION] = to_axis_angle(turn)
        return goal


def _commanded(env: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the tool is sensed, and the pose that a delta changes: the sensed one, with the WidowX
    the last target. Base frame."""
    assert isinstance(env, RobotEnv), env
    sensed = env.simulator.proprio().astype(np.float64)
    state = env.simulator.privileged()
    if "tool_target" not in state:
        return sensed[TOOL_POSITION], sensed[TOOL_POSITION], sensed[TOOL_QUATERNION]
    base, target = (state[key].astype(np.float64) for key in ("base", "tool_target"))
    position = rotate(inverse(base[3:]), target[:3] - base[:3])
    return sensed[TOOL_POSITION], position, compose(inverse(base[3:]), target[3:])
