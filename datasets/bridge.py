"""Bridge V2 (WidowX, 5 Hz), the `bridge_dataset` of Octo and `bridge_orig` of the release page.

    steps/action             xyz (m), rpy (rad) delta in the base frame, gripper 1 = open
    steps/observation/state  xyz (m), rpy (rad, fixed axes x y z) of the tool, gripper 1 = open

What is converted, and what is not:
- rpy deltas become rotation vectors, rpy poses quaternions;
- the state's rpy is relative to a tool that points straight down; it is taken back to the pose of
  `ee_gripper_link` itself (`TOP_DOWN`), as SIMPLER senses it;
- the gripper's action is binarised: a value between open and closed means what it is on the way to;
- the first action of an episode is zero by construction and marked invalid where it is;
- movement stays what was commanded. With `BRIDGE_REACHED` (path::bridge_reached) it is what was
  reached, as Octo and OpenVLA relabel it: the pose difference to the next state; the last step then
  has no action. They subtract rpy angles; here it is the rotation between the poses, which on
  Octo's sample differs from that by up to 0.07 rad.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from selfflow.datasets.episodes import DatasetSpec, Signals
from selfflow.datasets.rotations import (
    canonical,
    compose,
    from_matrix,
    from_rpy,
    inverse,
    to_axis_angle,
)
from selfflow.datasets.spec import EMBODIMENTS

ACTION, STATE, LAST = "steps/action", "steps/observation/state", "steps/is_terminal"
# Orientation of ee_gripper_link, in the base frame, where the state's rpy is zero.
TOP_DOWN = from_matrix(np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]]))


def convert(numbers: dict[str, np.ndarray], instruction: list[str]) -> Signals:
    """Raw numbers of an episode, each (T, values), in the project's convention."""
    action, state = numbers[ACTION], numbers[STATE]
    arm, gripper = action[:, :6], binarise(action[:, 6])
    rotation = to_axis_angle(from_rpy(arm[:, 3:]))
    orientation = canonical(
        compose(from_rpy(state[:, 3:6]), np.broadcast_to(TOP_DOWN, (len(state), 4)))
    )
    valid = np.ones(len(action), bool)
    valid[0] = np.abs(arm[0]).max() > 1e-6
    actions = np.column_stack([arm[:, :3], rotation, gripper]).astype(np.float32)
    opening = state[:, 6:].clip(0, 1)
    return Signals(
        proprio=np.column_stack([state[:, :3], orientation, opening]).astype(np.float32),
        proprio_valid=np.ones(len(state), bool),
        actions=np.where(valid[:, None], actions, np.float32(0)),
        action_valid=valid,
        terminate=numbers[LAST][:, 0] > 0,
        instruction=instruction,
    )


def convert_reached(numbers: dict[str, np.ndarray], instruction: list[str]) -> Signals:
    """The same, moving by what was reached one step later instead of what was commanded."""
    signals, state = convert(numbers, instruction), numbers[STATE]
    pose = from_rpy(state[:, 3:6])
    turned = to_axis_angle(compose(pose[1:], inverse(pose[:-1])))
    moved = np.column_stack([np.diff(state[:, :3], axis=0), turned]).astype(np.float32)
    actions = np.column_stack([np.pad(moved, ((0, 1), (0, 0))), signals.actions[:, 6]])
    valid = signals.action_valid & (np.arange(len(state)) < len(state) - 1)
    return replace(
        signals, actions=np.where(valid[:, None], actions, np.float32(0)), action_valid=valid
    )


def binarise(opening: Float[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
    """0 or 1 at every step: above 0.95 open, below 0.05 closed, between them what comes next.

    After the last such step the one before holds; without any, the nearer one.
    """
    known = np.flatnonzero((opening > 0.95) | (opening < 0.05))
    if len(known) == 0:
        return (opening > 0.5).astype(np.float64)
    following = np.minimum(np.searchsorted(known, np.arange(len(opening))), len(known) - 1)
    return (opening[known[following]] > 0.5).astype(np.float64)


BRIDGE = DatasetSpec(
    embodiment=EMBODIMENTS["widowx"],
    cameras={
        "3rd_view_camera": "steps/observation/image_0",
        **{f"image_{n}": f"steps/observation/image_{n}" for n in range(4)},
    },
    instruction="steps/language_instruction",
    numbers={ACTION: 7, STATE: 7, LAST: 1},
    convert=convert,
)
BRIDGE_REACHED = replace(BRIDGE, convert=convert_reached)
