"""Close a drawer (close_top_drawer, close_middle_drawer, close_bottom_drawer), the others are shut.

    config = replace(task_close_drawer.default_config(), shut=0.02)
    env = make_mujoco(task_named("close_top_drawer"), config=config)

World frame, metres; where it starts: envs/cabinet_placements.py.
"""

from dataclasses import dataclass

import numpy as np

from selfflow.datasets.spec import Task
from selfflow.envs import cabinet_placements as cabinet
from selfflow.envs.placements import Privileged, Range

CELLS = cabinet.Cells()


@dataclass(frozen=True)
class Config(cabinet.CabinetConfig):
    """CabinetConfig says where the robot starts."""

    shut: float = 0.05  # m, up to which the drawer is shut (SIMPLER)
    opening: float = 0.2  # m, at the start
    train_opening: Range = (0.12, 0.21)  # m; wider open there is no room for the arm to push from


def default_config() -> Config:
    """SIMPLER's rule, our placements."""
    return Config()


def draw(
    task: Task, config: Config, kind: str, rng: np.random.Generator, seed: int | None
) -> dict[str, float]:
    """The start: robot and drawers; kinds as in envs.tasks.draw_placement."""
    drawer = cabinet.drawer_of(task)
    return cabinet.draw_cabinet(config, CELLS, drawer, kind, rng, seed)


class Rules:
    """Success while the drawer is shut."""

    def __init__(self, task: Task, config: Config | None = None) -> None:
        self._drawer = cabinet.drawer_of(task)
        self._config = config or default_config()

    def reset(self, privileged: Privileged) -> None:
        self._start = self._see(privileged)

    def step(self, privileged: Privileged, subtask: int) -> None:
        del subtask  # one only
        self._see(privileged)

    def _see(self, privileged: Privileged) -> float:
        self._opening = float(privileged["drawers"][cabinet.DRAWERS.index(self._drawer)])
        tool = privileged["tool"]
        self._reach = cabinet.distance_to_front(tool, self._drawer, self._opening)
        return self._opening

    def success(self) -> bool:
        return self._opening <= self._config.shut

    def progress(self) -> dict[str, float]:
        """m: from the tool to the front, how far it is open, and how far it was pushed in."""
        pushed = self._start - self._opening
        return {"tool_to_front": self._reach, "opening": self._opening, "pushed": pushed}
