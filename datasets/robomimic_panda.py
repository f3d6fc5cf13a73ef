"""robomimic's demonstrations of a Panda in robosuite, 20 Hz: HDF5 (hdf5.py), one arm.

    actions                      (T, 7) in -1 .. 1: xyz, rotation vector, gripper +1 closes
    obs/robot0_eef_pos           xyz (m) of the grip site in the world frame
    obs/robot0_eef_quat          quaternion xyzw
    obs/robot0_gripper_qpos      (2) finger positions (m), 0.04 and -0.04 open
    dones                        1 after the action that ends the demonstration, or succeeds
    env_args/output_max          what an action of 1 means, said by the file
    model_file/robot0_base       where the robot stands, said by the demo's model

What is converted, and what is not:
- actions become metres and radians by the controller's own scale, clipped to it as the controller
  does; their axes are taken for the base's, with which the world's agree in the one-arm tasks;
- the pose is taken from the world into the base frame;
- gripper commands become opening targets, finger positions opening;
- the observation after an action that is done is terminal; the last one is where its own is done.
"""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float

from selfflow.datasets.episodes import DatasetSpec, Signals
from selfflow.datasets.rotations import canonical, compose, inverse, rotate
from selfflow.datasets.spec import Embodiment, UserError

ACTION, DONE = "actions", "dones"
POSITION, QUATERNION = "obs/robot0_eef_pos", "obs/robot0_eef_quat"
FINGERS, SCALE, BASE = "obs/robot0_gripper_qpos", "env_args/output_max", "model_file/robot0_base"
OPEN = 0.08  # m between the fingers
WXYZ = [3, 0, 1, 2]  # of xyzw
ROBOT = Embodiment(
    "panda_robosuite",
    20.0,
    ("agentview", "robot0_eye_in_hand"),
    "gripper0_grip_site",
    (0.05, 0.05, 0.05, 0.5, 0.5, 0.5, 1.0),
)
TEXTS = {  # of env_name
    "Lift": "lift the cube",
    "PickPlaceCan": "put the can into the bin",
    "NutAssemblySquare": "put the square nut on the peg",
    "ToolHang": "assemble the frame and hang the tool on it",
}


def convert(numbers: dict[str, np.ndarray], instruction: list[str]) -> Signals:
    """Raw numbers of a demonstration, each (T, values), in the project's convention."""
    action, base = numbers[ACTION], numbers[BASE]
    arm = action[:, :6].clip(-1, 1) * numbers[SCALE]
    opening_target = (action[:, 6] < 0).astype(np.float64)
    back = inverse(base[:, 3:])
    position = rotate(back, numbers[POSITION] - base[:, :3])
    turned = canonical(compose(back, canonical(numbers[QUATERNION][:, WXYZ])))
    fingers = numbers[FINGERS]
    opening = ((fingers[:, 0] - fingers[:, 1]) / OPEN).clip(0, 1)
    done = numbers[DONE][:, 0] > 0
    ended = np.append(False, done[:-1])
    ended[-1] |= done[-1]
    return Signals(
        proprio=np.column_stack([position, turned, opening]).astype(np.float32),
        proprio_valid=np.ones(len(action), bool),
        actions=np.column_stack([arm, opening_target]).astype(np.float32),
        action_valid=np.ones(len(action), bool),
        terminate=ended,
        instruction=[TEXTS.get(text, text) for text in instruction],
    )


def action_scale(env: dict[str, Any], path: Path) -> Float[np.ndarray, "6"]:
    """Metres and radians of a robosuite OSC_POSE action of 1: the controller's output_max.

    Raises UserError unless env_args names such a controller of deltas with symmetric limits.
    """
    cure = "say the scale of its actions in a spec of your own"
    controller = _controller(env.get("env_kwargs", {}).get("controller_configs"))
    if controller is None:
        raise UserError(f"{path}: env_args has no controller with output_max; {cure}")
    kind = controller.get("type")
    absolute = not controller.get("control_delta", controller.get("input_type") != "absolute")
    if kind != "OSC_POSE" or absolute:
        what = "absolute" if absolute else "delta"
        raise UserError(f"{path}: {what} actions of {kind} are no end-effector deltas; {cure}")
    limits = [np.asarray(controller[k], float) for k in ("input_max", "output_max")]
    lower = [np.asarray(controller[k], float) for k in ("input_min", "output_min")]
    if any(np.abs(low + high).max() > 1e-9 for low, high in zip(lower, limits, strict=True)):
        raise UserError(f"{path}: the controller's limits are not symmetric; {cure}")
    return np.broadcast_to(limits[1] / limits[0], 6)


def body_pose(model: str | None, body: str, path: Path) -> Float[np.ndarray, "7"]:
    """xyz and quaternion wxyz of a body that lies directly in the world of a MuJoCo model."""
    if model is None:
        raise UserError(f"{path}: no model_file, which would say where {body} stands")
    root = ElementTree.fromstring(model)
    found = root.find(f"./worldbody/body[@name='{body}']")
    if found is None:
        raise UserError(f"{path}: no body {body!r} in the world of its model_file")
    pose = f"{found.get('pos', '0 0 0')} {found.get('quat', '1 0 0 0')}"
    return np.array(pose.split(), np.float64)


def _controller(configs: Any) -> dict[str, Any] | None:
    """The first part with output_max: robosuite nests them by body part since 1.5."""
    if not isinstance(configs, dict):
        return None
    if "output_max" in configs:
        return configs
    return next((c for part in configs.values() if (c := _controller(part)) is not None), None)


ROBOMIMIC = DatasetSpec(
    embodiment=ROBOT,
    cameras={name: f"obs/{name}_image" for name in ROBOT.cameras},
    instruction="env_args/env_name",
    numbers={ACTION: 7, POSITION: 3, QUATERNION: 4, FINGERS: 2, DONE: 1, SCALE: 6, BASE: 7},
    convert=convert,
)
