"""Where robot, apple and drawers of the cabinet's tasks start; what stands behind in training.

World frame, metres; the cabinet stands at (-0.295, 0). Its tasks are envs/task_open_drawer.py,
task_close_drawer.py and task_open_drawer_place.py.
"""

from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float

from selfflow.datasets.spec import Task, UserError
from selfflow.envs.placements import (
    ATTEMPTS,
    KEEP_AWAY,
    Range,
    cell_number,
    check_ranges,
    no_room,
)

Pose = tuple[float, float, float]  # x, y, yaw of the robot

DRAWERS = ("top", "middle", "bottom")
# Of the middle of a drawer's front.
FRONT_HEIGHTS = {"top": 0.685, "middle": 0.440, "bottom": 0.195}
HALF_FRONT = (0.3075, 0.07)  # half its width and height
FRONT_X = 0.0175  # of its outer face while the drawer is shut

# SIMPLER's nine drawer poses, a photograph was taken from each.
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
# Variant aggregation's; place-apple uses the nearest three.
VARIANT_POSES = tuple((x, y, 0.0) for x in (0.65, 0.75, 0.85) for y in (-0.2, 0.0, 0.2))
# Robot x, y of every evaluation.
ROBOT_CELLS = [pose[:2] for pose in (*DRAWER_POSES.values(), *VARIANT_POSES)]
APPLE_GRID = tuple((x, y) for x in (-0.08, -0.05, -0.02) for y in (-0.02, 0.03, 0.08))
NO_APPLE = APPLE_GRID[4]  # the entry of a task without one

PLAIN = -1.0  # in the place of a photograph's number
PLAIN_COLOURS = [f"{end}_{channel}" for end in ("top", "bottom") for channel in "rgb"]


@dataclass(frozen=True)
class Ranges:
    """Where the start is drawn from, (low, high) in m, the yaw's in rad."""

    robot_x: Range
    robot_y: Range
    robot_yaw: Range
    apple_x: Range
    apple_y: Range

    def __post_init__(self) -> None:
        check_ranges(self)

    def draw(self, rng: np.random.Generator) -> dict[str, float]:
        """A start, every entry uniform in its range."""
        return {f.name: float(rng.uniform(*getattr(self, f.name))) for f in fields(self)}

    def hold(self, start: dict[str, float]) -> bool:
        """Whether every entry of a start is within its range."""
        ends = {f.name: getattr(self, f.name) for f in fields(self)}
        return all(low <= start[name] <= high for name, (low, high) in ends.items())


# About SIMPLER's middle pose b0 and its apple grid.
MILD = Ranges((0.64, 0.67), (-0.05, 0.07), (-0.04, 0.04), (-0.09, -0.02), (-0.03, 0.09))
# About all that is evaluated.
TRAIN = Ranges((0.62, 0.90), (-0.23, 0.26), (-0.08, 0.04), (-0.10, 0.0), (-0.04, 0.10))


@dataclass(frozen=True)
class CabinetConfig:
    """Where a cabinet task starts, and what training shows. The cells of `grid` and `variants` are
    SIMPLER's and stay."""

    mild: Ranges = MILD
    train: Ranges = TRAIN
    # Where a photograph is shown the robot stands about the pose that it was taken from (m, m,
    # rad); mostly nearer, since from further away the arm does not get to the apple.
    photo_x: Range = (-0.12, 0.03)
    photo_y: Range = (-0.04, 0.04)
    photo_yaw: Range = (-0.02, 0.02)
    shown: tuple[str, ...] = tuple(DRAWER_POSES)  # whose photographs training shows
    plain_share: float = 0.5  # of training episodes with plain colours instead of one
    keep_away: float = KEEP_AWAY  # m, of training's robots and apples from every cell
    reach: float = float("inf")  # m at most from the robot to the apple in training
    opening: float = 0.0  # m, of the task's drawer at the start
    train_opening: Range = (0.0, 0.0)  # the same in training

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.shown or not set(self.shown) <= DRAWER_POSES.keys():
            raise UserError(f"shown={list(self.shown)}: must be some of {', '.join(DRAWER_POSES)}")
        if not 0 <= self.plain_share <= 1:
            raise UserError(f"plain_share={self.plain_share}: must be between 0 and 1")

    @property
    def photographs(self) -> tuple[str, ...]:
        """Names (envs/simpler_assets.py) of those that training shows."""
        return tuple(f"open_drawer_{pose}" for pose in DRAWER_POSES if pose in self.shown)


