"""A simulator without physics, for tests: a point tool that reaches every target in one step.

It has one of everything that a real simulator has (two cameras of different size, poses in two
frames, poses out of reach, a drawer, an apple), is deterministic, and can be solved: close the
gripper at the handle and pull, close it at the apple and carry, open it above the drawer.
"""

import numpy as np

from selfflow.datasets.rotations import canonical, compose, from_axis_angle, inverse, rotate
from selfflow.datasets.spec import EMBODIMENTS, Embodiment, Task
from selfflow.envs.base import RobotEnv
from selfflow.envs.cabinet_placements import DRAWERS

HANDLE = np.array([-0.06, 0.0, 0.9])  # top drawer's handle when shut, world frame
PITCH = 0.2  # m between drawers
TABLE, FLOOR = 1.1, 0.86  # heights at which the apple rests
REACH, GRASP = 1.5, 0.05  # m from the base; m from the tool
HOME = np.array([0.5, 0.0, 1.2])  # tool in the base frame


class PointSimulator:
    """Implements envs.base.Simulator; see the module."""

    backend = "fake"

    def __init__(self, embodiment: Embodiment = EMBODIMENTS["google_robot"]) -> None:
        self.embodiment = embodiment
        self.image_shapes = {embodiment.cameras[0]: (24, 32), "wrist_camera": (16, 16)}

    def reset(self, placement: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
        """Places everything; draws the colour of the background."""
        self._base = np.array([placement["robot_x"], placement["robot_y"], 0.0])
        # yaw 0 looks along -x, towards the cabinet
        self._heading = from_axis_angle(np.array([0.0, 0.0, np.pi + placement["robot_yaw"]]))
        self._position, self._quaternion, self._gripper = HOME, np.array([1.0, 0, 0, 0]), 1.0
        self._apple = np.array([placement["apple_x"], placement["apple_y"], TABLE])
        self._drawers = np.array([placement[f"drawer_{name}"] for name in DRAWERS])
        self._held: int | None = None  # drawer number, or len(DRAWERS) for the apple
        self._shade = int(rng.integers(60, 120))
        return {"shade": float(self._shade)}

    def step(self, position: np.ndarray, quaternion: np.ndarray, opening: float) -> bool:
        """Teleports the tool, and what it holds, unless the target is out of reach."""
        reached = bool(np.linalg.norm(position - [0, 0, 1]) <= REACH)
        if reached:
            self._position, self._quaternion = np.array(position), canonical(quaternion)
        was_open, self._gripper = self._gripper > 0.5, float(opening)
        tool = self._tool()
        if self._gripper > 0.5:
            self._release()
        elif was_open:
            things = [*(self._handle(i) for i in range(len(DRAWERS))), self._apple]
            distance = [float(np.linalg.norm(tool - thing)) for thing in things]
            nearest = int(np.argmin(distance))
            self._held = nearest if distance[nearest] < GRASP else None
        if self._held == len(DRAWERS):
            self._apple = tool
        elif self._held is not None:
            self._drawers[self._held] = np.clip(tool[0] - HANDLE[0], 0.0, 0.3)
        return reached

    def proprio(self) -> np.ndarray:
        """The commanded pose itself."""
        return np.array([*self._position, *self._quaternion, self._gripper], np.float32)

    def render(self) -> dict[str, np.ndarray]:
        """Apple and tool as dots seen from above, the top drawer's opening as a bar."""
        images = {}
        for name, (h, w) in self.image_shapes.items():
            image = np.full((h, w, 3), self._shade, np.uint8)
            image[:2, : round(float(self._drawers[0]) / 0.3 * w)] = (220, 180, 40)
            for point, colour in ((self._apple, (40, 200, 40)), (self._tool(), (220, 40, 40))):
                row = int(np.clip((point[0] + 0.4) / 1.2 * h, 2, h - 2))
                column = int(np.clip((point[1] + 0.5) * w, 1, w - 2))
                image[row - 1 : row + 1, column - 1 : column + 1] = colour
            images[name] = image
        return images

    def privileged(self) -> dict[str, np.ndarray]:
        """State for evaluation; keys and shapes as envs.base.Simulator says."""
        one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        upright = [1.0, 0, 0, 0]
        tool = [*self._tool(), *canonical(compose(self._heading, self._quaternion))]
        inside = self._apple[2] == FLOOR
        return {
            "drawers": self._drawers.astype(np.float32),
            "apple": np.array([*self._apple, *upright], np.float32),
            "tool": np.array(tool, np.float32),
            "base": np.array([*self._base, *self._heading], np.float32),
            "apple_grasped": one if self._held == len(DRAWERS) else zero,
            "apple_on_drawer_floor": one if inside else zero,
        }

    def camera_info(self) -> dict[str, dict[str, np.ndarray]]:
        """A pinhole above the base that looks straight down."""
        pose = np.array([0.0, 0, 2, 0, 1, 0, 0], np.float32)
        return {
            name: {
                "intrinsics": np.array([[w, 0, w / 2], [0, w, h / 2], [0, 0, 1]], np.float32),
                "pose": pose,
            }
            for name, (h, w) in self.image_shapes.items()
        }

    def close(self) -> None:
        """Nothing to free."""

    def to_base(self, point: np.ndarray) -> np.ndarray:
        """A world point in the robot's base frame, for scripted policies."""
        return rotate(inverse(self._heading), point - self._base)

    def _tool(self) -> np.ndarray:
        return self._base + rotate(self._heading, self._position)

    def _handle(self, drawer: int) -> np.ndarray:
        return HANDLE + np.array([self._drawers[drawer], 0.0, -PITCH * drawer])

    def _release(self) -> None:
        if self._held == len(DRAWERS):
            # The open drawer's box lies between the cabinet's front and the drawer's own.
            x, y, _ = self._apple - HANDLE
            inside = 0.0 <= x <= self._drawers[0] and abs(y) < 0.2
            self._apple = np.array([*self._apple[:2], FLOOR if inside else TABLE])
        self._held = None


def make_fake(task: Task, placement: str = "mild", pictures: bool = True) -> RobotEnv:
    """The task in the fake simulator."""
    return RobotEnv(PointSimulator(EMBODIMENTS[task.embodiment]), task, placement, pictures)
