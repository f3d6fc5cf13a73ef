"""SIMPLER's WidowX scenes on SAPIEN 3, table and sink, and their `Simulator` (envs/base.py).

World frame, metres; the numbers are SIMPLER's (docs/simpler.md). Import through envs/simpler.py.
"""

from dataclasses import dataclass

import numpy as np
import sapien
from jaxtyping import Float, Float32, UInt8

from selfflow.datasets.rotations import compose, from_matrix, from_rpy, inverse
from selfflow.datasets.spec import TOOL_POSITION, TOOL_QUATERNION, Task
from selfflow.envs.bridge_tasks import PAIRS, SINK_PHOTO, TABLE_PHOTO, Pair
from selfflow.envs.simpler_assets import asset
from selfflow.envs.simpler_scene import (
    DROP,
    TABLE_HEIGHT,
    Body,
    SimplerScene,
    build_object,
    finish,
    object_density,
)
from selfflow.envs.simpler_simulator import SimplerSimulator, numbers
from selfflow.envs.widowx import BASE, FINGER_LINKS, PHYSICS_HZ, SUBSTEPS, WidowX

URDF = ("mani_skill2_real2sim/assets/descriptions/widowx_description", "wx250s.urdf")
BAKED_TABLE, OBJECT_TABLE = "info_bridge_custom_baked_tex_v0.json", "info_bridge_custom_v0.json"
CAMERA = "3rd_view_camera"
IMAGE, FOCAL, CENTRE = (480, 640), 623.588, (319.501, 239.545)  # px at this (height, width)
# A box for the table, whose mesh is under the photograph: top where settled objects say it is.
TABLE_X, TABLE_Y, TABLE_Z = (-0.70, 0.25), (-0.60, 0.60), (0.80, 0.8695)
SINK, SINK_PLACE = "sink", (-0.16, 0.13, 0.88)
Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Setup:
    """Robot, camera and light of a scene."""

    photo: str
    base: Vector
    start: tuple[float, ...]  # arm joints, rad
    camera: tuple[Vector, tuple[float, ...]]  # position and quaternion on base_link
    lights: tuple[tuple[Vector, float], ...]  # direction, grey level


def look_along(direction: Vector) -> tuple[float, ...]:
    """Quaternion of a SAPIEN camera (x forward, y left, z up) that looks that way, upright."""
    x = np.asarray(direction) / np.linalg.norm(direction)
    y = np.cross([0.0, 0.0, 1.0], x)
    y /= np.linalg.norm(y)
    return tuple(from_matrix(np.stack([x, y, np.cross(x, y)], axis=-1)).tolist())


TABLE = Setup(
    TABLE_PHOTO,
    (0.147, 0.028, 0.870),
    (-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398),
    ((0.0, -0.16, 0.36), look_along((1.0, 0.553, -1.085))),
    (((0.0, 0.0, -1.0), 2.2), ((-1.0, -0.5, -1.0), 0.7), ((1.0, 1.0, -1.0), 0.7)),
)
SINK_TABLE = Setup(
    SINK_PHOTO,
    (0.127, 0.06, 0.85),
    (-0.2600599, -0.12875618, 0.04461369, -0.00652761, 1.7033415, -0.26983038),
    ((-0.003, -0.21, 0.39), (-0.907313, 0.0782, -0.36434, -0.194741)),
    (((0.0, 0.0, -1.0), 0.3),),
)


class BridgeScene(SimplerScene[WidowX]):
    """One episode's table with a source and a target object, or the sink with an eggplant.

    Of the sink only the photograph is seen, basket included: its mesh and the target, a thin plate
    in the basket, are there for contacts and for the success rule.
    """

    fingers = {"left": FINGER_LINKS[:1], "right": FINGER_LINKS[1:]}  # noqa: RUF012

    def __init__(
        self,
        renderer: sapien.render.RenderSystem,
        pair: Pair,
        placement: dict[str, float],
        size: tuple[int, int],
        photo: UInt8[np.ndarray, "H W 3"] | None,
    ) -> None:
        super().__init__(renderer, photo, PHYSICS_HZ, contact_offset=0.005)
        setup = setup_of(pair)
        _add_light(self.scene, setup)
        _add_table(self.scene)
        if setup is SINK_TABLE:
            self._add_sink()
        self.source = self._drop(pair.source, placement, "source")
        self.target = self._drop(pair.target, placement, "target")
        self.settle([self.source, self.target])
        base = sapien.Pose(setup.base, [0.0, 0.0, 0.0, 1.0])
        self.robot = WidowX(self.scene, asset(*URDF), base, setup.start)
        for link in self.robot.body.links:
            finish(link.entity, specular=0.9, roughness=0.3)
        self.camera = self._mount_camera(setup, size)
        shown = [link.entity for link in self.robot.body.links] + [self.source.entity]
        shown += [self.target.entity] if setup is TABLE else []
        self._shown = np.array([entity.per_scene_id for entity in shown])

    def _drop(self, name: str, placement: dict[str, float], role: str) -> Body:
        table = BAKED_TABLE if name.startswith("baked_") else OBJECT_TABLE
        turn = from_rpy([0.0, 0.0, placement.get(f"{role}_yaw", 0.0)])
        place = [placement[f"{role}_x"], placement[f"{role}_y"], TABLE_HEIGHT + DROP]
        density = object_density(asset("data", "custom", table), name)
        return build_object(self.scene, name, sapien.Pose(place, turn.tolist()), density)

    def _add_sink(self) -> None:
        sink = build_object(self.scene, SINK, sapien.Pose(SINK_PLACE), density=1e5)
        sink.set_locked_motion_axes([True] * 6)

    def _mount_camera(
        self, setup: Setup, size: tuple[int, int]
    ) -> sapien.render.RenderCameraComponent:
        (height, width), scale = size, size[1] / IMAGE[1]
        position, turn = setup.camera
        camera = self.scene.add_mounted_camera(
            CAMERA,
            self.robot.links[BASE].entity,
            sapien.Pose(list(position), list(turn)),
            width,
            height,
            fovy=1.0,
            near=0.01,
            far=10.0,
        )
        focal, (x, y) = FOCAL * scale, CENTRE
        camera.set_perspective_parameters(
            0.01, 10.0, focal, focal, x * scale, y * height / IMAGE[0], 0.0
        )
        return camera


