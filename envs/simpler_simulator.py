"""The `Simulator` (envs/base.py) of SIMPLER's drawer scene. Import through envs/simpler.py."""

import gc

import numpy as np
import sapien
from jaxtyping import Float, Float32, UInt8

from selfflow.datasets.rotations import canonical, compose, from_matrix
from selfflow.datasets.spec import EMBODIMENTS
from selfflow.envs.google_robot import FINGER_LINKS, SUBSTEPS, TOOL, Drives
from selfflow.envs.gripper import OpeningGripper, StickyGripper
from selfflow.envs.simpler_assets import photo
from selfflow.envs.simpler_scene import TOUCH, DrawerScene, load_photo
from selfflow.envs.tasks import DRAWER_POSES, DRAWERS

GRASP_CONE = np.deg2rad(80)  # about the closing direction
# Optical axes (x right, y down, z forward) in a SAPIEN camera's frame (x forward, y left, z up).
OPTICAL = from_matrix(np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]))


class SimplerDrawerScene:
    """The Google robot before the three-drawer cabinet, the apple on it for tasks that have one.

    Every reset builds a new scene, so an episode repeats exactly. The photograph over the
    background is the one taken nearest to the robot's place: draw "photo", an index into
    DRAWER_POSES.
    """

    backend = "simpler"

    def __init__(
        self,
        *,
        apple: bool,
        image_size: tuple[int, int],
        urdf_version: str,
        gripper: OpeningGripper | StickyGripper,
        overlay: bool,
    ) -> None:
        self.embodiment = EMBODIMENTS["google_robot"]
        self.image_shapes = {self.embodiment.cameras[0]: image_size}
        self._has_apple, self._size, self._urdf = apple, image_size, urdf_version
        self._gripper, self._overlay = gripper, overlay
        self._photos: dict[str, np.ndarray] = {}
        self._scene: DrawerScene | None = None
        self._picture: np.ndarray | None = None
        # Never drawn with: while one render system lives, compiled shaders do; else 5-15 s a scene.
        self._renderer: sapien.render.RenderSystem | None = None

    @property
    def scene(self) -> DrawerScene:
        """The present episode's scene."""
        if self._scene is None:
            raise RuntimeError("reset() comes first")
        return self._scene

    def reset(self, placement: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
        """Builds the scene of a placement (keys: envs/tasks.py); nothing else is random."""
        del rng
        self._free_scene()
        if self._renderer is None:
            self._renderer = sapien.render.RenderSystem()
        placement = {name: float(value) for name, value in placement.items()}
        base = (placement["robot_x"], placement["robot_y"], placement["robot_yaw"])
        view = nearest_photo(base[0], base[1])
        self._scene = DrawerScene(
            sapien.render.RenderSystem(),
            base,
            (placement["apple_x"], placement["apple_y"]) if self._has_apple else None,
            [placement[f"drawer_{drawer}"] for drawer in DRAWERS],
            self._urdf,
            self._size,
            self._photo(view) if self._overlay else None,
        )
        self._gripper.reset(self._scene.robot.finger_angles)
        return {"photo": float(list(DRAWER_POSES).index(view))} if self._overlay else {}

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

    def proprio(self) -> Float32[np.ndarray, "8"]:
        """Sensed tool position, quaternion wxyz with w >= 0 (base frame), gripper opening."""
        robot = self.scene.robot
        return np.concatenate([*robot.tool_pose(), [robot.opening()]]).astype(np.float32)

    def render(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """The overhead camera's picture; drawn once a step, however often it is asked for."""
        if self._picture is None:
            self._picture = self.scene.picture()
        return {self.embodiment.cameras[0]: self._picture.copy()}

    def privileged(self) -> dict[str, Float32[np.ndarray, "_"]]:
        """State for evaluation, world frame; the apple's entries are 0 in a task without it."""
        scene = self.scene
        state = {
            "drawers": scene.drawers(),
            "apple": np.zeros(7) if scene.apple is None else _numbers(scene.apple.entity_pose),
            "tool": _numbers(scene.robot.links[TOOL].entity_pose),
            "base": _numbers(scene.robot.body.get_root_pose()),
            "apple_grasped": [self._grasped()],
            "apple_on_drawer_floor": [scene.apple_on_drawer_floor()],
        }
        return {name: np.asarray(value, np.float32) for name, value in state.items()}

    def camera_info(self) -> dict[str, dict[str, np.ndarray]]:
        """Intrinsics, and the pose of the optical frame in the robot's base frame."""
        camera, base = self.scene.camera, self.scene.robot.body.get_root_pose()
        pose = _numbers(base.inv() * camera.get_global_pose())
        pose[3:] = canonical(compose(pose[3:], OPTICAL))
        intrinsics = np.asarray(camera.get_intrinsic_matrix(), np.float32)
        return {
            self.embodiment.cameras[0]: {"intrinsics": intrinsics, "pose": pose.astype(np.float32)}
        }

    def close(self) -> None:
        """Frees the scene and the renderer; a reset opens them again."""
        self._free_scene()
        self._renderer = None

    def _free_scene(self) -> None:
        self._scene = self._picture = None
        gc.collect()  # scene and entities refer to each other

    def _photo(self, view: str) -> UInt8[np.ndarray, "H W 3"]:
        if view not in self._photos:
            self._photos[view] = load_photo(photo(f"open_drawer_{view}"), self._size)
        return self._photos[view]

    def _grasped(self) -> bool:
        """Both fingers press on the apple, each within 80° of the closing direction."""
        scene, links = self.scene, self.scene.robot.links
        if scene.apple is None:
            return False
        tips = {
            side: np.asarray(links[names[1]].entity_pose.p) for side, names in FINGER_LINKS.items()
        }
        closing = tips["left"] - tips["right"]
        closing /= np.linalg.norm(closing)
        for side, direction in (("right", closing), ("left", -closing)):
            push = scene.impulse_on_apple([links[name] for name in FINGER_LINKS[side]])
            size = np.linalg.norm(push)
            if size <= TOUCH or push @ direction < np.cos(GRASP_CONE) * size:
                return False
        return True


def nearest_photo(x: float, y: float) -> str:
    """The drawer pose (envs/tasks.py) nearest to a robot's place; its photograph is used there."""
    distance = {name: np.hypot(px - x, py - y) for name, (px, py, _) in DRAWER_POSES.items()}
    return min(distance, key=distance.__getitem__)


def _numbers(pose: sapien.Pose) -> Float[np.ndarray, "7"]:
    """xyz + canonical wxyz."""
    return np.concatenate([pose.p, canonical(np.asarray(pose.q, np.float64))])
