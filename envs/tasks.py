"""Success rules and start placements of the tasks, on a simulator's privileged state alone.

The rules are SIMPLER's (shared by every backend); placements are the twin's `mild` ranges,
SIMPLER's visual-matching `grid`, or `train`: for demonstrations in its scenes, away from the grid.
World frame, metres; the cabinet stands at (-0.295, 0). Drawers are here, the others in
envs/table_tasks.py and envs/bridge_tasks.py.
"""

import numpy as np

from selfflow.datasets.spec import Task
from selfflow.envs.bridge_tasks import BRIDGE_RULES, bridge_photo, draw_bridge_placement
from selfflow.envs.simpler_assets import URDF_VERSIONS
from selfflow.envs.table_tasks import (
    KEEP_AWAY,
    TABLE_RULES,
    draw_table_placement,
    table_photo,
    words,
)

Privileged = dict[str, np.ndarray]
DRAWERS = ("top", "middle", "bottom")

# Robot x, y, yaw of SIMPLER's nine drawer poses, a photograph was taken from each.
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
PLACE_POSES = ("a0", "b0", "c0")  # place-apple's
APPLE_GRID = [(x, y) for x in (-0.08, -0.05, -0.02) for y in (-0.02, 0.03, 0.08)]
OPENING = 0.2  # m, of a drawer that is to be closed
# Robot x, y, yaw of variant aggregation; place-apple uses the nearest three.
VARIANT_POSES = [(x, y, 0.0) for x in (0.65, 0.75, 0.85) for y in (-0.2, 0.0, 0.2)]
# Robot x, y of every evaluation.
ROBOT_CELLS = [pose[:2] for pose in (*DRAWER_POSES.values(), *VARIANT_POSES)]

MILD = {  # uniform ranges about SIMPLER's middle pose b0 and its apple grid
    "robot_x": (0.64, 0.67),
    "robot_y": (-0.05, 0.07),
    "robot_yaw": (-0.04, 0.04),
    "apple_x": (-0.09, -0.02),
    "apple_y": (-0.03, 0.09),
}

TRAIN = {  # uniform ranges about all evaluation cells
    "robot_x": (0.62, 0.90),
    "robot_y": (-0.23, 0.26),
    "robot_yaw": (-0.08, 0.04),
    "apple_x": (-0.10, 0.0),
    "apple_y": (-0.04, 0.10),
}
# Where a photograph is shown the robot stands about the pose that it was taken from; mostly nearer,
# since from beyond REACH (m, robot to apple) the arm does not get to the apple.
TRAIN_BY_PHOTO = {"robot_x": (-0.12, 0.03), "robot_y": (-0.04, 0.04), "robot_yaw": (-0.02, 0.02)}
REACH = 0.84
PLAIN_SHARE = 0.5  # of the episodes with a plain background instead of a photograph
PLAIN = -1.0  # in the place of a photograph's number
PLAIN_COLOURS = [f"{end}_{channel}" for end in ("top", "bottom") for channel in "rgb"]
TRAIN_OPENING = (0.12, 0.21)  # m; too wide open, there is no room for the arm to push from


def draw_placement(
    task: Task, kind: str, rng: np.random.Generator, seed: int | None
) -> dict[str, float]:
    """Where everything starts, and in training what the scene looks like.

    | kind | |
    |---|---|
    | mild | drawn from ranges |
    | grid | SIMPLER's cell seed mod cells |
    | variants | the same of variant aggregation: the robot stands elsewhere before the cabinet |
    | train | drawn from ranges about the grid, KEEP_AWAY from every cell; further entries below |

    Google robot: `colouring`, an index into URDF_VERSIONS. Drawers also: `photo`, an index into
    DRAWER_POSES or PLAIN, and the colours of a plain background, 0 to 255, top_r .. bottom_b.
    """
    if kind not in ("mild", "grid", "variants", "train"):
        raise ValueError(f"placement={kind}: choose mild, grid, variants or train")
    if kind == "variants" and task.name not in DRAWER_RULES:
        kind = "grid"
    if task.name in BRIDGE_RULES:
        return draw_bridge_placement(task, kind, rng, seed)
    if kind == "train":
        start = draw_table_placement if task.name in TABLE_RULES else _draw_train
        drawn = start(task, kind, rng, seed)
        return drawn | {"colouring": float(rng.integers(len(URDF_VERSIONS)))}
    if task.name in TABLE_RULES:
        return draw_table_placement(task, kind, rng, seed)
    return _draw_mild(task, rng) if kind == "mild" else _draw_cell(task, kind, rng, seed)


