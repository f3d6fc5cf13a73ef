"""Pick the coke can up (pick_coke_can, pick_{horizontal,vertical,standing}_coke_can).

    config = replace(task_pick_coke_can.default_config(), lift=0.05)
    env = make_mujoco(task_named("pick_coke_can"), config=config)

World frame; the robot stands at ROBOT, where the photograph was taken.
"""

from dataclasses import dataclass

import numpy as np

from selfflow.datasets.spec import Task
from selfflow.envs.placements import (
    ATTEMPTS,
    KEEP_AWAY,
    Privileged,
    Range,
    cell_number,
    check_ranges,
    no_room,
)
from selfflow.envs.table_objects import COKE, HALF_TURN, QUARTER_TURN, STOOD_UP, Placed

PHOTOGRAPHS = ("google_coke_can_real_eval_1",)
ROBOT = {"robot_x": 0.35, "robot_y": 0.20, "robot_yaw": 0.0}
# Horizontal: SIMPLER's lr_switch, the can lies across the robot's view; vertical: along it.
ORIENTATIONS = {"horizontal": HALF_TURN, "vertical": QUARTER_TURN, "standing": STOOD_UP}
GRID_X, GRID_Y = (-0.35, -0.12), (-0.02, 0.42)
GRID = [(float(x), float(y)) for x in np.linspace(*GRID_X, 5) for y in np.linspace(*GRID_Y, 5)]


@dataclass(frozen=True)
class Config:
    """SIMPLER's thresholds and where the can is drawn; lengths in m. Its grid stays."""

    lift: float = 0.01  # of the can above its start, while it is held and touches nothing else
    high: float = 0.02  # lifted so high ...
    high_steps: int = 5  # ... in so many steps, which need not follow each other, also counts
    can_x: Range = GRID_X
    can_y: Range = GRID_Y
    keep_away: float = KEEP_AWAY  # of a drawn can from every cell of the grid

    def __post_init__(self) -> None:
        check_ranges(self)


def default_config() -> Config:
    """SIMPLER's rule; cans anywhere in the grid's extent."""
    return Config()


def draw(
    task: Task, config: Config, kind: str, rng: np.random.Generator, seed: int | None
) -> dict[str, float]:
    """Where the can starts, and how: `orientation`, an index into ORIENTATIONS.

    `grid` has 25 cells, pick_coke_can's 75, by orientation; other kinds are drawn away from them.
    """
    fixed = [i for i, orientation in enumerate(ORIENTATIONS) if orientation in task.name]
    choices = fixed or list(range(len(ORIENTATIONS)))
    if kind == "grid":
        turn, cell = divmod(cell_number(len(choices) * len(GRID), rng, seed), len(GRID))
        orientation, (x, y) = choices[turn], GRID[cell]
    else:
        orientation = choices[rng.integers(len(choices))]
        x, y = _draw_place(config, rng)
    return ROBOT | {"can_x": x, "can_y": y, "orientation": float(orientation)}


def _draw_place(config: Config, rng: np.random.Generator) -> tuple[float, float]:
    for _ in range(ATTEMPTS):
        x, y = float(rng.uniform(*config.can_x)), float(rng.uniform(*config.can_y))
        if np.linalg.norm(np.subtract(GRID, (x, y)), axis=1).min() > config.keep_away:
            return x, y
    raise no_room(config)


def objects(placement: dict[str, float]) -> list[Placed]:
    """The can."""
    turn = list(ORIENTATIONS.values())[round(placement["orientation"])]
    return [Placed(COKE, (placement["can_x"], placement["can_y"]), turn)]


class Rules:
    """Lifted in the grasp and touching nothing else, or lifted higher so for some steps."""

    def __init__(self, task: Task, config: Config | None = None) -> None:
        del task  # one rule
        self._config = config or default_config()

    def reset(self, privileged: Privileged) -> None:
        self._start = float(privileged["objects"][0, 2])
        self._gain, self._lifted, self._ever_grasped, self._high = 0.0, False, False, 0
        self._tool = _tool_to_can(privileged)

    def step(self, privileged: Privileged, subtask: int) -> None:
        del subtask  # one only
        grasped = bool(privileged["grasped"][0])
        # Once lifted free it stays lifted, whatever it brushes, until the grasp is lost.
        self._lifted = grasped and (self._lifted or not privileged["touches"][0])
        self._gain = float(privileged["objects"][0, 2]) - self._start
        self._ever_grasped |= grasped
        self._high += self._lifted and self._gain > self._config.high
        self._tool = _tool_to_can(privileged)

    def success(self) -> bool:
        lifted = self._lifted and self._gain > self._config.lift
        return lifted or self._high >= self._config.high_steps

    def progress(self) -> dict[str, float]:
        """The tool's way to the can and its lift (m), whether it was ever held, high steps."""
        return {
            "tool_to_can": self._tool,
            "grasped": float(self._ever_grasped),
            "lift": self._gain,
            "lifted_steps": float(self._high),
        }


def _tool_to_can(privileged: Privileged) -> float:
    return float(np.linalg.norm(privileged["tool"][:3] - privileged["objects"][0, :3]))
