"""The embedded MuJoCo twin: the Google robot at a cabinet or at a table, as a gymnasium.Env.

    env = make_mujoco(task_named("open_drawer_place"))          # a gymnasium.Env
    observation, info = env.reset(seed=0)

The robot is in envs/twin_robot.py, the scenes in envs/twin_scene.py.
"""

# mujoco's names live in binary modules without stubs.
# pyright: reportAttributeAccessIssue=false

from typing import Any

import mujoco
import numpy as np

from selfflow.datasets.rotations import from_axis_angle, rotate
from selfflow.datasets.spec import Task, UserError
from selfflow.envs import twin_scene as scene
from selfflow.envs.base import RobotEnv
from selfflow.envs.cabinet_placements import DRAWERS
from selfflow.envs.table_objects import MODELS, Placed
from selfflow.envs.tasks import TABLE_TASKS, objects
from selfflow.envs.twin_look import USUAL, Look
from selfflow.envs.twin_mesh import ROBOTS, Fingers, Photo, check_meshes, photo_file
from selfflow.envs.twin_objects import COKE_THINGS, NEAR_THINGS
from selfflow.envs.twin_random import Randomise, level
from selfflow.envs.twin_render import asked_renderer
from selfflow.envs.twin_robot import FINGERS, TwinRobot
from selfflow.envs.twin_scene import HANDLES, TABLE_TOP

TOUCH = 1e-6  # N
CALM = 1e-3  # m/s and, by ten, rad/s: a thing has come to rest


