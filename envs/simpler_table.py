"""SIMPLER's table scenes on SAPIEN 3: pick coke can, move near. Import through envs/simpler.py.

World frame, metres; the numbers are SIMPLER's (docs/simpler.md).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import sapien
from jaxtyping import Float32, UInt8

from selfflow.datasets.spec import Task
from selfflow.envs.google_robot import LIGHT_GRIP_SPEED
from selfflow.envs.simpler_assets import stage
from selfflow.envs.simpler_scene import GoogleScene, finish
from selfflow.envs.simpler_simulator import GoogleSimulator, numbers
from selfflow.envs.table_tasks import COKE, Placed, objects

STAGE = "google_pick_coke_can_1_v4"
# The stage's mesh has y up, and the robot's place elsewhere.
STAGE_POSE = sapien.Pose([1.6616, 3.0337, 0.0], [np.sqrt(0.5), np.sqrt(0.5), 0.0, 0.0])
COKE_DENSITY = 100.0  # kg/m³; the object table's 50 is an empty can
NEAR_DENSITY = {"baked_apple_v2": 200.0, "orange": 200.0}
# Direction, brightness. The original's pictures show no shadow.
LIGHTS = (((0.0, 0.0, -1.0), 2.2), ((-1.0, -0.5, -1.0), 0.7), ((1.0, 1.0, -1.0), 0.7))
COKE_PHOTO, NEAR_PHOTO = "google_coke_can_real_eval_1", "google_move_near_real_eval_1"


class TableScene(GoogleScene):
    """One episode's table, with objects dropped on it."""

    def __init__(
        self,
        renderer: sapien.render.RenderSystem,
        base: tuple[float, float, float],
        placed: Sequence[Placed],
        urdf_version: str,
        size: tuple[int, int],
        photo: UInt8[np.ndarray, "H W 3"] | None,
    ) -> None:
        coke = placed[0].model == COKE
        super().__init__(renderer, photo, contact_offset=0.02 if coke else 0.005)
        _add_light(self.scene)
        _add_stage(self.scene)
        self.bodies = [
            self.drop(
                thing.model,
                thing.xy,
                thing.turn,
                COKE_DENSITY if coke else NEAR_DENSITY.get(thing.model),
            )
            for thing in placed
        ]
        if not coke:
            for body in self.bodies:
                finish(body.entity, specular=0.0, roughness=1.0, metallic=0.0)
        self.settle(self.bodies)
        self.add_robot(base, urdf_version, size, [body.entity for body in self.bodies])
        self.robot.grip_speed = LIGHT_GRIP_SPEED  # all weigh 20 to 60 g
        for link in self.robot.body.links:
            finish(link.entity, specular=0.9, roughness=0.3)


class SimplerTableScene(GoogleSimulator[TableScene]):
    """The Google robot at a table with a coke can, or with three objects in move near."""

    def __init__(self, *, task: Task, **options: Any) -> None:
        super().__init__(**options)
        self._task = task

    def build(
        self, placement: dict[str, float], base: tuple[float, float, float]
    ) -> tuple[TableScene, dict[str, float]]:
        placed = objects(self._task, placement)
        photo = NEAR_PHOTO if self._task.name == "move_near" else COKE_PHOTO
        self._radii = [thing.radius for thing in placed]
        scene = TableScene(
            sapien.render.RenderSystem(), base, placed, self._urdf, self._size, self._photo(photo)
        )
        return scene, {}

    def privileged(self) -> dict[str, Float32[np.ndarray, "..."]]:
        """State for evaluation, world frame; the first object is the one to move."""
        scene, first = self.scene, self.scene.bodies[0]
        state = self.robot_state() | {
            "objects": [numbers(body.entity_pose) for body in scene.bodies],
            "radii": self._radii,
            "grasped": [scene.grasped(first)],
            "touches": [scene.touches(first)],
        }
        return {name: np.asarray(value, np.float32) for name, value in state.items()}


def _add_light(scene: sapien.Scene) -> None:
    scene.set_ambient_light([0.3] * 3)
    for direction, brightness in LIGHTS:
        scene.add_directional_light(list(direction), [brightness] * 3)


def _add_stage(scene: sapien.Scene) -> None:
    mesh = str(stage(STAGE))
    builder = scene.create_actor_builder()
    builder.add_nonconvex_collision_from_file(mesh)
    builder.add_visual_from_file(mesh)
    builder.set_initial_pose(STAGE_POSE)
    builder.build_static(name="arena")
