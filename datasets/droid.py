"""DROID (Franka Panda with a Robotiq gripper) as Ctrl-World's clips keep it: 5 Hz frames of 15 Hz
recordings (clips.py).

    observation.state.cartesian_position  xyz (m), rpy (rad, fixed axes x y z) in the base frame
    observation.state.gripper_position    0 = open, 1 = closed
    action.cartesian_position             commanded pose, absolute, in the same form
    action.gripper_position               commanded position, 0 = open, 1 = closed
    texts                                 the instruction, may be empty

All four at 15 Hz: row 3t belongs to frame t. What is converted, and what is not:
- an action is the step from the pose sensed at frame t to the last pose commanded before frame
  t + 1; the arm reaches about half of it in that time, as it follows with lag;
- a frame whose last command was not recorded has no valid action;
- closedness becomes opening; the end of a clip says nothing about success: terminate is False.
"""

import numpy as np

from selfflow.datasets.episodes import DatasetSpec, Signals
from selfflow.datasets.rotations import canonical, compose, from_rpy, inverse, to_axis_angle
from selfflow.datasets.spec import Embodiment

POSE, CLOSED = "observation.state.cartesian_position", "observation.state.gripper_position"
GOAL, CLOSE = "action.cartesian_position", "action.gripper_position"
RATIO = 3  # rows a frame
ROBOT = Embodiment(
    "droid_5hz",
    5.0,
    ("exterior_1", "exterior_2", "wrist"),
    "panda_link8",
    (0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 1.0),
)


def convert(numbers: dict[str, np.ndarray], instruction: list[str]) -> Signals:
    """Rows at 15 Hz in the project's convention, one for each frame, of which there are as many as
    instructions."""
    rows = len(numbers[POSE])
    here = np.arange(len(instruction)) * RATIO
    last = here + RATIO - 1
    valid = last < rows
    here, last = here.clip(max=rows - 1), last.clip(max=rows - 1)
    pose, goal = numbers[POSE][here], numbers[GOAL][last]
    orientation = canonical(from_rpy(pose[:, 3:]))
    turn = to_axis_angle(compose(from_rpy(goal[:, 3:]), inverse(orientation)))
    target = 1 - numbers[CLOSE][last].clip(0, 1)
    actions = np.column_stack([goal[:, :3] - pose[:, :3], turn, target]).astype(np.float32)
    opening = 1 - numbers[CLOSED][here].clip(0, 1)
    return Signals(
        proprio=np.column_stack([pose[:, :3], orientation, opening]).astype(np.float32),
        proprio_valid=np.ones(len(pose), bool),
        actions=np.where(valid[:, None], actions, np.float32(0)),
        action_valid=valid,
        terminate=np.zeros(len(pose), bool),
        instruction=instruction,
    )


DROID_CLIPS = DatasetSpec(
    embodiment=ROBOT,
    cameras={name: str(i) for i, name in enumerate(ROBOT.cameras)},
    instruction="texts",
    numbers={POSE: 6, CLOSED: 1, GOAL: 6, CLOSE: 1},
    convert=convert,
)
