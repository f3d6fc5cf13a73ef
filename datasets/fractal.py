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
- base motion is no action, as the arm's policies do not command it: RldsSource.measured has it, as
  all of `SCHEMA`, by key; what the record says of the whole episode is in RldsSource.metadata;
- outliers stay (up to 22 m): statistics are quantiles, and scaling clips there.

The tool is taken to be SIMPLER's `link_gripper_tcp`; the data set does not name its frame.
"""

import numpy as np
from jaxtyping import Bool, Float

from selfflow.datasets.episodes import DatasetSpec, Signals
from selfflow.datasets.rlds_schema import TEXT, Leaf, image
from selfflow.datasets.rotations import (
    canonical,
    from_axis_angle,
    from_rpy,
    to_axis_angle,
    to_rpy,
)
from selfflow.datasets.spec import EMBODIMENTS

MOVE, TURN = "steps/action/world_vector", "steps/action/rotation_delta"
CLOSE, TERMINATE = "steps/action/gripper_closedness_action", "steps/action/terminate_episode"
POSE, CLOSED = "steps/observation/base_pose_tool_reached", "steps/observation/gripper_closed"
INSTRUCTION, IMAGE = "steps/observation/natural_language_instruction", "steps/observation/image"
WXYZ, XYZW = [3, 0, 1, 2], [1, 2, 3, 0]  # each of the other
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


def invert(signals: Signals) -> dict[str, np.ndarray]:
    """The numbers that `convert` makes these signals of, as far as the schema can say them.

    A step without a valid action moves nothing, a pose that is not valid has no rotation, and the
    gripper is commanded to open or close only: half and more is open.
    """
    actions, proprio = signals.actions.astype(np.float64), signals.proprio.astype(np.float64)
    ended = signals.terminate[:, None]
    return {
        MOVE: actions[:, :3],
        TURN: to_rpy(from_axis_angle(actions[:, 3:6])),
        CLOSE: relative_gripper(actions[:, 6] >= 0.5, signals.action_valid)[:, None],
        TERMINATE: np.where(ended, [1, 0, 0], [0, 1, 0]),
        POSE: np.column_stack([proprio[:, :3], proprio[:, 3:7][:, XYZW]]),
        CLOSED: np.where(signals.proprio_valid, 1 - proprio[:, 7], 0)[:, None],
    }


def relative_gripper(
    opening: Bool[np.ndarray, "T"], valid: Bool[np.ndarray, "T"]
) -> Float[np.ndarray, "T"]:
    """Commands, 1 closes and -1 opens, of which `absolute_gripper` makes these targets.

    Only where the target changes from one valid step to the next; the first one if none does.
    """
    closing, steps = np.zeros(len(opening)), np.flatnonzero(valid)
    if len(steps) == 0:
        return closing
    changes = steps[1:][np.diff(opening[steps].astype(int)) != 0]
    changes = changes if len(changes) else steps[:1]
    closing[changes] = np.where(opening[changes], -1, 1)
    return closing


def _floats(*shape: int) -> Leaf:
    return Leaf("float32", shape)


_ASPECTS = ("already_success", "feasible", "has_aspects", "success", "undesirable")
_ATTRIBUTES = (
    "collection_mode",
    "data_type",
    "env",
    "location",
    "objects_family",
    "task_family",
)
SCHEMA = {
    **{f"aspects/{name}": Leaf("bool") for name in _ASPECTS},
    **{f"attributes/{name}": Leaf("int64") for name in _ATTRIBUTES},
    **{f"attributes/{name}_name": TEXT for name in _ATTRIBUTES},
    "steps/action/base_displacement_vector": _floats(2),
    "steps/action/base_displacement_vertical_rotation": _floats(1),
    CLOSE: _floats(1),
    TURN: _floats(3),
    TERMINATE: Leaf("int32", (3,)),
    MOVE: _floats(3),
    "steps/is_first": Leaf("bool"),
    "steps/is_last": Leaf("bool"),
    "steps/is_terminal": Leaf("bool"),
    POSE: _floats(7),
    CLOSED: _floats(1),
    "steps/observation/gripper_closedness_commanded": _floats(1),
    "steps/observation/height_to_bottom": _floats(1),
    IMAGE: image(256, 320),
    "steps/observation/natural_language_embedding": _floats(512),
    INSTRUCTION: TEXT,
    "steps/observation/orientation_box": _floats(2, 3),
    "steps/observation/orientation_start": _floats(4),
    "steps/observation/robot_orientation_positions_box": _floats(3, 3),
    "steps/observation/rotation_delta_to_go": _floats(3),
    "steps/observation/src_rotation": _floats(4),
    "steps/observation/vector_to_go": _floats(3),
    "steps/observation/workspace_bounds": _floats(3, 3),
    "steps/reward": _floats(),
}
FRACTAL = DatasetSpec(
    embodiment=EMBODIMENTS["google_robot"],
    cameras={"overhead_camera": IMAGE},
    instruction=INSTRUCTION,
    numbers={MOVE: 3, TURN: 3, CLOSE: 1, TERMINATE: 3, POSE: 7, CLOSED: 1},
    convert=convert,
)
