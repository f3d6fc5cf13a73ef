"""The embedded MuJoCo twin behind the Simulator protocol of selfflow.envs.base.

    env = make_mujoco(task_named("open_drawer_place"))          # a gymnasium.Env
    observation, info = env.reset(seed=0)

The arm follows SIMPLER's rule: the commanded tool pose goes through inverse kinematics and a
jerk-limited joint path that starts where the last one was cut; without a solution the arm holds.
"""

# mujoco's names live in binary modules without stubs.
# pyright: reportAttributeAccessIssue=false

import mujoco
import numpy as np

from selfflow.datasets.rotations import canonical, compose, from_axis_angle, inverse, rotate
from selfflow.datasets.spec import EMBODIMENTS, Task
from selfflow.envs import twin_scene as scene
from selfflow.envs.base import RobotEnv
from selfflow.envs.tasks import DRAWERS
from selfflow.envs.trajectory import JerkLimited
from selfflow.envs.twin_render import Renderer, asked_renderer, make_renderer

IK_STEPS, IK_DAMPING, IK_REST, IK_STRIDE = 60, 1e-4, 0.05, 0.3  # the stride in rad per joint
IK_POSITION, IK_ROTATION = 1e-3, 5e-3  # accepted residual, m and rad


class TwinScene:
    """The Google robot at the cabinet, in MuJoCo. One model and one renderer for all episodes."""

    backend = "mujoco"
    embodiment = EMBODIMENTS["google_robot"]

    def __init__(self, image_size: tuple[int, int] = (128, 160), apple: bool = True) -> None:
        self.image_shapes = {"overhead_camera": image_size}
        self._has_apple = apple
        self.model = scene.build(*image_size)
        self.data, self._ik_data = mujoco.MjData(self.model), mujoco.MjData(self.model)
        self._renderer: Renderer | None = None  # opened with the first picture
        model = self.model
        self._qpos = np.array([model.joint(n).qposadr[0] for n in scene.ARM_JOINTS])
        self._dofs = np.array([model.joint(n).dofadr[0] for n in scene.ARM_JOINTS])
        self._fingers = np.array(
            [model.joint(n).qposadr[0] for n in ("finger_right", "finger_left")]
        )
        self._drawers = np.array([model.joint(f"drawer_{d}").qposadr[0] for d in DRAWERS])
        self._apple = model.joint("apple").qposadr[0]
        self._tcp = model.site("tcp").id
        self._arm_path = JerkLimited(
            len(scene.ARM_JOINTS), velocity=1.5, acceleration=2.0, jerk=50.0
        )
        # SIMPLER's finger limits (1.0, 7, 50 rad over a 1.31 rad stroke), as openings per second.
        self._finger_path = JerkLimited(1, velocity=1 / 1.31, acceleration=7 / 1.31, jerk=50 / 1.31)
        self._times = (np.arange(scene.SUBSTEPS) + 1) * scene.TIMESTEP

    def reset(self, placement: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
        data = self.data
        mujoco.mj_resetData(self.model, data)
        yaw = placement["robot_yaw"]
        data.mocap_pos[0] = placement["robot_x"], placement["robot_y"], scene.BASE_HEIGHT
        data.mocap_quat[0] = compose(from_axis_angle([0, 0, yaw]), [0, 0, 0, 1])
        data.qpos[self._qpos] = scene.HOME
        data.qpos[self._drawers] = [placement[f"drawer_{d}"] for d in DRAWERS]
        turn = float(rng.uniform(-np.pi, np.pi))
        x, y = (placement["apple_x"], placement["apple_y"]) if self._has_apple else (-3.0, 0.0)
        z = 0.882 + 0.93 * scene.APPLE_RADIUS + 0.001 if self._has_apple else 0.06
        data.qpos[self._apple : self._apple + 7] = [x, y, z, *from_axis_angle([0, 0, turn])]
        self._arm_path.reset(scene.HOME)
        self._finger_path.reset(np.ones(1))
        self._drive(scene.HOME, 1.0)
        mujoco.mj_step(self.model, data, nstep=60)
        return {"apple_turn": turn}

    def step(self, position: np.ndarray, quaternion: np.ndarray, opening: float) -> bool:
        start = self.data.qpos[self._qpos].copy()
        solution = self._solve(position, quaternion, start)
        arm, _ = self._arm_path.plan(start if solution is None else solution, self._times)
        fingers, _ = self._finger_path.plan(np.array([opening]), self._times)
        for joints, finger in zip(arm, fingers[:, 0], strict=True):
            self._drive(joints, finger)
            mujoco.mj_step(self.model, self.data)
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        return solution is not None

    def proprio(self) -> np.ndarray:
        base_p, base_q = self.data.mocap_pos[0], self.data.mocap_quat[0]
        p = rotate(inverse(base_q), self.data.site_xpos[self._tcp] - base_p)
        q = canonical(compose(inverse(base_q), self._tool_quaternion()))
        opening = 1 - self.data.qpos[self._fingers].mean() / scene.FINGER_TRAVEL
        return np.array([*p, *q, np.clip(opening, 0, 1)], np.float32)

    def render(self) -> dict[str, np.ndarray]:
        if self._renderer is None:
            self._renderer = make_renderer(self.model, *self.image_shapes["overhead_camera"])
        renderer = self._renderer
        return {name: renderer.render(self.data, name) for name in self.image_shapes}

    def privileged(self) -> dict[str, np.ndarray]:
        d = self.data
        touching = self._contacts()
        grasped = all(("apple", f"{f}_tip") in touching or ("apple", f"{f}_bar") in touching
                      for f in ("finger_right", "finger_left"))  # fmt: skip
        state = {
            "drawers": d.qpos[self._drawers],
            "apple": d.qpos[self._apple : self._apple + 7] if self._has_apple else np.zeros(7),
            "tool": [*d.site_xpos[self._tcp], *canonical(self._tool_quaternion())],
            "base": [*d.mocap_pos[0], *canonical(d.mocap_quat[0])],
            "apple_grasped": [grasped],
            "apple_on_drawer_floor": [("apple", "floor_top") in touching],
        }
        return {name: np.array(value, np.float32) for name, value in state.items()}

    def camera_info(self) -> dict[str, dict[str, np.ndarray]]:
        info = {}
        base_p, base_q = self.data.mocap_pos[0], self.data.mocap_quat[0]
        for name, (height, width) in self.image_shapes.items():
            camera = self.model.camera(name).id
            f = height / 2 / np.tan(np.radians(self.model.cam_fovy[camera]) / 2)
            q = np.zeros(4)
            mujoco.mju_mat2Quat(q, self.data.cam_xmat[camera])
            optical = compose(q, [0, 1, 0, 0])  # MuJoCo looks along -z with y up
            p = rotate(inverse(base_q), self.data.cam_xpos[camera] - base_p)
            info[name] = {
                "intrinsics": np.array(
                    [[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]], np.float32
                ),
                "pose": np.array([*p, *canonical(compose(inverse(base_q), optical))], np.float32),
            }
        return info

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _drive(self, joints: np.ndarray, opening: float) -> None:
        self.data.ctrl[: len(joints)] = joints
        self.data.ctrl[len(joints) :] = (1 - opening) * scene.FINGER_TRAVEL

    def _tool_quaternion(self) -> np.ndarray:
        q = np.zeros(4)
        mujoco.mju_mat2Quat(q, self.data.site_xmat[self._tcp])
        return q

    def _contacts(self) -> set[tuple[str, str]]:
        names = set()
        for contact in self.data.contact[: self.data.ncon]:
            if contact.dist < 1e-4:
                a, b = (self.model.geom(g).name for g in contact.geom)
                names |= {(a, b), (b, a)}
        return names

    def _solve(
        self, position: np.ndarray, quaternion: np.ndarray, start: np.ndarray
    ) -> np.ndarray | None:
        """Joints for a base-frame tool pose by damped least squares; None if it fails."""
        data, model = self._ik_data, self.model
        base_p, base_q = self.data.mocap_pos[0], self.data.mocap_quat[0]
        goal_p, goal_q = base_p + rotate(base_q, position), compose(base_q, quaternion)
        data.mocap_pos[:], data.mocap_quat[:] = self.data.mocap_pos, self.data.mocap_quat
        q, now, error = start.copy(), np.zeros(4), np.zeros(6)
        jacobian = np.zeros((6, model.nv))
        for _ in range(IK_STEPS):
            data.qpos[self._qpos] = q
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            error[:3] = goal_p - data.site_xpos[self._tcp]
            mujoco.mju_mat2Quat(now, data.site_xmat[self._tcp])
            mujoco.mju_subQuat(error[3:], goal_q, now)
            error[3:] = rotate(now, error[3:])  # subQuat is in the tool's frame
            mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], self._tcp)
            j = jacobian[:, self._dofs]
            jj = j @ j.T + IK_DAMPING * np.eye(6)
            if np.linalg.norm(error[:3]) < IK_POSITION and np.linalg.norm(error[3:]) < IK_ROTATION:
                return q
            rest = IK_REST * (scene.HOME - q)
            dq = j.T @ np.linalg.solve(jj, error) + rest - j.T @ np.linalg.solve(jj, j @ rest)
            q = q + np.clip(
                dq, -IK_STRIDE, IK_STRIDE
            )  # no limits, as SIMPLER's: the joint stops it
        return None


def make_mujoco(
    task: Task,
    placement: str = "mild",
    image_size: tuple[int, int] = (128, 160),
    pictures: bool = True,
) -> RobotEnv:
    """The twin as a gymnasium environment for one of the tasks it has rules for. OpenGL is opened
    with the first picture, so that a process which draws none may be forked."""
    asked_renderer()  # a wrong choice is told now
    twin = TwinScene(image_size, apple=task.name == "open_drawer_place")
    return RobotEnv(twin, task, placement, pictures)