def photographs(task: Task) -> tuple[str, ...]:
    """Names (envs/simpler_assets.py) of those that training placements show.

    Place-apple is evaluated on a0, b0 and c0, which are left out. The other drawer tasks, coke can,
    move near and WidowX are evaluated on the very photographs that are shown here.
    """
    if task.name in BRIDGE_RULES:
        return (bridge_photo(task),)
    if task.name in TABLE_RULES:
        return (table_photo(task),)
    return tuple(f"open_drawer_{pose}" for pose in _photo_poses(task))


def _photo_poses(task: Task) -> list[str]:
    return [pose for pose in DRAWER_POSES if not (_places(task) and pose in PLACE_POSES)]


def _places(task: Task) -> bool:
    return task.name == "open_drawer_place"


def _drawers(task: Task, opening: float) -> dict[str, float]:
    """All are closed, but the one that the task closes."""
    closes = task.name.startswith("close_")
    return {f"drawer_{d}": opening if closes and d in task.name else 0.0 for d in DRAWERS}


def _draw_mild(task: Task, rng: np.random.Generator) -> dict[str, float]:
    return _uniform(MILD, rng) | _drawers(task, OPENING)


def _draw_cell(
    task: Task, kind: str, rng: np.random.Generator, seed: int | None
) -> dict[str, float]:
    if kind == "variants":
        poses = VARIANT_POSES[:3] if _places(task) else VARIANT_POSES
    else:
        poses = [DRAWER_POSES[p] for p in (PLACE_POSES if _places(task) else DRAWER_POSES)]
    apples = APPLE_GRID if _places(task) else APPLE_GRID[4:5]
    cells = [(pose, apple) for pose in poses for apple in apples]
    pose, apple = cells[(rng.integers(len(cells)) if seed is None else seed) % len(cells)]
    start = dict(zip(MILD, (*pose, *apple), strict=True))  # its order of names
    return start | _drawers(task, OPENING)


def _draw_train(
    task: Task, kind: str, rng: np.random.Generator, seed: int | None
) -> dict[str, float]:
    del kind, seed
    plain, choices = rng.random() < PLAIN_SHARE, _photo_poses(task)
    pose = choices[rng.integers(len(choices))]
    photo = PLAIN if plain else float(list(DRAWER_POSES).index(pose))
    while True:
        start = _uniform(TRAIN, rng)
        if not plain:
            beside = _uniform(TRAIN_BY_PHOTO, rng)
            at = zip(beside.items(), DRAWER_POSES[pose], strict=True)
            start |= {name: value + off for (name, off), value in at}
        if _fit_for_training(task, start):
            break
    look = {"photo": photo} | {name: float(rng.uniform(20, 235)) for name in PLAIN_COLOURS}
    return start | _drawers(task, float(rng.uniform(*TRAIN_OPENING))) | look


def _fit_for_training(task: Task, start: dict[str, float]) -> bool:
    """Within the ranges, away from the evaluation's robot and apple places, the apple in reach."""
    robot, apple = (np.array([start[f"{k}_x"], start[f"{k}_y"]]) for k in ("robot", "apple"))
    inside = all(low <= start[name] <= high for name, (low, high) in TRAIN.items())
    away = np.linalg.norm(ROBOT_CELLS - robot, axis=1).min() >= KEEP_AWAY
    if _places(task):
        away &= np.linalg.norm(APPLE_GRID - apple, axis=1).min() >= KEEP_AWAY
        away &= np.linalg.norm(robot - apple) <= REACH
    return bool(inside and away)


def _uniform(ranges: dict[str, tuple[float, float]], rng: np.random.Generator) -> dict[str, float]:
    return {name: float(rng.uniform(*bounds)) for name, bounds in ranges.items()}


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
