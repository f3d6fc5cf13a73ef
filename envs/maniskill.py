"""ManiSkill 3's own Bridge tasks behind the same contract as SIMPLER's: `make_maniskill(task)`.

Its physics, pictures and success rule, our observation and action (selfflow.datasets.spec). Needs
`pip install 'selfflow[maniskill]'`; importing this needs neither it nor SAPIEN.
"""

import importlib
import importlib.util
import logging
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float, Float32, UInt8

from selfflow.datasets.rotations import (
    canonical,
    compose,
    from_axis_angle,
    from_matrix,
    inverse,
    rotate,
    to_axis_angle,
    to_matrix,
)
from selfflow.datasets.spec import (
    ACTION_DIM,
    EMBODIMENTS,
    GRIPPER,
    POSITION,
    ROTATION,
    TOOL_POSITION,
    TOOL_QUATERNION,
    Task,
    UserError,
)
from selfflow.envs.base import RobotEnv
from selfflow.envs.bridge_tasks import PAIRS, Privileged, PutOnRules
from selfflow.envs.maniskill_assets import asset_folder, require
from selfflow.envs.sapien_render import DRAWING, require_renderer

IDS = {
    "widowx_carrot_on_plate": "PutCarrotOnPlateInScene-v1",
    "widowx_spoon_on_towel": "PutSpoonOnTableClothInScene-v1",
    "widowx_stack_cube": "StackGreenCubeOnYellowCubeBakedTexInScene-v1",
    "widowx_eggplant_in_basket": "PutEggplantInBasketScene-v1",
}
CAMERA, IMAGE = "3rd_view_camera", (480, 640)
CONTROL_MODE = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
FINGERS, FINGER_RANGE = slice(6, 8), (0.015, 0.037)  # joints, and m from the middle: closed, open
TOUCH = 1e-6  # N s, above which a contact counts in SIMPLER's rule
# How the eggplant lies in ManiSkill where SIMPLER's yaw is 0; the others start upright.
LYING = {"widowx_eggplant_in_basket": (0.559342, 0.817133, -0.138906, -0.0116353)}


def make_maniskill(task: Task, placement: str = "mild", pictures: bool = True) -> RobotEnv:
    """The task in ManiSkill 3's scene, on the CPU.

    | what | here |
    |---|---|
    | placement | as in SIMPLER: `grid` is trial seed mod 24, for the table tasks ManiSkill's episode id |
    | success | ManiSkill's; `progress["simpler_rule"]` is SIMPLER's on the same state |
    | instruction | ManiSkill's |
    | action | moves the controller's last target as SIMPLER does, not quite as ManiSkill does |

    Raises UserError where mani-skill, a Vulkan device or a file is missing.
    """  # noqa: E501
    if task.name not in IDS:
        raise UserError(
            f"task={task.name}: ManiSkill has none such; choose one of {', '.join(IDS)}"
        )
    scene = open_scene(task)
    task = replace(task, instructions=tuple(scene.get_language_instruction()))
    return ManiSkillEnv(ManiSkillSimulator(task, scene), task, placement, pictures)


