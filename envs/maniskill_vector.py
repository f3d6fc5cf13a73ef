"""Many of ManiSkill's scenes at once, simulated and drawn on one graphics card.

    envs = make_maniskill_vector(task_named("widowx_carrot_on_plate"), num_envs=64)
    observation, info = envs.reset(seed=200000)
    observation, rewards, terminated, truncated, info = envs.step(actions)   # (64, 7)

Observation, action and success are those of `make_maniskill`, with a first axis over scenes.
"""

import importlib
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import batch_space
from jaxtyping import Float, Shaped

from selfflow.datasets.spec import ACTION_DIM, Task, UserError
from selfflow.envs.base import Info
from selfflow.envs.maniskill import (
    CAMERA,
    ManiSkillEnv,
    ManiSkillSimulator,
    drop_heights,
    open_scene,
    proprio_of,
    start_poses,
    to_controller,
)
from selfflow.envs.tasks import draw_placement

Batch = dict[str, Any]


def make_maniskill_vector(
    task: Task, num_envs: int, placement: str = "grid", sim_backend: str = "gpu"
) -> "ManiSkillVector":
    """num_envs scenes of the task; sim_backend "cpu" has one only. Raises UserError as
    make_maniskill, and where there is no CUDA device."""
    if sim_backend == "cpu" and num_envs != 1:
        raise UserError(f"num_envs={num_envs}: sim_backend=cpu has one scene; use processes")
    if sim_backend != "cpu" and not importlib.import_module("torch").cuda.is_available():
        raise UserError(
            f"sim_backend={sim_backend}: no CUDA device; on the CPU use "
            "python eval/simpler_rollout.py backend=maniskill workers=2"
        )
    return ManiSkillVector(task, open_scene(task, num_envs, sim_backend), placement)


class ManiSkillVector(gymnasium.vector.VectorEnv):
    """Scenes in step with each other: all are truncated at `Task.max_steps` and none is reset of
    itself. Scene i of `reset(seed=s)` is the episode of seed s + i.

    `info` at every step, arrays over scenes: success (ManiSkill's), clipped (actions so far) and
    ManiSkill's own measures; at reset also draws, a list of placements.
    """

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(self, task: Task, scene: Any, placement: str = "grid") -> None:
        self.task, self.placement, self.num_envs = task, placement, int(scene.num_envs)
        single = ManiSkillEnv(ManiSkillSimulator(task, scene), task, placement, pictures=True)
        self.single_observation_space = single.observation_space
        self.single_action_space = single.action_space
        self.observation_space = batch_space(single.observation_space, self.num_envs)
        self.action_space = batch_space(single.action_space, self.num_envs)
        self._scene, self._heights = scene, drop_heights(scene)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict | None = None
    ) -> tuple[Batch, Info]:
        """Starts num_envs episodes; a list of seeds gives each its own."""
        if options:
            raise ValueError(f"options={options}: all scenes are reset together, without any")
        if isinstance(seed, int):
            seed = [seed + i for i in range(self.num_envs)]
        seeds = seed or [None] * self.num_envs
        draws = [
            draw_placement(self.task, self.placement, np.random.default_rng(s), s) for s in seeds
        ]
        self._place(draws)
        self._steps, self._clipped = 0, np.zeros(self.num_envs, np.int64)
        n = self.num_envs  # episode i * n + i takes position i and quaternion i
        episodes = importlib.import_module("torch").arange(n, device=self._scene.device) * (n + 1)
        observation, info = self._scene.reset(seed=0, options={"episode_id": episodes})
        return self._observe(observation), self._info(info) | {"draws": draws}

    def step(
        self, actions: Float[np.ndarray, "n 7"]
    ) -> tuple[Batch, np.ndarray, np.ndarray, np.ndarray, Info]:
        """One control step of all scenes. Raises ValueError for an action that is not finite."""
        wanted = np.asarray(actions, np.float64)
        if wanted.shape != (self.num_envs, ACTION_DIM) or not np.all(np.isfinite(wanted)):
            raise ValueError(f"actions are ({self.num_envs}, {ACTION_DIM}) finite numbers")
        space = self.single_action_space
        assert isinstance(space, gymnasium.spaces.Box)
        clipped = np.clip(wanted, space.low.astype(np.float64), space.high.astype(np.float64))
        self._clipped += np.any(np.abs(clipped - wanted) > 1e-9, axis=1)
        torch = importlib.import_module("torch")
        tool, target = (pose[:, :3] for pose in self._tool_poses())
        moved = torch.from_numpy(to_controller(clipped, tool, target)).to(self._scene.device)
        observation, _, _, _, info = self._scene.step(moved)
        self._steps += 1
        told = self._info(info)
        ended = np.full(self.num_envs, self._steps >= self.task.max_steps)
        return (
            self._observe(observation),
            told["success"].astype(np.float64),
            np.zeros(self.num_envs, bool),
            ended,
            told,
        )

    def close_extras(self, **kwargs: Any) -> None:
        """Frees the scenes."""
        self._scene.close()

    def _place(self, draws: list[dict[str, float]]) -> None:
        torch, device = importlib.import_module("torch"), self._scene.device
        poses = [start_poses(self.task.name, draw, self._heights) for draw in draws]
        xyz, turns = (np.stack(part).astype(np.float32) for part in zip(*poses, strict=True))
        self._scene.xyz_configs = torch.from_numpy(xyz).to(device)
        self._scene.quat_configs = torch.from_numpy(turns).to(device)

    def _observe(self, observation: Batch) -> Batch:
        scene, (tool, _) = self._scene, self._tool_poses()
        qpos = scene.agent.robot.get_qpos()
        pictures = observation["sensor_data"][CAMERA]["rgb"].cpu().numpy()
        return {
            "images": {CAMERA: pictures.astype(np.uint8)},
            "proprio": proprio_of(tool, qpos.cpu().numpy()),
            "instruction": tuple(scene.get_language_instruction()),
        }

    def _tool_poses(self) -> tuple[Float[np.ndarray, "n 7"], Float[np.ndarray, "n 7"]]:
        """Sensed and commanded, base frame."""
        arm = self._scene.agent.controller.controllers["arm"]
        both = (arm.ee_pose_at_base.raw_pose, arm.get_state()["target_pose"])
        sensed, target = (pose.cpu().numpy().astype(np.float64) for pose in both)
        return sensed, target

    def _info(self, info: Info) -> dict[str, Shaped[np.ndarray, "n"]]:
        names = ("success", "src_on_target", "is_src_obj_grasped", "consecutive_grasp")
        told = {name: info[name].cpu().numpy().copy() for name in names}
        return told | {"clipped": self._clipped.copy()}