class CabinetTwin(TwinRobot):
    """Three drawers, and with `apple` an apple on top."""

    def __init__(
        self,
        size: tuple[int, int],
        apple: bool,
        randomise: Randomise,
        look: Look,
        handles: str,
        robot: str,
    ) -> None:
        super().__init__(scene.build(*size, look, handles, robot), size, randomise)
        self._has_apple = apple
        self._drawers = np.array([self.model.joint(f"drawer_{d}").qposadr[0] for d in DRAWERS])
        self._apple = self.model.joint("apple").qposadr[0]

    def _place(self, placement: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
        qpos = self.data.qpos
        qpos[self._drawers] = [placement[f"drawer_{d}"] for d in DRAWERS]
        turn = float(rng.uniform(-np.pi, np.pi))
        x, y = (placement["apple_x"], placement["apple_y"]) if self._has_apple else (-3.0, 0.0)
        z = TABLE_TOP + 0.93 * scene.APPLE_RADIUS + 0.001 if self._has_apple else 0.06
        qpos[self._apple : self._apple + 7] = [x, y, z, *from_axis_angle([0, 0, turn])]
        return {"apple_turn": turn}

    def _settle(self) -> None:
        mujoco.mj_step(self.model, self.data, nstep=60)

    def privileged(self) -> dict[str, np.ndarray]:
        d = self.data
        touching = self._contacts()
        grasped = all(("apple", f"{f}_tip") in touching or ("apple", f"{f}_bar") in touching
                      for f in FINGERS)  # fmt: skip
        state = {
            "drawers": d.qpos[self._drawers],
            "apple": d.qpos[self._apple : self._apple + 7] if self._has_apple else np.zeros(7),
            **self._robot_state(),
            "apple_grasped": [grasped],
            "apple_on_drawer_floor": [("apple", "floor_top") in touching],
        }
        return {name: np.array(value, np.float32) for name, value in state.items()}

    def _contacts(self) -> set[tuple[str, str]]:
        names = set()
        for contact in self.data.contact[: self.data.ncon]:
            if contact.dist < 1e-4:
                a, b = (self.model.geom(g).name for g in contact.geom)
                names |= {(a, b), (b, a)}
        return names


class TableTwin(TwinRobot):
    """A table with a coke can, or with move near's three things."""

    def __init__(
        self, size: tuple[int, int], task: Task, randomise: Randomise, look: Look, robot: str
    ) -> None:
        things = NEAR_THINGS if task.name == "move_near" else COKE_THINGS
        super().__init__(scene.build_table(*size, things, look, robot), size, randomise)
        self._task = task
        self._robot = self.model.body("base").id
        self._finger_bodies = [self.model.body(name).id for name in FINGERS]

    def _place(self, placement: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
        placed = objects(self._task, placement)
        self._bodies = [self._put(thing) for thing in placed]
        self._radii = [thing.radius for thing in placed]
        return {}

    def _put(self, thing: Placed) -> int:
        """Takes the thing out of its parking place and sets it just above the table."""
        model = self.model
        body = model.body(thing.model)
        geoms = slice(body.geomadr[0], body.geomadr[0] + body.geomnum[0])
        solid = model.geom_rgba[geoms, 3] == 0  # what is seen never collides
        model.geom_contype[geoms][solid], model.geom_conaffinity[geoms][solid] = 1, 3
        model.body_contype[body.id], model.body_conaffinity[body.id] = 1, 3  # what its geoms have
        model.body_gravcomp[body.id] = 0
        corners = np.array(MODELS[thing.model].box) * (np.indices((2, 2, 2)).reshape(3, -1).T - 0.5)
        lowest = min(rotate(list(thing.turn), corner)[2] for corner in corners)
        start = model.joint(thing.model).qposadr[0]
        self.data.qpos[start : start + 7] = [*thing.xy, TABLE_TOP - lowest + 0.001, *thing.turn]
        return body.id

    def _settle(self) -> None:
        """Until the things lie still, for a second at most."""
        for _ in range(8):
            mujoco.mj_step(self.model, self.data, nstep=60)
            speed = np.abs(self.data.cvel[self._bodies])  # angular first
            if max(speed[:, :3].max() / 10, speed[:, 3:].max()) < CALM:
                break

    def privileged(self) -> dict[str, np.ndarray]:
        first = self._bodies[0]
        touching = self._touching(first)
        state = self._robot_state() | {
            "objects": [[*self.data.xpos[b], *self.data.xquat[b]] for b in self._bodies],
            "radii": self._radii,
            "grasped": [all(finger in touching for finger in self._finger_bodies)],
            "touches": [any(self.model.body_rootid[b] != self._robot for b in touching)],
        }
        return {name: np.array(value, np.float32) for name, value in state.items()}

    def _touching(self, body: int) -> set[int]:
        """The bodies that press on it."""
        found, force = set(), np.zeros(6)
        for i, contact in enumerate(self.data.contact[: self.data.ncon]):
            pair = self.model.geom_bodyid[contact.geom].tolist()
            if body in pair:
                mujoco.mj_contactForce(self.model, self.data, i, force)
                if np.linalg.norm(force[:3]) > TOUCH:
                    found |= set(pair) - {body}
        return found


def check_options(
    task: Task,
    randomise: str | Randomise,
    handles: str = "visual",
    robot: str = "primitives",
    photo: bool = False,
) -> None:
    """Raises UserError for what `make_mujoco` does not take, and for data files that it lacks."""
    level(randomise)
    if robot not in ROBOTS:
        raise UserError(f"robot={robot}: choose one of {', '.join(ROBOTS)}")
    if robot == "google_mesh":
        check_meshes()
    if photo:
        photo_file(task)
    if handles not in HANDLES:
        raise UserError(f"handles={handles}: choose one of {', '.join(HANDLES)}")
    if handles != "visual" and task.name in TABLE_TASKS:
        raise UserError(f"handles={handles}: only with a drawer task; leave it out")


def make_mujoco(
    task: Task,
    placement: str = "mild",
    image_size: tuple[int, int] = (128, 160),
    pictures: bool = True,
    randomise: str | Randomise = "none",
    handles: str = "visual",
    look: Look = USUAL,
    robot: str = "primitives",
    photo: bool = False,
    config: Any = None,
) -> RobotEnv:
    """The twin as a gymnasium environment for one of the tasks it has rules for. OpenGL is opened
    with the first picture, so that a process which draws none may be forked.

    randomise: a name of twin_random.LEVELS, or the ranges themselves. handles: `visual`, as
    SIMPLER's, or `collide`. look: room, shadows, multisampling.
    robot: `primitives`, or `google_mesh` for the original's looks; photo: SIMPLER's photograph
    behind what is simulated; both need its data files.
    config: thresholds and ranges, of the task's file (envs/tasks.py). Raises UserError.
    """
    asked_renderer()  # a wrong choice is told now
    check_options(task, randomise, handles, robot, photo)
    ranges = level(randomise)
    if task.name in TABLE_TASKS:
        twin = TableTwin(image_size, task, ranges, look, robot)
    else:
        apple = task.name == "open_drawer_place"
        twin = CabinetTwin(image_size, apple, ranges, look, handles, robot)
    twin.fingers = Fingers(twin.model) if robot == "google_mesh" else None
    twin.photo = Photo(twin.model, task, image_size) if photo else None
    return RobotEnv(twin, task, placement, pictures, config)
