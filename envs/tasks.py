"""Success rules and start placements of the tasks, on a simulator's privileged state alone.

The rules are SIMPLER's (shared by every backend); placements are either the twin's `mild` ranges or
SIMPLER's visual-matching grid. World frame, metres; the cabinet stands at (-0.295, 0). Drawers are
here, the others in envs/table_tasks.py and envs/bridge_tasks.py.
"""

import numpy as np

from selfflow.datasets.spec import Task
from selfflow.envs.bridge_tasks import BRIDGE_RULES, draw_bridge_placement
from selfflow.envs.table_tasks import TABLE_RULES, draw_table_placement, words

Privileged = dict[str, np.ndarray]
DRAWERS = ("top", "middle", "bottom")

# Robot x, y, yaw of SIMPLER's nine drawer poses; place-apple uses a0, b0 and c0 only.
DRAWER_POSES = {
    "a0": (0.644, -0.179, -0.03),
    "a1": (0.765, -0.182, -0.02),
    "a2": (0.889, -0.203, -0.06),
    "b0": (0.652, 0.009, 0.0),
    "b1": (0.752, 0.009, 0.0),
    "b2": (0.851, 0.035, 0.0),
    "c0": (0.665, 0.224, 0.0),
    "c1": (0.765, 0.222, -0.025),
    "c2": (0.865, 0.222, -0.025),
}
APPLE_GRID = [(x, y) for x in (-0.08, -0.05, -0.02) for y in (-0.02, 0.03, 0.08)]

MILD = {  # uniform ranges about SIMPLER's middle pose b0 and its apple grid
    "robot_x": (0.64, 0.67),
    "robot_y": (-0.05, 0.07),
    "robot_yaw": (-0.04, 0.04),
    "apple_x": (-0.09, -0.02),
    "apple_y": (-0.03, 0.09),
}


def draw_placement(
    task: Task, kind: str, rng: np.random.Generator, seed: int | None
) -> dict[str, float]:
    """Start placement: `mild` draws from ranges, `grid` takes SIMPLER's cell seed mod cells."""
    if task.name in TABLE_RULES:
        return draw_table_placement(task, kind, rng, seed)
    if task.name in BRIDGE_RULES:
        return draw_bridge_placement(task, kind, rng, seed)
    closed = not task.name.startswith("close_")
    drawers = {f"drawer_{d}": 0.0 if closed or d not in task.name else 0.2 for d in DRAWERS}
    if kind == "mild":
        return {k: float(rng.uniform(*bounds)) for k, bounds in MILD.items()} | drawers
    if kind == "grid":
        poses = list(DRAWER_POSES) if task.name != "open_drawer_place" else ["a0", "b0", "c0"]
        cells = [(pose, xy) for pose in poses for xy in APPLE_GRID]
        if task.name != "open_drawer_place":
            cells = [(pose, APPLE_GRID[4]) for pose in poses]
        pose, (apple_x, apple_y) = cells[
            (rng.integers(len(cells)) if seed is None else seed) % len(cells)
        ]
        x, y, yaw = DRAWER_POSES[pose]
        robot = {"robot_x": x, "robot_y": y, "robot_yaw": yaw}
        return robot | {"apple_x": apple_x, "apple_y": apple_y} | drawers
    raise ValueError(f"placement={kind}: choose mild or grid")


class DrawerRules:
    """open_*_drawer: opening >= 0.15 m; close_*_drawer: opening <= 0.05 m (SIMPLER)."""

    def __init__(self, task: Task) -> None:
        self._opens = task.name.startswith("open_")
        self._drawer = next(i for i, d in enumerate(DRAWERS) if d in task.name)

    def reset(self, privileged: Privileged) -> None:
        self._opening = float(privileged["drawers"][self._drawer])

    def update(self, privileged: Privileged, subtask: int) -> None:
        self._opening = float(privileged["drawers"][self._drawer])

    def success(self) -> bool:
        return self._opening >= 0.15 if self._opens else self._opening <= 0.05

    def progress(self) -> dict[str, float]:
        return {"opening": self._opening}


class OpenDrawerPlaceRules:
    """Second subtask reached, drawer open >= 0.05 m, its floor touched by the apple once."""

    def __init__(self, task: Task) -> None:
        del task  # one rule

    def reset(self, privileged: Privileged) -> None:
        self._touched, self._lifted, self._most_open = False, False, 0.0
        self._height = float(privileged["apple"][2])
        self.update(privileged, 0)

    def update(self, privileged: Privileged, subtask: int) -> None:
        self._subtask = subtask
        self._opening = float(privileged["drawers"][0])
        self._most_open = max(self._most_open, self._opening)
        self._lifted |= bool(privileged["apple"][2] > self._height + 0.05)
        self._touched |= bool(privileged["apple_on_drawer_floor"][0])

    def success(self) -> bool:
        return self._subtask == 1 and self._opening >= 0.05 and self._touched

    def progress(self) -> dict[str, float]:
        return {
            "opening": self._opening,
            "opened": float(self._most_open >= 0.15),
            "lifted": float(self._lifted),
            "touched": float(self._touched),
        }


def instruction(task: Task, subtask: int, placement: dict[str, float]) -> str:
    """What the robot is told, with the names of the placement's objects."""
    return task.instructions[subtask].format(**words(placement))


DRAWER_RULES = {
    **{f"{verb}_{d}_drawer": DrawerRules for verb in ("open", "close") for d in DRAWERS},
    "open_drawer_place": OpenDrawerPlaceRules,
}
RULES = {**DRAWER_RULES, **TABLE_RULES, **BRIDGE_RULES}