class SimplerBridgeScene(SimplerSimulator[BridgeScene]):
    """The WidowX at a table or a sink, for one of the tasks in envs/bridge_tasks.py.

    SIMPLER's controller moves the tool's last target instead of the sensed pose: `step` takes its
    arguments as a change of the sensed pose, and applies that change to the target.
    """

    def __init__(self, task: Task, image_size: tuple[int, int] = IMAGE, overlay: bool = True):
        super().__init__(task.embodiment, image_size, overlay)
        self._pair = PAIRS[task.name]

    def reset(self, placement: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
        """Builds the scene of a placement (keys: envs/bridge_tasks.py); nothing else is random."""
        del rng
        self.clear()
        placement = {name: float(value) for name, value in placement.items()}
        self._scene = BridgeScene(
            sapien.render.RenderSystem(),
            self._pair,
            placement,
            self._size,
            self._photo(setup_of(self._pair).photo),
        )
        return {}

    def step(
        self, position: Float[np.ndarray, "3"], quaternion: Float[np.ndarray, "4"], opening: float
    ) -> bool:
        """Moves 1/5 s; see the class. False where the arm held for want of inverse kinematics."""
        sensed = self.proprio().astype(np.float64)
        turn = compose(quaternion, inverse(sensed[TOOL_QUATERNION]))
        self.scene.robot.move_target(position - sensed[TOOL_POSITION], turn)
        reached = self.scene.robot.drive(opening)
        for _ in range(SUBSTEPS):
            self.scene.scene.step()
        self._picture = None
        return reached

    def privileged(self) -> dict[str, Float32[np.ndarray, "_"]]:
        """State for evaluation, world frame: poses of source, target, tool, the tool's target and
        the base; centres of mass of the two objects; two contacts of the source, 0 or 1."""
        scene = self.scene
        source, target, base = scene.source, scene.target, scene.robot.body.get_root_pose()
        position, turn = scene.robot.target
        state = self.robot_state() | {
            "tool_target": numbers(base * sapien.Pose(position.tolist(), turn.tolist())),
            "source": numbers(source.entity_pose),
            "target": numbers(target.entity_pose),
            "source_centre": (source.entity_pose * source.cmass_local_pose).p,
            "target_centre": (target.entity_pose * target.cmass_local_pose).p,
            "source_grasped": [scene.grasped(source)],
            "source_touches_other": [scene.touches(source, target)],
        }
        return {name: np.asarray(value, np.float32) for name, value in state.items()}


def setup_of(pair: Pair) -> Setup:
    """Where a pair is handled: what has no corners to stand at is in the sink."""
    return TABLE if pair.corners else SINK_TABLE


def _add_light(scene: sapien.Scene, setup: Setup) -> None:
    # No shadows: with one the first frame differs from the original's by 3.7/255, without by 0.03.
    scene.set_ambient_light([0.3] * 3)
    for direction, grey in setup.lights:
        scene.add_directional_light(list(direction), [grey] * 3)


def _add_table(scene: sapien.Scene) -> None:
    low, high = np.transpose([TABLE_X, TABLE_Y, TABLE_Z])
    half = ((high - low) / 2).tolist()
    brown = sapien.render.RenderMaterial(base_color=[0.55, 0.31, 0.20, 1.0], roughness=0.9)
    builder = scene.create_actor_builder()
    builder.add_box_collision(half_size=half)
    builder.add_box_visual(half_size=half, material=brown)
    builder.set_initial_pose(sapien.Pose(((low + high) / 2).tolist()))
    builder.build_static(name="table")
