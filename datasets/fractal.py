"""RT-1's robot (Google robot, 3 Hz): `fractal20220817_data` of Open X-Embodiment.

    steps/action/world_vector                  xyz (m) delta in the base frame
    steps/action/rotation_delta                rpy (rad, fixed axes x y z) delta in the base frame
    steps/action/gripper_closedness_action     relative: + closes, - opens, 0 goes on as before
    steps/action/terminate_episode             one-hot of 3; the first of them terminates
    steps/observation/base_pose_tool_reached   xyz (m) and quaternion xyzw of the tool, base frame
    steps/observation/gripper_closed           1 = closed

What is converted, and what is not:
- rpy deltas become rotation vectors, quaternions wxyz with w >= 0, closedness opening;
- the gripper's action becomes absolute (`absolute_gripper`), as Octo and OpenVLA do;
- a pose whose quaternion is not a rotation is marked invalid;
- base motion is left out: the arm's policies do not command it;
- outliers stay (up to 22 m): statistics are quantiles, and scaling clips there.

The tool is taken to be SIMPLER's `link_gripper_tcp`; the data set does not name its frame.
"""

import numpy as np
from jaxtyping import Float

from selfflow.datasets.episodes import DatasetSpec, Signals
from selfflow.datasets.rotations import canonical, from_rpy, to_axis_angle

MOVE, TURN = "steps/action/world_vector", "steps/action/rotation_delta"
CLOSE, TERMINATE = "steps/action/gripper_closedness_action", "steps/action/terminate_episode"
POSE, CLOSED = "steps/observation/base_pose_tool_reached", "steps/observation/gripper_closed"
WXYZ = [3, 0, 1, 2]  # of xyzw
MOVES = 0.1  # a relative gripper command below this is none


def convert(numbers: dict[str, np.ndarray], instruction: list[str]) -> Signals:
    """Raw numbers of an episode, each (T, values), in the project's convention."""
    gripper = absolute_gripper(numbers[CLOSE][:, 0])
    actions = np.column_stack([numbers[MOVE], to_axis_angle(from_rpy(numbers[TURN])), gripper])
    position, quaternion = numbers[POSE][:, :3], numbers[POSE][:, 3:][:, WXYZ]
    valid = np.abs(np.linalg.norm(quaternion, axis=1) - 1) < 0.05
    turned = canonical(np.where(valid[:, None], quaternion, np.eye(4)[0]))
    proprio = np.column_stack([position, turned, 1 - numbers[CLOSED].clip(0, 1)])
    return Signals(
        proprio=np.where(valid[:, None], proprio, 0).astype(np.float32),
        proprio_valid=valid,
        actions=actions.astype(np.float32),
        action_valid=np.ones(len(actions), bool),
        terminate=numbers[TERMINATE][:, 0] > 0,
        instruction=instruction,
    )


def absolute_gripper(closing: Float[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
    """Opening targets, 1 = open, of relative commands: the last one that moved the gripper holds.

    Before the first the gripper is taken to be what that one changes; without any, open.
    """
    moves = np.flatnonzero(np.abs(closing) > MOVES)
    if len(moves) == 0:
        return np.ones(len(closing))
    targets = (closing[moves] < 0).astype(np.float64)
    last = np.searchsorted(moves, np.arange(len(closing)), side="right") - 1
    return np.where(last < 0, 1 - targets[0], targets[last.clip(0)])


FRACTAL = DatasetSpec(
    embodiment="google_robot",
    cameras={"overhead_camera": "steps/observation/image"},
    instruction="steps/observation/natural_language_instruction",
    numbers={MOVE: 3, TURN: 3, CLOSE: 1, TERMINATE: 3, POSE: 7, CLOSED: 1},
    convert=convert,
)
