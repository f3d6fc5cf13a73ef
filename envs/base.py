"""One gymnasium.Env for every simulator: task rules and conventions above, physics below.

`RobotEnv` turns a policy's action into a tool target, counts clipped actions, keeps the subtask and
its instruction, and judges success; a `Simulator` only moves, senses and draws. So a task means the
same in the twin and in SIMPLER. Conventions: selfflow.datasets.spec.
"""

from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np

from selfflow.datasets.rotations import canonical, compose, from_axis_angle
from selfflow.datasets.spec import (
    ACTION_DIM,
    GRIPPER,
    POSITION,
    ROTATION,
    TOOL_POSITION,
    TOOL_QUATERNION,
    Embodiment,
    Observation,
    Task,
)
from selfflow.envs.instruction_space import Instruction
from selfflow.envs.tasks import RULES, draw_placement, instruction, rules_of

Info = dict[str, Any]

_PROPRIO_BOUNDS = (  # position within 10 m, unit quaternion with w >= 0, opening
    np.array([-10, -10, -10, 0, -1.01, -1.01, -1.01, 0], np.float32),
    np.array([10, 10, 10, 1.01, 1.01, 1.01, 1.01, 1], np.float32),
)


@runtime_checkable  # so that beartype can check arguments in tests
class Simulator(Protocol):
    """A robot in a scene. Poses are xyz + wxyz in metres; the tool's in the robot's base frame."""

    embodiment: Embodiment
    backend: str  # "mujoco", "simpler", ...
    image_shapes: dict[str, tuple[int, int]]  # camera name -> (height, width)

    def reset(self, placement: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
        """Rebuilds the start state; returns every further random draw by name."""
        ...

    def step(self, position: np.ndarray, quaternion: np.ndarray, opening: float) -> bool:
        """Moves for one control step towards a tool pose and gripper opening; False if the pose has
        no inverse kinematics and the arm held still instead."""
        ...

    def proprio(self) -> np.ndarray:
        """Sensed float32 (8,): tool position, quaternion wxyz with w >= 0, gripper opening."""
        ...

    def render(self) -> dict[str, np.ndarray]:
        """uint8 (H, W, 3) by camera name."""
        ...

    def privileged(self) -> dict[str, np.ndarray]:
        """State for evaluation only, float32 arrays of fixed shape, world frame:
        "tool" (7,), "base" (7,) poses. Drawer tasks: "drawers" (3,) openings of top, middle, bottom
        in m; "apple" (7,); "apple_grasped" (1,) and "apple_on_drawer_floor" (1,) 0 or 1, read at
        this step. Table tasks: "objects" (n, 7), the one to move first; "radii" (n,) in m;
        "grasped" (1,) and "touches" (1,), which something but the robot, of the first. WidowX:
        "tool_target", "source", "target" (7,), "source_centre", "target_centre" (3,),
        "source_grasped" and "source_touches_other" (1,)."""
        ...

    def camera_info(self) -> dict[str, dict[str, np.ndarray]]:
        """By camera: "intrinsics" (3, 3) and "pose" (7,) of the optical frame (x right, y down,
        z forward) in the robot's base frame."""
        ...

    def close(self) -> None: ...


class RobotEnv(gymnasium.Env):
    """A task in a simulator.

    | step of an episode | rule |
    |---|---|
    | target | sensed position + delta, exp(delta rotation) · sensed orientation, base frame |
    | action out of range | clipped, counted in `info["clipped"]` |
    | action not finite or of wrong shape | ValueError |
    | next subtask | by `advance_subtask()` (policy said terminate) or at `Task.force_advance_at` |
    | reward, success | 1.0 where `info["success"]` holds at this step, else 0.0 |
    | terminated | never: the official result is the last step's |
    | truncated | at `Task.max_steps` |

    `config` is the `Config` of the task's file (envs/tasks.py), None for its `default_config()`.
    With `pictures=False` an observation has no images, and only `render()` draws. Who does not look
    at every step may switch `pictures` off and on amid an episode, and `observe()` when it does.
    `reset(seed=s, options={"placement": {...}})` overrides single entries of the drawn placement.
    `info` at every step: success, subtask, privileged, progress, and clipped and ik_failed, counted
    so far; at reset also task, backend, seed, draws (every random draw by name) and cameras, which
    do not move in an episode (`Simulator.camera_info`).
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  (gymnasium's form)

    def __init__(
        self,
        simulator: Simulator,
        task: Task,
        placement: str = "mild",
        pictures: bool = True,
        config: Any = None,
    ) -> None:
        if task.name not in RULES:
            raise ValueError(f"{task.name} has no rules yet; have: {', '.join(RULES)}")
        self.simulator, self.task, self.placement = simulator, task, placement
        self.pictures = pictures
        self.embodiment = simulator.embodiment
        self.render_mode = "rgb_array"
        self.metadata = {**self.metadata, "render_fps": self.embodiment.control_hz}
        self._config, self._rules = config, rules_of(task, config)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "images": gymnasium.spaces.Dict(
                    {
                        name: gymnasium.spaces.Box(0, 255, (h, w, 3), np.uint8)
                        for name, (h, w) in simulator.image_shapes.items()
                        if pictures
                    }
                ),
                "proprio": gymnasium.spaces.Box(*_PROPRIO_BOUNDS, dtype=np.float32),
                "instruction": Instruction(),
            }
        )
        high = np.array(self.embodiment.limits, np.float32)
        low = np.where(np.arange(ACTION_DIM) == GRIPPER, 0, -high).astype(np.float32)
        self._running = False  # between reset and close
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)

    def with_config(self, config: Any) -> "RobotEnv":
        """The same simulator's, with another config of the task; None is the default one."""
        return RobotEnv(self.simulator, self.task, self.placement, self.pictures, config)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[Observation, Info]:
        """Starts an episode that `seed` fixes entirely."""
        super().reset(seed=seed)
        rng = self.np_random if seed is None else np.random.default_rng(seed)
        placement = draw_placement(self.task, self.placement, rng, seed, self._config)
        given = (options or {}).get("placement", {})
        if not given.keys() <= placement.keys():
            unknown = ", ".join(sorted(given.keys() - placement.keys()))
            raise ValueError(f"placement: no such entry {unknown}; have {', '.join(placement)}")
        placement |= given
        draws = placement | self.simulator.reset(placement, rng)
        self._start, self._running = placement, True
        self._steps = self._clipped = self._ik_failed = self.subtask = 0
        self._rules.reset(self.simulator.privileged())
        info = self._info() | {
            "task": self.task.name,
            "backend": self.simulator.backend,
            "seed": seed,
            "draws": draws,
            "cameras": self.simulator.camera_info(),
        }
        return self.observe(), info

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, Info]:
        """One control step; see the class for the rules."""
        if not self._running:
            raise RuntimeError("reset() comes first")
        action = np.asarray(action, np.float64)
        if action.shape != (ACTION_DIM,) or not np.all(np.isfinite(action)):
            raise ValueError(f"an action is {ACTION_DIM} finite numbers, got {action!r}")
        action, clipped = self.embodiment.clip(action)
        sensed = self.simulator.proprio().astype(np.float64)
        reached = self.simulator.step(
            sensed[TOOL_POSITION] + action[POSITION],
            canonical(compose(from_axis_angle(action[ROTATION]), sensed[TOOL_QUATERNION])),
            float(action[GRIPPER]),
        )
        self._steps += 1
        self._clipped += clipped
        self._ik_failed += not reached
        if self._steps == self.task.force_advance_at and not self.final_subtask:
            self.subtask += 1
        self._rules.step(self.simulator.privileged(), self.subtask)
        info = self._info()
        truncated = self._steps >= self.task.max_steps
        return self.observe(), float(info["success"]), False, truncated, info

    @property
    def final_subtask(self) -> bool:
        """Whether the present subtask is the task's last."""
        return self.subtask == len(self.task.instructions) - 1

    def advance_subtask(self) -> Observation:
        """The policy says the subtask is done; returns the observation with the new instruction."""
        if self.final_subtask:
            raise ValueError("the last subtask has no next one: end the episode instead")
        self.subtask += 1
        return self.observe()

    def observe(self, pictures: bool | None = None) -> Observation:
        """The present observation, with images if `pictures`; None: as `self.pictures` says."""
        drawn = self.pictures if pictures is None else pictures
        return {
            "images": self.simulator.render() if drawn else {},
            "proprio": np.asarray(self.simulator.proprio(), np.float32),
            "instruction": instruction(self.task, self.subtask, self._start),
        }

    def render(self) -> np.ndarray:
        """The first camera's picture."""
        return self.simulator.render()[self.embodiment.cameras[0]]

    def close(self) -> None:
        """Frees the simulator and its renderer."""
        self._running = False
        self.simulator.close()

    def _info(self) -> Info:
        return {
            "success": self._rules.success(),
            "subtask": self.subtask,
            "privileged": self.simulator.privileged(),
            "progress": self._rules.progress(),
            "clipped": self._clipped,
            "ik_failed": self._ik_failed,
        }
