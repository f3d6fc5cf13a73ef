"""The `Simulator` (envs/base.py) of SIMPLER's Google-robot scenes, and of the drawers among them.

Import through envs/simpler.py.
"""

import gc
import os
from typing import Any, Generic, TypeVar

import numpy as np
import sapien
from jaxtyping import Float, Float32, UInt8

from selfflow.datasets.rotations import canonical, compose, from_matrix
from selfflow.datasets.spec import EMBODIMENTS
from selfflow.envs.backgrounds import chosen_photo, plain_background
from selfflow.envs.cabinet_placements import DRAWER_POSES, DRAWERS
from selfflow.envs.google_robot import SUBSTEPS, Drives
from selfflow.envs.gripper import OpeningGripper, RelativeGripper
from selfflow.envs.sapien_render import DRAWING, set_shading
from selfflow.envs.simpler_assets import URDF_VERSIONS, photo
from selfflow.envs.simpler_scene import DrawerScene, GoogleScene, SimplerScene, load_photo
from selfflow.envs.simpler_variants import MATCHED, looks

# Optical axes (x right, y down, z forward) in a SAPIEN camera's frame (x forward, y left, z up).
OPTICAL = from_matrix(np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]))


AnyScene = TypeVar("AnyScene", bound=SimplerScene)
Scene = TypeVar("Scene", bound=GoogleScene)


