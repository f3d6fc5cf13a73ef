"""Signals of arrays that a `Plan` describes: which values are poses, in what convention.

The actions of data come in four kinds; all become the project's, the delta from the sensed pose in
the robot's base frame (spec.py):

| kind | what the data hold | action t |
|---|---|---|
| delta | deltas of position and rotation | as it is, turned into the base frame |
| target | commanded poses | from the sensed pose of step t to the command; needs the state |
| target_steps | commanded poses | from the command before to the command; none at the first step |
| reached | no commands | from the sensed pose of step t to that of t + 1; none at the last step |

A row with a number that is not finite, or a quaternion that is no rotation, is not valid.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from selfflow.datasets import rotations
from selfflow.datasets.episodes import Signals, no_signals
from selfflow.datasets.fractal import WXYZ, absolute_gripper
from selfflow.datasets.spec import UserError

KINDS = ("delta", "target", "target_steps", "reached")
FRAMES = ("base", "tool")
ROTATIONS = {  # what a rotation may be given as -> its number of values
    "rotvec": 3,  # axis × angle
    "rpy": 3,  # roll, pitch, yaw about fixed axes x, y, z in turn
    "quat_xyzw": 4,
    "quat_wxyz": 4,
    "6d_columns": 6,  # first two columns of the matrix, one after the other
    "6d_rows": 6,  # its first two rows, as diffusion_policy, UMI and robomimic have it
}
Numbers = Mapping[str, np.ndarray]  # key -> (T, values)
Valid = Bool[np.ndarray, "T"]
Pose = tuple[Float[np.ndarray, "T 3"], Float[np.ndarray, "T 4"], Valid]  # position, wxyz, valid


@dataclass(frozen=True)
class Part:
    """Of the values that a step has under `key` those from `start` to before `stop`."""

    key: str
    start: int = 0
    stop: int | None = None  # None: to the last

    def of(self, numbers: Numbers) -> Float[np.ndarray, "T _"]:
        """These values of every step. Raises UserError if there are not so many."""
        values = numbers[self.key]
        stop = values.shape[1] if self.stop is None else self.stop
        if not self.start < stop <= values.shape[1]:
            raise UserError(
                f"{self.key}[{self.start}:{stop}]: the data have {values.shape[1]} values of "
                f"{self.key} a step; correct the spec"
            )
        return values[:, self.start : stop].astype(np.float64)


@dataclass(frozen=True)
class Gripper:
    """Where its value is, and what that is when the gripper is open and closed.

    A relative one commands motion: it goes towards `open` or `closed`, and 0 goes on as before.
    """

    part: Part
    open: float
    closed: float
    relative: bool = False


@dataclass(frozen=True)
class Arm:
    """Where pose and gripper of a state or an action are. A tool that never turns has no rotation,
    one without a gripper counts as open."""

    position: Part | None  # x, y, z, or only x, y
    rotation: Part | None
    gripper: Gripper | None
    rotation_as: str = "rotvec"
    position_unit: float = 1.0  # metres in one unit of the data
    rotation_unit: float = 1.0  # radians in one unit, of rotvec and rpy


@dataclass(frozen=True)
class Plan:
    """What of the data are state, action and the end; None where they have none."""

    state: Arm | None = None
    action: Arm | None = None
    kind: str = "delta"
    frame: str = "base"  # of a delta
    terminate: Part | None = None  # above 0.5: done
    ends_done: bool = False  # the last step terminates


def convert(plan: Plan, numbers: dict[str, np.ndarray], instruction: list[str]) -> Signals:
    """The described arrays of an episode, each (T, values), in the project's convention."""
    none, t = no_signals(instruction), len(instruction)
    proprio, proprio_valid = none.proprio, none.proprio_valid
    state = None if plan.state is None else pose(plan.state, numbers, t)
    if plan.state is not None and state is not None:
        opening, known = _opening(plan.state.gripper, numbers, t)
        proprio_valid = state[2] & known
        proprio = _rows(proprio_valid, state[0], rotations.canonical(state[1]), opening)
    actions, action_valid = none.actions, none.action_valid
    if plan.action is not None:
        position, turn, moves = _deltas(plan, plan.action, state, numbers, t)
        opening, known = _opening(plan.action.gripper, numbers, t)
        if plan.kind == "reached" and plan.action.gripper is None:  # what it came to
            opening = np.append(proprio[1:, -1], proprio[-1:, -1]).astype(np.float64)
            known = np.append(proprio_valid[1:], False)
        action_valid = moves & known
        actions = _rows(action_valid, position, turn, opening)
    terminate = np.zeros(t, bool)
    if plan.terminate is not None:
        terminate = plan.terminate.of(numbers)[:, 0] > 0.5
    if plan.ends_done:
        terminate[-1:] = True
    return Signals(proprio, proprio_valid, actions, action_valid, terminate, instruction)


