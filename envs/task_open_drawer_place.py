"""Open the top drawer and place the apple in it (open_drawer_place): two subtasks.

    config = replace(task_open_drawer_place.default_config(), held_open=0.10)
    env = make_mujoco(task_named("open_drawer_place"), config=config)

World frame, metres; where it starts: envs/cabinet_placements.py.
"""

from dataclasses import dataclass

import numpy as np

from selfflow.datasets.spec import Task
from selfflow.envs import cabinet_placements as cabinet
from selfflow.envs.placements import Privileged

PLACE_POSES = ("a0", "b0", "c0")
CELLS = cabinet.Cells(PLACE_POSES, cabinet.VARIANT_POSES[:3], cabinet.APPLE_GRID)
FLOOR = np.array([-0.295, 0.0, 0.635])  # m, middle of the drawer's floor while it is shut


@dataclass(frozen=True)
class Config(cabinet.CabinetConfig):
    """CabinetConfig says where robot and apple start. Lengths in m."""

    held_open: float = 0.05  # opening of the drawer from which on the apple counts (SIMPLER)
    opened: float = 0.15  # opening from which on the first subtask is done, for progress only
    lifted: float = 0.05  # of the apple above its start, for progress only
    reach: float = 0.84
    # the photographs it is evaluated on are not shown in training
    shown: tuple[str, ...] = tuple(p for p in cabinet.DRAWER_POSES if p not in PLACE_POSES)


def default_config() -> Config:
    """SIMPLER's rule, our placements."""
    return Config()


def draw(
    task: Task, config: Config, kind: str, rng: np.random.Generator, seed: int | None
) -> dict[str, float]:
    """Where robot, apple and drawers start; kinds: envs.tasks.draw_placement."""
    del task  # one only
    return cabinet.draw_cabinet(config, CELLS, "top", kind, rng, seed)


class Rules:
    """Second subtask reached, the drawer open, its floor touched by the apple once."""

    def __init__(self, task: Task, config: Config | None = None) -> None:
        del task  # one rule
        self._config = config or default_config()

    def reset(self, privileged: Privileged) -> None:
        self._touched, self._lifted, self._most_open = False, False, 0.0
        self._height = float(privileged["apple"][2])
        self.step(privileged, 0)

    def step(self, privileged: Privileged, subtask: int) -> None:
        self._subtask = subtask
        self._opening = float(privileged["drawers"][0])
        self._most_open = max(self._most_open, self._opening)
        self._lifted |= bool(privileged["apple"][2] > self._height + self._config.lifted)
        self._touched |= bool(privileged["apple_on_drawer_floor"][0])
        apple, tool = privileged["apple"][:3], privileged["tool"]
        floor = FLOOR + np.array([self._opening, 0.0, 0.0])
        self._ways = {  # m
            "tool_to_front": cabinet.distance_to_front(tool, "top", self._opening),
            "tool_to_apple": float(np.linalg.norm(tool[:3] - apple)),
            "apple_to_floor": float(np.linalg.norm(apple - floor)),
        }

    def success(self) -> bool:
        return self._subtask == 1 and self._opening >= self._config.held_open and self._touched

    def progress(self) -> dict[str, float]:
        """Ways still to go and the opening (m); what has happened yet, 0 or 1."""
        return self._ways | {
            "opening": self._opening,
            "opened": float(self._most_open >= self._config.opened),
            "lifted": float(self._lifted),
            "touched": float(self._touched),
        }
