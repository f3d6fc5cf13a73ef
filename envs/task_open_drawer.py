"""Open a drawer (open_top_drawer, open_middle_drawer, open_bottom_drawer).

    config = replace(task_open_drawer.default_config(), opened=0.10)
    env = make_mujoco(task_named("open_top_drawer"), config=config)

World frame, metres; where it starts: envs/cabinet_placements.py.
"""

from dataclasses import dataclass

import numpy as np

from selfflow.datasets.spec import Task
from selfflow.envs.cabinet_placements import (
    DRAWERS,
    CabinetConfig,
    Cells,
    distance_to_front,
    draw_cabinet,
    drawer_of,
)
from selfflow.envs.placements import Privileged

CELLS = Cells()


@dataclass(frozen=True)
class Config(CabinetConfig):
    """CabinetConfig says where robot and drawer start."""

    opened: float = 0.15  # m, from which on the drawer is open (SIMPLER)


def default_config() -> Config:
    """SIMPLER's rule, our placements."""
    return Config()


def draw(
    task: Task, config: Config, kind: str, rng: np.random.Generator, seed: int | None
) -> dict[str, float]:
    """Where robot and drawers start, by the kinds of envs.tasks.draw_placement."""
    return draw_cabinet(config, CELLS, drawer_of(task), kind, rng, seed)


class Rules:
    """Success while the drawer is open, however it came to be."""

    def __init__(self, task: Task, config: Config | None = None) -> None:
        self._config, self._drawer = config or default_config(), drawer_of(task)

    def reset(self, privileged: Privileged) -> None:
        self._most_open = 0.0
        self.step(privileged, 0)

    def step(self, privileged: Privileged, subtask: int) -> None:
        del subtask  # one only
        self._opening = float(privileged["drawers"][DRAWERS.index(self._drawer)])
        self._most_open = max(self._most_open, self._opening)
        self._tool = distance_to_front(privileged["tool"], self._drawer, self._opening)

    def success(self) -> bool:
        return self._opening >= self._config.opened

    def progress(self) -> dict[str, float]:
        """Opening and the tool's way to the front (m); whether it has been open yet."""
        return {
            "tool_to_front": self._tool,
            "opening": self._opening,
            "opened": float(self._most_open >= self._config.opened),
        }
