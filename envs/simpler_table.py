"""SIMPLER's table scenes on SAPIEN 3: pick coke can, move near. Import through envs/simpler.py.

World frame, metres; the numbers are SIMPLER's (docs/simpler.md).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import sapien
from jaxtyping import Float32, UInt8

from selfflow.datasets.spec import Task
from selfflow.envs.google_robot import LIGHT_GRIP_SPEED
from selfflow.envs.simpler_scene import Body, GoogleScene, add_light, add_room, finish
from selfflow.envs.simpler_simulator import GoogleSimulator, numbers
from selfflow.envs.simpler_variants import (
    MATCHED,
    MATCHED_TABLE,
    TABLE_ROOM,
    Look,
    looks,
    place_distractors,
    plain_density,
)
from selfflow.envs.table_objects import Placed
from selfflow.envs.tasks import objects, photographs

COKE_DENSITY = 100.0  # kg/m³; the object table's 50 is an empty can
TOY_FRUIT = 200.0  # of move near


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
        look: Look = MATCHED_TABLE,
        distractors: Sequence[Placed] = (),
    ) -> None:
        coke = len(placed) == 1  # move near has two or three, the same can among them
        super().__init__(renderer, photo, contact_offset=0.02 if coke else 0.005)
        add_light(self.scene, look.light)
        add_room(self.scene, look.room or TABLE_ROOM, solid=True)
        self.bodies = [
            self.drop(thing.model, thing.xy, thing.turn, density_of(thing.model, coke, look))
            for thing in placed
        ]
        if look.matched and not coke:
            for body in self.bodies:
                finish(body.entity, specular=0.0, roughness=1.0, metallic=0.0)
        self.settle(self.bodies)
        self.bodies += self._scatter(distractors)
        handled = [body.entity for body in self.bodies]
        self.add_robot(base, urdf_version, size, handled, look.head)
        self.robot.grip_speed = LIGHT_GRIP_SPEED  # all weigh 20 to 60 g
        self.shine()

    def _scatter(self, distractors: Sequence[Placed]) -> list[Body]:
        """Drops one after another straight down, then lets go of one after another."""
        bodies = []
        for thing in distractors:
            body = self.drop(thing.model, thing.xy, thing.turn, plain_density(thing.model))
            body.set_locked_motion_axes([True, True, False, True, True, False])
            self._wait(0.5)
            bodies.append(body)
        for body in bodies:
            self.release(body)
            self._wait(0.5)
        self.calm(bodies)
        return bodies


class SimplerTableScene(GoogleSimulator[TableScene]):
    """The Google robot at a table with a coke can, or with three objects in move near."""

    def __init__(self, *, task: Task, variant: str = MATCHED, **options: Any) -> None:
        super().__init__(variant=variant, **options)
        self._task, self._look = task, looks(task.name)[variant]

    def build(
        self, placement: dict[str, float], base: tuple[float, float, float]
    ) -> tuple[TableScene, dict[str, float]]:
        look = self._look
        placed = objects(self._task, placement)[: 3 if look.third else 2]
        self._radii = [thing.radius for thing in placed]
        others = place_distractors(placed[0], look.distractors, self._variant)
        scene = TableScene(
            sapien.render.RenderSystem(),
            base,
            [replace(thing, model=look.model(thing.model)) for thing in placed],
            self._urdf,
            self._size,
            self._photo(photographs(self._task)[0]),
            look,
            others,
        )
        drawn = {}
        for n, thing in enumerate(others):
            drawn |= {f"distractor_{n}_x": thing.xy[0], f"distractor_{n}_y": thing.xy[1]}
        return scene, drawn

    def privileged(self) -> dict[str, Float32[np.ndarray, "..."]]:
        """State for evaluation, world frame; the first object is the one to move, distractors are
        last and have no radius."""
        scene, first = self.scene, self.scene.bodies[0]
        state = self.robot_state() | {
            "objects": [numbers(body.entity_pose) for body in scene.bodies],
            "radii": self._radii,
            "grasped": [scene.grasped(first)],
            "touches": [scene.touches(first)],
        }
        return {name: np.asarray(value, np.float32) for name, value in state.items()}


def density_of(model: str, coke: bool, look: Look) -> float | None:
    """kg/m³ where a coke can is to be picked (`coke`) or not; None: the object table's."""
    if coke:
        return COKE_DENSITY
    if "apple" in model or model == "orange":
        return TOY_FRUIT
    return None if look.matched else plain_density(model)