@dataclass(frozen=True)
class Cells:
    """What SIMPLER evaluates a task on."""

    poses: tuple[str, ...] = tuple(DRAWER_POSES)  # of visual matching
    variants: tuple[Pose, ...] = VARIANT_POSES
    apples: tuple[tuple[float, float], ...] = ()  # x, y; none in a task without an apple


def drawer_of(task: Task) -> str:
    """The drawer that a task is about."""
    return next(drawer for drawer in DRAWERS if drawer in task.name)


def draw_cabinet(
    config: CabinetConfig,
    cells: Cells,
    drawer: str,
    kind: str,
    rng: np.random.Generator,
    seed: int | None,
) -> dict[str, float]:
    """A start of one of the kinds of envs.tasks.draw_placement, whose task is about `drawer`."""
    if kind == "train":
        return _draw_train(config, cells, drawer, rng)
    start = config.mild.draw(rng) if kind == "mild" else _cell(cells, kind, rng, seed)
    return start | _openings(drawer, config.opening)


def _cell(cells: Cells, kind: str, rng: np.random.Generator, seed: int | None) -> dict[str, float]:
    poses = [DRAWER_POSES[pose] for pose in cells.poses] if kind == "grid" else cells.variants
    starts = [(*pose, *apple) for pose in poses for apple in cells.apples or (NO_APPLE,)]
    names = [field.name for field in fields(Ranges)]
    return dict(zip(names, starts[cell_number(len(starts), rng, seed)], strict=True))


def _draw_train(
    config: CabinetConfig, cells: Cells, drawer: str, rng: np.random.Generator
) -> dict[str, float]:
    plain = rng.random() < config.plain_share
    pose = config.shown[rng.integers(len(config.shown))]
    start = _draw_fitting(config, cells, None if plain else pose, rng)
    photo = PLAIN if plain else float(list(DRAWER_POSES).index(pose))
    look = {"photo": photo} | {name: float(rng.uniform(20, 235)) for name in PLAIN_COLOURS}
    return start | _openings(drawer, float(rng.uniform(*config.train_opening))) | look


def _draw_fitting(
    config: CabinetConfig, cells: Cells, pose: str | None, rng: np.random.Generator
) -> dict[str, float]:
    """Robot and apple within training's ranges, the robot about the photograph's pose if any."""
    for _ in range(ATTEMPTS):
        start = config.train.draw(rng)
        if pose is not None:
            beside = {"x": config.photo_x, "y": config.photo_y, "yaw": config.photo_yaw}
            for (name, ends), value in zip(beside.items(), DRAWER_POSES[pose], strict=True):
                start[f"robot_{name}"] = value + float(rng.uniform(*ends))
        if config.train.hold(start) and _apart(config, cells, start):
            return start
    raise no_room(config)


def _apart(config: CabinetConfig, cells: Cells, start: dict[str, float]) -> bool:
    """Away from the robot's and apple's places in the evaluation, the apple in reach."""
    robot, apple = (np.array([start[f"{k}_x"], start[f"{k}_y"]]) for k in ("robot", "apple"))
    away = np.linalg.norm(ROBOT_CELLS - robot, axis=1).min() >= config.keep_away
    if cells.apples:
        away &= np.linalg.norm(cells.apples - apple, axis=1).min() >= config.keep_away
    return bool(away and np.linalg.norm(robot - apple) <= config.reach)


def _openings(drawer: str, opening: float) -> dict[str, float]:
    """All drawers are shut, but the task's."""
    return {f"drawer_{d}": opening if d == drawer else 0.0 for d in DRAWERS}


def distance_to_front(tool: Float[np.ndarray, "7"], drawer: str, opening: float) -> float:
    """m from the tool to the nearest point of a drawer's front, which is open so far (m)."""
    middle = np.array([FRONT_X + opening, 0.0, FRONT_HEIGHTS[drawer]])
    return float(np.linalg.norm(np.maximum(np.abs(tool[:3] - middle) - (0.0, *HALF_FRONT), 0.0)))