def open_scene(task: Task, num_envs: int = 1, sim_backend: str = "cpu") -> Any:
    """ManiSkill's own environment of the task (`BaseBridgeEnv`), without wrappers. Raises UserError
    as make_maniskill."""
    _import_maniskill(task.name)
    torch = importlib.import_module("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about how the scene keeps its placements
        made = gymnasium.make(
            IDS[task.name],
            obs_mode="rgb+segmentation",
            control_mode=CONTROL_MODE,
            num_envs=num_envs,
            sim_backend=sim_backend,
            render_backend="gpu" if torch.cuda.is_available() else "cpu",
        )
    scene: Any = made.unwrapped
    DRAWING[scene] = os.getpid()
    # The photographs are an attribute of ManiSkill's class: a later scene would change this one's.
    scene._rgb_overlay_images = dict(scene._rgb_overlay_images)
    _forget_shading()
    return scene


def _forget_shading() -> None:
    """ManiSkill's shading and pixel formats are SAPIEN's for the whole process, and read when a
    camera is made: without this the next SIMPLER scene comes out in inverted colours."""
    render = importlib.import_module("sapien").render
    render.set_camera_shader_dir("default")
    for picture in ("Color", "ColorRaw", "PositionSegmentation"):
        render.set_picture_format(picture, "r32g32b32a32sfloat")


def _import_maniskill(task: str) -> None:
    if importlib.util.find_spec("mani_skill") is None:
        raise UserError(
            "backend=maniskill: mani-skill is not installed; type pip install 'selfflow[maniskill]'"
        )
    if "mani_skill" not in sys.modules:  # it reads the variable once
        folder = asset_folder()
        require(folder, task)
        os.environ["MS_ASSET_DIR"] = str(folder)
    require_renderer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = importlib.import_module("mani_skill")
        importlib.import_module("mani_skill.envs")  # registers the tasks
    require(Path(package.ASSET_DIR).parent, task)
    package.logger.setLevel(logging.ERROR)  # it warns at every reset


def to_controller(
    action: Float[np.ndarray, "*b 7"],
    tool: Float[np.ndarray, "*b 3"],
    target: Float[np.ndarray, "*b 3"],
) -> Float32[np.ndarray, "*b 7"]:
    """Our action as ManiSkill's controller takes it: m; angles a, b, c with the rotation
    Rx(a)·Ry(b)·Rz(c), base frame; gripper -1 closed, 1 open.

    SIMPLER's controller turns its target about the sensed `tool`, ManiSkill's of the same name
    turns it where it is; so what the target (base frame, m) would have moved is added. Replayed
    traces of the original then agree to 0.1 mm instead of 15 mm.
    """
    spin = from_axis_angle(action[..., ROTATION])
    move = action[..., POSITION] + tool + rotate(spin, target - tool) - target
    turn = to_matrix(spin)
    upright = np.hypot(turn[..., 0, 0], turn[..., 0, 1]) < 1e-6  # only a ± c is defined: c = 0
    a = np.where(
        upright,
        np.arctan2(turn[..., 2, 1], turn[..., 1, 1]),
        np.arctan2(-turn[..., 1, 2], turn[..., 2, 2]),
    )
    b = np.arcsin(np.clip(turn[..., 0, 2], -1.0, 1.0))
    c = np.where(upright, 0.0, np.arctan2(-turn[..., 0, 1], turn[..., 0, 0]))
    opening = 2 * action[..., GRIPPER] - 1
    return np.concatenate([move, np.stack([a, b, c, opening], axis=-1)], -1).astype(np.float32)


def proprio_of(tool: Float[np.ndarray, "n 7"], qpos: Float[np.ndarray, "n 8"]) -> np.ndarray:
    """Float32 (n, 8) proprioception of tool poses (base frame) and joints."""
    opening = np.interp(qpos[:, FINGERS].mean(-1), FINGER_RANGE, (0.0, 1.0))
    turn = canonical(tool[:, TOOL_QUATERNION])
    return np.concatenate([tool[:, TOOL_POSITION], turn, opening[:, None]], -1).astype(np.float32)


def start_poses(
    task: str, placement: dict[str, float], heights: Float[np.ndarray, "2"]
) -> tuple[Float[np.ndarray, "2 3"], Float[np.ndarray, "2 4"]]:
    """World positions and quaternions of source and target, dropped from these heights (m)."""
    places = [
        [placement[f"{role}_x"], placement[f"{role}_y"], float(height)]
        for role, height in zip(("source", "target"), heights, strict=True)
    ]
    yaw = from_axis_angle([0.0, 0.0, placement["source_yaw"]])
    upright = np.array([1.0, 0.0, 0.0, 0.0])
    return np.array(places), np.stack([compose(yaw, LYING.get(task, upright)), upright])


def drop_heights(scene: Any) -> Float[np.ndarray, "2"]:
    """From where ManiSkill drops source and target (m), the same in all of its episodes."""
    return scene.xyz_configs[0, :, 2].cpu().numpy().astype(np.float64)


class ManiSkillSimulator:
    """ManiSkill's scene as a `Simulator` (envs/base.py); a reset builds it anew, so that an episode
    repeats exactly."""

    backend = "maniskill"

    def __init__(self, task: Task, scene: Any) -> None:
        self.embodiment = EMBODIMENTS[task.embodiment]
        self.image_shapes = {CAMERA: IMAGE}
        self._task, self._env = task.name, scene
        self._heights = drop_heights(scene)

    def reset(self, placement: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
        """Source and target as placed (keys: envs/bridge_tasks.py); nothing else is random."""
        del rng
        torch = importlib.import_module("torch")
        xyz, turns = start_poses(self._task, placement, self._heights)
        self._env.xyz_configs = torch.tensor(xyz[None], dtype=torch.float32)
        self._env.quat_configs = torch.tensor(turns[None], dtype=torch.float32)
        options = {"reconfigure": True, "episode_id": torch.tensor([0])}
        observation, self._info = self._env.reset(seed=0, options=options)
        _forget_shading()
        self._picture: np.ndarray | None = _picture(observation)
        return {}

    def step(
        self, position: Float[np.ndarray, "3"], quaternion: Float[np.ndarray, "4"], opening: float
    ) -> bool:
        """Moves 1/5 s by the change of the sensed pose; False where the arm held for want of
        inverse kinematics."""
        torch = importlib.import_module("torch")
        sensed = self.proprio().astype(np.float64)
        action = np.zeros(ACTION_DIM)
        action[POSITION] = position - sensed[TOOL_POSITION]
        action[ROTATION] = to_axis_angle(compose(quaternion, inverse(sensed[TOOL_QUATERNION])))
        action[GRIPPER] = opening
        env, tool = self._env, sensed[TOOL_POSITION]
        wanted = self._arm.get_state()["target_pose"][0, :3].numpy().astype(np.float64)
        env.agent.set_action(torch.from_numpy(to_controller(action, tool, wanted)[None]))
        for _ in range(env.sim_freq // env.control_freq):
            env.agent.before_simulation_step()
            env.scene.step()
        self._info = env.get_info()
        self._picture = None
        arm = self._arm
        return arm._target_qpos is not arm._start_qpos  # ManiSkill says it in no other way

    def proprio(self) -> Float32[np.ndarray, "8"]:
        """Sensed tool position, quaternion wxyz with w >= 0 (base frame), gripper opening."""
        tool = self._arm.ee_pose_at_base.raw_pose.numpy().astype(np.float64)
        return proprio_of(tool, self._env.agent.robot.get_qpos().numpy())[0]

    def render(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """The camera's picture; drawn once a step, however often it is asked for."""
        if self._picture is None:
            self._picture = _picture(self._env.get_obs(self._info))
        return {CAMERA: self._picture.copy()}

    def privileged(self) -> dict[str, Float32[np.ndarray, "_"]]:
        """As envs/base.py says for WidowX, and "success" (1,): ManiSkill's own, 0 or 1."""
        pair, env = PAIRS[self._task], self._env
        source, target = env.objs[pair.source], env.objs[pair.target]
        base, wanted = env.agent.robot.pose, self._arm.get_state()["target_pose"]
        wanted_pose = type(base).create_from_pq(wanted[:, :3], wanted[:, 3:])
        poses = {
            "tool": self._arm.ee_pose,
            "base": base,
            "tool_target": base * wanted_pose,
            "source": source.pose,
            "target": target.pose,
        }
        state = {name: pose.raw_pose[0].numpy().copy() for name, pose in poses.items()}
        for pose in state.values():
            pose[3:] = canonical(pose[3:])
        for name, body in (("source", source), ("target", target)):
            state[f"{name}_centre"] = (body.pose * body.cmass_local_pose).p[0].numpy()
        state["source_grasped"] = env.agent.is_grasping(source).numpy()
        state["source_touches_other"] = np.array([self._touches_other(pair.source, pair.target)])
        state["success"] = self._info["success"].numpy()
        return {name: np.asarray(value, np.float32) for name, value in state.items()}

    def camera_info(self) -> dict[str, dict[str, np.ndarray]]:
        """Intrinsics, and the pose of the optical frame in the robot's base frame."""
        seen = self._env.get_sensor_params()[CAMERA]
        world = seen["extrinsic_cv"][0].numpy().astype(np.float64)  # world -> camera
        base = self._env.agent.robot.pose.raw_pose[0].numpy().astype(np.float64)
        to_base = inverse(base[3:])
        place = rotate(to_base, -world[:, :3].T @ world[:, 3] - base[:3])
        turn = canonical(compose(to_base, from_matrix(world[:, :3].T)))
        pose = np.concatenate([place, turn]).astype(np.float32)
        return {CAMERA: {"intrinsics": seen["intrinsic_cv"][0].numpy(), "pose": pose}}

    def close(self) -> None:
        """Frees the scene; a reset builds it again."""
        self._env.close()
        DRAWING.pop(self._env, None)

    @property
    def _arm(self) -> Any:
        return self._env.agent.controller.controllers["arm"]

    def _touches_other(self, source: str, target: str) -> bool:
        """Whether anything but the robot and the target presses on the source."""
        robot = {link.name for link in self._env.agent.robot.get_links()}
        for contact in self._env.scene.get_contacts():
            names = [body.entity.name.removeprefix("scene-0_") for body in contact.bodies]
            others = [name for name in names if name not in (source, target) and name not in robot]
            push = np.sum([point.impulse for point in contact.points], axis=0)
            if source in names and others and np.linalg.norm(push) > TOUCH:
                return True
        return False


def _picture(observation: dict[str, Any]) -> UInt8[np.ndarray, "H W 3"]:
    return observation["sensor_data"][CAMERA]["rgb"][0].numpy().astype(np.uint8)


class OwnRules(PutOnRules):
    """ManiSkill's success; SIMPLER's, on the same state, is the measure "simpler_rule"."""

    def step(self, privileged: Privileged, subtask: int) -> None:
        super().step(privileged, subtask)
        self._own = bool(privileged["success"][0])

    def success(self) -> bool:
        return self._own

    def progress(self) -> dict[str, float]:
        return super().progress() | {"simpler_rule": float(super().success())}


class ManiSkillEnv(RobotEnv):
    """RobotEnv with ManiSkill's verdict."""

    def __init__(
        self, simulator: ManiSkillSimulator, task: Task, placement: str, pictures: bool
    ) -> None:
        super().__init__(simulator, task, placement, pictures)
        self._rules = OwnRules(task)