class SimplerSimulator(Generic[AnyScene]):
    """A robot in a scene that a subclass builds: what the `Simulator` protocol asks of all.

    Every reset builds a new scene, so an episode repeats exactly.
    """

    backend = "simpler"

    def __init__(self, embodiment: str, image_size: tuple[int, int], overlay: bool) -> None:
        self.embodiment = EMBODIMENTS[embodiment]
        self.image_shapes = {self.embodiment.cameras[0]: image_size}
        self._size, self._overlay = image_size, overlay
        self.samples: int | None = None  # rays a pixel; None draws without ray tracing
        self._photos: dict[str, np.ndarray] = {}
        self._scene: AnyScene | None = None
        self._picture: np.ndarray | None = None
        # Never drawn with: while one render system lives, compiled shaders do; else 5-15 s a scene.
        self._renderer: sapien.render.RenderSystem | None = None

    @property
    def scene(self) -> AnyScene:
        """The present episode's scene."""
        if self._scene is None:
            raise RuntimeError("reset() comes first")
        return self._scene

    def clear(self) -> None:
        """Frees the last episode's scene, and opens the renderer if need be."""
        self._free_scene()
        if self._renderer is None:
            self._renderer = sapien.render.RenderSystem()
            DRAWING[self] = os.getpid()
        set_shading(self.samples)

    def proprio(self) -> Float32[np.ndarray, "8"]:
        """Sensed tool position, quaternion wxyz with w >= 0 (base frame), gripper opening."""
        robot = self.scene.robot
        return np.concatenate([*robot.tool_pose(), [robot.opening()]]).astype(np.float32)

    def render(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """The camera's picture; drawn once a step, however often it is asked for."""
        if self._picture is None:
            self._picture = self.scene.picture()
        return {self.embodiment.cameras[0]: self._picture.copy()}

    def robot_state(self) -> dict[str, Float[np.ndarray, "7"]]:
        """Tool and base poses in the world frame."""
        robot = self.scene.robot
        return {
            "tool": numbers(robot.tool.entity_pose),
            "base": numbers(robot.body.get_root_pose()),
        }

    def camera_info(self) -> dict[str, dict[str, np.ndarray]]:
        """Intrinsics, and the pose of the optical frame in the robot's base frame."""
        camera, base = self.scene.camera, self.scene.robot.body.get_root_pose()
        pose = numbers(base.inv() * camera.get_global_pose())
        pose[3:] = canonical(compose(pose[3:], OPTICAL))
        intrinsics = np.asarray(camera.get_intrinsic_matrix(), np.float32)
        return {
            self.embodiment.cameras[0]: {"intrinsics": intrinsics, "pose": pose.astype(np.float32)}
        }

    def close(self) -> None:
        """Frees the scene and the renderer; a reset opens them again."""
        self._free_scene()
        self._renderer = None
        DRAWING.pop(self, None)

    def _free_scene(self) -> None:
        self._scene = self._picture = None
        gc.collect()  # scene and entities refer to each other

    def _photo(self, name: str) -> UInt8[np.ndarray, "H W 3"] | None:
        """That photograph at the camera's size; None without an overlay."""
        if not self._overlay:
            return None
        if name not in self._photos:
            self._photos[name] = load_photo(photo(name), self._size)
        return self._photos[name]


class GoogleSimulator(SimplerSimulator[Scene]):
    """The Google robot in a scene that a subclass builds."""

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        urdf_version: str,
        gripper: OpeningGripper | RelativeGripper,
        overlay: bool,
        variant: str = MATCHED,
    ) -> None:
        # Only visual matching has a photograph.
        super().__init__("google_robot", image_size, overlay and variant == MATCHED)
        self._urdf, self._gripper, self._variant = urdf_version, gripper, variant

    def build(
        self, placement: dict[str, float], base: tuple[float, float, float]
    ) -> tuple[Scene, dict[str, float]]:
        """The scene of a placement with the robot at x, y, yaw, and what was chosen, by name."""
        raise NotImplementedError

    def reset(self, placement: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
        """Builds the scene of a placement (keys: envs/tasks.py); nothing else is random."""
        del rng
        self.clear()
        placement = {name: float(value) for name, value in placement.items()}
        base = (placement["robot_x"], placement["robot_y"], placement["robot_yaw"])
        if "colouring" in placement:
            self._urdf = URDF_VERSIONS[round(placement["colouring"])]
        self._scene, chosen = self.build(placement, base)
        self._gripper.reset(self._scene.robot.finger_angles)
        return chosen

    def step(
        self, position: Float[np.ndarray, "3"], quaternion: Float[np.ndarray, "4"], opening: float
    ) -> bool:
        """Moves 1/3 s towards a tool pose (base frame) and opening; False where the arm held."""
        robot = self.scene.robot
        fingers = self._gripper.goal(opening, robot.finger_drive)
        drives, reached = robot.plan(position, quaternion, fingers)
        self.run(drives)
        return reached

    def run(self, drives: Drives) -> None:
        """Moves for one control step along these drive targets."""
        for n in range(SUBSTEPS):
            self.scene.robot.drive(drives, n)
            self.scene.scene.step()
        self._picture = None


class SimplerDrawerScene(GoogleSimulator[DrawerScene]):
    """The Google robot before the three-drawer cabinet, the apple on it for tasks that have one.

    Over the background is what the placement's "photo" says, else the photograph taken nearest to
    the robot's place: draw "photo", an index into DRAWER_POSES.
    """

    def __init__(self, *, apple: bool, **options: Any) -> None:
        super().__init__(**options)
        self._has_apple = apple

    def build(
        self, placement: dict[str, float], base: tuple[float, float, float]
    ) -> tuple[DrawerScene, dict[str, float]]:
        view = chosen_photo(placement)
        if view is None:
            background = plain_background(placement, self._size) if self._overlay else None
        else:
            background = self._photo(f"open_drawer_{view}")
        scene = DrawerScene(
            sapien.render.RenderSystem(),
            base,
            (placement["apple_x"], placement["apple_y"]) if self._has_apple else None,
            [placement[f"drawer_{drawer}"] for drawer in DRAWERS],
            self._urdf,
            self._size,
            background,
            looks("open_drawer_place")[self._variant],  # every cabinet task's
        )
        if view is None or not self._overlay:
            return scene, {}
        return scene, {"photo": float(list(DRAWER_POSES).index(view))}

    def privileged(self) -> dict[str, Float32[np.ndarray, "_"]]:
        """State for evaluation, world frame; the apple's entries are 0 in a task without it."""
        scene, apple = self.scene, self.scene.apple
        state = self.robot_state() | {
            "drawers": scene.drawers(),
            "apple": np.zeros(7) if apple is None else numbers(apple.entity_pose),
            "apple_grasped": [apple is not None and scene.grasped(apple)],
            "apple_on_drawer_floor": [scene.apple_on_drawer_floor()],
        }
        return {name: np.asarray(value, np.float32) for name, value in state.items()}


def numbers(pose: sapien.Pose) -> Float[np.ndarray, "7"]:
    """xyz + canonical wxyz."""
    return np.concatenate([pose.p, canonical(np.asarray(pose.q, np.float64))])