def pose(arm: Arm, numbers: Numbers, t: int) -> Pose:
    """Position (m), quaternion and validity of every step; rows that are not valid are the
    identity."""
    position, quaternion, valid = np.zeros((t, 3)), np.eye(4)[np.zeros(t, int)], np.ones(t, bool)
    if arm.position is not None:
        given = arm.position.of(numbers) * arm.position_unit
        if given.shape[1] not in (2, 3):
            raise UserError(f"position: {given.shape[1]} values of {arm.position.key}; give 3 or 2")
        position[:, : given.shape[1]] = given
    if arm.rotation is not None:
        given = arm.rotation.of(numbers)
        if given.shape[1] != ROTATIONS[arm.rotation_as]:
            raise UserError(
                f"rotation: {given.shape[1]} values of {arm.rotation.key}, but "
                f"{arm.rotation_as} has {ROTATIONS[arm.rotation_as]}"
            )
        quaternion, valid = to_quaternion(given * arm.rotation_unit, arm.rotation_as)
    valid = valid & np.isfinite(position).all(axis=1)
    return (
        np.where(valid[:, None], position, 0),
        np.where(valid[:, None], quaternion, np.eye(4)[0]),
        valid,
    )


def to_quaternion(
    values: Float[np.ndarray, "T _"], given_as: str
) -> tuple[Float[np.ndarray, "T 4"], Valid]:
    """Unit quaternions wxyz of rotations given as one of ROTATIONS, and which rows are rotations.

    Of six numbers the second three are made perpendicular to the first (Gram-Schmidt).
    """
    finite = np.asarray(np.isfinite(values).all(axis=1))
    values = np.where(finite[:, None], values, 0)
    match given_as:
        case "rotvec":
            return rotations.from_axis_angle(values), finite
        case "rpy":
            return rotations.from_rpy(values), finite
        case "quat_xyzw" | "quat_wxyz":
            wxyz = values[:, WXYZ] if given_as == "quat_xyzw" else values
            valid = finite & np.asarray(np.abs(np.linalg.norm(wxyz, axis=1) - 1) < 0.05)
            return rotations.canonical(np.where(valid[:, None], wxyz, np.eye(4)[0])), valid
    first, second = values[:, :3], values[:, 3:]
    length = np.linalg.norm(first, axis=1)
    x = first / np.maximum(length, 1e-9)[:, None]
    rest = second - np.sum(x * second, axis=1, keepdims=True) * x
    over = np.linalg.norm(rest, axis=1)
    valid = finite & (length > 1e-6) & (over > 1e-6)
    y = rest / np.maximum(over, 1e-9)[:, None]
    columns = np.stack([x, y, np.cross(x, y)], axis=-1)
    matrix = columns if given_as == "6d_columns" else np.swapaxes(columns, -1, -2)
    return rotations.from_matrix(np.where(valid[:, None, None], matrix, np.eye(3))), valid


def pose_deltas(
    before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]
) -> tuple[Float[np.ndarray, "T 3"], Float[np.ndarray, "T 3"]]:
    """Displacement and rotation vector, in the base frame, from (positions, quaternions) to others.

    p + d and exp(r)·q lead back from the one to the other.
    """
    turn = rotations.compose(after[1], rotations.inverse(before[1]))
    return after[0] - before[0], rotations.to_axis_angle(turn)


def _deltas(
    plan: Plan, arm: Arm, state: Pose | None, numbers: Numbers, t: int
) -> tuple[np.ndarray, np.ndarray, Valid]:
    """Displacement, rotation vector and validity of every step's action."""
    if state is None and (plan.kind in ("target", "reached") or plan.frame == "tool"):
        raise UserError("state: is needed to make deltas of these actions; describe it in the spec")
    if plan.kind == "reached" and state is not None:
        moved, turned = pose_deltas((state[0][:-1], state[1][:-1]), (state[0][1:], state[1][1:]))
        none = np.zeros((1, 3))
        valid = np.append(state[2][:-1] & state[2][1:], False)
        return np.concatenate([moved, none]), np.concatenate([turned, none]), valid
    p, q, valid = pose(arm, numbers, t)
    if plan.kind == "target" and state is not None and plan.state is not None:
        moved, turned = pose_deltas(state[:2], (p, q))
        if _axes(plan.state, numbers) < _axes(arm, numbers):
            raise UserError("action.position: has a z, but the state has only x and y")
        moved[:, _axes(arm, numbers) :] = 0  # what is not commanded stays
        return moved, turned * (arm.rotation is not None), valid & state[2]
    if plan.kind == "target_steps":
        at = np.maximum(np.arange(t) - 1, 0)
        return *pose_deltas((p[at], q[at]), (p, q)), valid & valid[at] & (np.arange(t) > 0)
    turn = rotations.to_axis_angle(q)
    if plan.frame == "tool" and state is not None:
        return rotations.rotate(state[1], p), rotations.rotate(state[1], turn), valid & state[2]
    return p, turn, valid


def _axes(arm: Arm, numbers: Numbers) -> int:
    """How many values its position has."""
    return 0 if arm.position is None else arm.position.of(numbers).shape[1]


def _opening(gripper: Gripper | None, numbers: Numbers, t: int) -> tuple[np.ndarray, Valid]:
    """Opening of every step, 1 = open, and which are known."""
    if gripper is None:
        return np.ones(t), np.ones(t, bool)
    values = gripper.part.of(numbers)[:, 0]
    known = np.isfinite(values)
    values = np.where(known, values, gripper.open)
    if gripper.relative:
        return absolute_gripper(values / gripper.closed), known
    return ((values - gripper.closed) / (gripper.open - gripper.closed)).clip(0, 1), known


def _rows(valid: Valid, *columns: np.ndarray) -> np.ndarray:
    return np.where(valid[:, None], np.column_stack(columns), 0).astype(np.float32)
