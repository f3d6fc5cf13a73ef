"""The twin's robot behind the Simulator protocol of selfflow.envs.base, whatever stands before it.

The arm follows SIMPLER's rule: the commanded tool pose goes through inverse kinematics and a
jerk-limited joint path that starts where the last one was cut; without a solution the arm holds.
"""

# mujoco's names live in binary modules without stubs.
# pyright: reportAttributeAccessIssue=false

import mujoco
import numpy as np

from selfflow.datasets.rotations import canonical, compose, from_axis_angle, inverse, rotate
from selfflow.datasets.spec import EMBODIMENTS
from selfflow.envs import twin_body as robot
from selfflow.envs.trajectory import JerkLimited
from selfflow.envs.twin_mesh import Fingers, Photo
from selfflow.envs.twin_random import Nominal, Randomise, apply, draw
from selfflow.envs.twin_render import Renderer, make_renderer
from selfflow.envs.twin_scene import SUBSTEPS, TIMESTEP

IK_STEPS, IK_DAMPING, IK_REST, IK_STRIDE = 60, 1e-4, 0.05, 0.3  # the stride in rad per joint
IK_POSITION, IK_ROTATION = 1e-3, 5e-3  # accepted residual, m and rad
FINGERS = ("finger_right", "finger_left")


class TwinRobot:
    """The Google robot in MuJoCo. One model and one renderer for all episodes; subclasses place
    what it handles (`_place`), let it come to rest (`_settle`) and say where it is."""

    backend = "mujoco"
    embodiment = EMBODIMENTS["google_robot"]

    def __init__(self, model: mujoco.MjModel, size: tuple[int, int], randomise: Randomise) -> None:
        self.image_shapes = {"overhead_camera": size}
        self.model, self._randomise, self._nominal = model, randomise, Nominal(model)
        self.data, self._ik_data = mujoco.MjData(model), mujoco.MjData(model)
        self._renderer: Renderer | None = None  # opened with the first picture
        self.fingers: Fingers | None = None  # of the original meshes, where these are shown
        self.photo: Photo | None = None
        self._qpos = np.array([model.joint(n).qposadr[0] for n in robot.ARM_JOINTS])
        self._dofs = np.array([model.joint(n).dofadr[0] for n in robot.ARM_JOINTS])
        self._fingers = np.array([model.joint(n).qposadr[0] for n in FINGERS])
        self._tcp = model.site("tcp").id
        self._arm_path = JerkLimited(
            len(robot.ARM_JOINTS), velocity=1.5, acceleration=2.0, jerk=50.0
        )
        # SIMPLER's finger limits (1.0, 7, 50 rad over a 1.31 rad stroke), as openings per second.
        self._finger_path = JerkLimited(1, velocity=1 / 1.31, acceleration=7 / 1.31, jerk=50 / 1.31)
        self._times = (np.arange(SUBSTEPS) + 1) * TIMESTEP
        self._late: list[tuple[np.ndarray, float]] = []  # commands on their way to the motors

    def reset(self, placement: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
        self._nominal.restore()
        data = self.data
        mujoco.mj_resetData(self.model, data)
        yaw = placement["robot_yaw"]
        data.mocap_pos[0] = placement["robot_x"], placement["robot_y"], robot.BASE_HEIGHT
        data.mocap_quat[0] = compose(from_axis_angle([0, 0, yaw]), [0, 0, 0, 1])
        data.qpos[self._qpos] = robot.HOME
        drawn = self._place(placement, rng)
        drawn |= draw(self._randomise, self.model, rng)
        if self._randomise != Randomise():
            apply(self.model, drawn)
        self._arm_path.reset(robot.HOME)
        self._finger_path.reset(np.ones(1))
        self._late = [(robot.HOME, 1.0)] * round(drawn.get("latency", 0.0))
        self._drive(robot.HOME, 1.0)
        self._settle()
        return drawn

    def _place(self, placement: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
        raise NotImplementedError

    def _settle(self) -> None:
        raise NotImplementedError

    def step(self, position: np.ndarray, quaternion: np.ndarray, opening: float) -> bool:
        start = self.data.qpos[self._qpos].copy()
        solution = self._solve(position, quaternion, start)
        arm, _ = self._arm_path.plan(start if solution is None else solution, self._times)
        fingers, _ = self._finger_path.plan(np.array([opening]), self._times)
        commands = self._late + list(zip(arm, fingers[:, 0], strict=True))
        self._late = commands[SUBSTEPS:]
        for joints, finger in commands[:SUBSTEPS]:
            self._drive(joints, finger)
            mujoco.mj_step(self.model, self.data)
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        return solution is not None

    def proprio(self) -> np.ndarray:
        base_p, base_q = self.data.mocap_pos[0], self.data.mocap_quat[0]
        p = rotate(inverse(base_q), self.data.site_xpos[self._tcp] - base_p)
        q = canonical(compose(inverse(base_q), self._tool_quaternion()))
        opening = 1 - self.data.qpos[self._fingers].mean() / robot.FINGER_TRAVEL
        return np.array([*p, *q, np.clip(opening, 0, 1)], np.float32)

    def render(self) -> dict[str, np.ndarray]:
        if self._renderer is None:
            self._renderer = make_renderer(self.model, *self.image_shapes["overhead_camera"])
        if self.fingers is not None:
            self.fingers.turn(self.data)
        return {name: self._picture(self._renderer, name) for name in self.image_shapes}

    def _picture(self, renderer: Renderer, camera: str) -> np.ndarray:
        picture = renderer.render(self.data, camera)
        if self.photo is None:
            return picture
        return self.photo.behind(picture, renderer, self.data, camera)

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

    def _robot_state(self) -> dict[str, list[float]]:
        """The robot's part of the privileged state."""
        d = self.data
        return {
            "tool": [*d.site_xpos[self._tcp], *canonical(self._tool_quaternion())],
            "base": [*d.mocap_pos[0], *canonical(d.mocap_quat[0])],
        }

    def _drive(self, joints: np.ndarray, opening: float) -> None:
        self.data.ctrl[: len(joints)] = joints
        self.data.ctrl[len(joints) :] = (1 - opening) * robot.FINGER_TRAVEL

    def _tool_quaternion(self) -> np.ndarray:
        q = np.zeros(4)
        mujoco.mju_mat2Quat(q, self.data.site_xmat[self._tcp])
        return q

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
            rest = IK_REST * (robot.HOME - q)
            dq = j.T @ np.linalg.solve(jj, error) + rest - j.T @ np.linalg.solve(jj, j @ rest)
            # no limits, as SIMPLER's: the joint stops it
            q = q + np.clip(dq, -IK_STRIDE, IK_STRIDE)
        return None
