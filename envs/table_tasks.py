"""The Google robot's table tasks, coke can and move near: rules, placements, instructions.

The numbers are SIMPLER's. World frame, metres; the robot stands at x = 0.35 and looks along -x.
"""

from dataclasses import dataclass

import numpy as np

from selfflow.datasets.rotations import rotate
from selfflow.datasets.spec import Task

Privileged = dict[str, np.ndarray]
Quaternion = tuple[float, float, float, float]  # w, x, y, z

HALF = float(np.sqrt(0.5))
AS_MODELLED: Quaternion = (1.0, 0.0, 0.0, 0.0)
STOOD_UP: Quaternion = (HALF, HALF, 0.0, 0.0)  # cans and bottles are modelled lying along y
QUARTER_TURN: Quaternion = (HALF, 0.0, 0.0, HALF)
HALF_TURN: Quaternion = (0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Model:
    """A movable object: what instructions call it, its box (m) as modelled, how it is set down."""

    name: str
    box: tuple[float, float, float]
    turn: Quaternion


CAN_BOX = (0.066, 0.123, 0.066)
MODELS = {
    "opened_coke_can": Model("coke can", CAN_BOX, STOOD_UP),
    "baked_opened_coke_can_v2": Model("coke can", CAN_BOX, STOOD_UP),
    "baked_opened_pepsi_can_v2": Model("pepsi can", CAN_BOX, STOOD_UP),
    "baked_opened_7up_can_v2": Model("7up can", CAN_BOX, STOOD_UP),
    "baked_opened_redbull_can_v2": Model("redbull can", (0.0585, 0.172, 0.0585), STOOD_UP),
    "blue_plastic_bottle": Model(
        "blue plastic bottle", (0.0601, 0.203, 0.0605), (0.5, 0.5, 0.5, 0.5)
    ),
    "baked_apple_v2": Model("apple", (0.08, 0.08, 0.08), AS_MODELLED),
    "orange": Model("orange", (0.07, 0.07, 0.068), QUARTER_TURN),
    "baked_sponge_v2": Model("sponge", (0.07, 0.10, 0.036), QUARTER_TURN),
}

COKE = "opened_coke_can"
COKE_PHOTO, NEAR_PHOTO = "google_coke_can_real_eval_1", "google_move_near_real_eval_1"
COKE_ROBOT = (0.35, 0.20, 0.0)  # x, y, yaw
# Horizontal: SIMPLER's lr_switch, the can lies across the robot's view; vertical: along it.
ORIENTATIONS = {"horizontal": HALF_TURN, "vertical": QUARTER_TURN, "standing": STOOD_UP}
COKE_X, COKE_Y = (-0.35, -0.12), (-0.02, 0.42)
COKE_GRID = [(float(x), float(y)) for x in np.linspace(*COKE_X, 5) for y in np.linspace(*COKE_Y, 5)]

NEAR_ROBOT = (0.35, 0.21, -0.09)
TRIPLETS = (
    ("blue_plastic_bottle", "baked_opened_pepsi_can_v2", "orange"),
    ("baked_opened_7up_can_v2", "baked_apple_v2", "baked_sponge_v2"),
    ("baked_opened_coke_can_v2", "baked_opened_redbull_can_v2", "baked_apple_v2"),
    ("baked_sponge_v2", "blue_plastic_bottle", "baked_opened_7up_can_v2"),
    ("orange", "baked_opened_pepsi_can_v2", "baked_opened_redbull_can_v2"),
)
PAIRS = ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))  # (source, target) within a triplet
LAYOUTS = (
    ((-0.33, 0.04), (-0.33, 0.34), (-0.13, 0.19)),
    ((-0.13, 0.04), (-0.33, 0.19), (-0.13, 0.34)),
)
NEAR_CELLS = len(TRIPLETS) * len(PAIRS) * len(LAYOUTS)
NEAR_SPREAD = 0.03  # m, of drawn placements about a layout
KEEP_AWAY = 0.015  # m at least between a drawn placement's objects and the grid's


def draw_table_placement(
    task: Task, kind: str, rng: np.random.Generator, seed: int | None
) -> dict[str, float]:
    """Where the robot and the objects start.

    | kind | coke | move near |
    |---|---|---|
    | mild, train | can anywhere in SIMPLER's range | any triplet, pair, layout, objects ± 3 cm |
    | grid | seed mod 25 cells; pick_coke_can: 75, by orientation | seed mod 60 episodes |

    Drawn ones keep KEEP_AWAY from the grid: demonstrations are not recorded on the test's cells.
    The robot stands where the photograph was taken.
    """
    draw = _draw_near if task.name == "move_near" else _draw_coke
    return draw(task, kind, rng, seed)


def table_photo(task: Task) -> str:
    """The photograph behind the table; the robot stands where it was taken from."""
    return NEAR_PHOTO if task.name == "move_near" else COKE_PHOTO


def _draw_coke(
    task: Task, kind: str, rng: np.random.Generator, seed: int | None
) -> dict[str, float]:
    fixed = [i for i, orientation in enumerate(ORIENTATIONS) if orientation in task.name]
    choices = fixed or list(range(len(ORIENTATIONS)))
    if kind != "grid":
        orientation = choices[rng.integers(len(choices))]
        x, y = COKE_GRID[0]
        while np.linalg.norm(np.subtract(COKE_GRID, (x, y)), axis=1).min() <= KEEP_AWAY:
            x, y = float(rng.uniform(*COKE_X)), float(rng.uniform(*COKE_Y))
    else:
        cells = len(choices) * len(COKE_GRID)
        turn, cell = divmod(_cell(cells, rng, seed), len(COKE_GRID))
        orientation, (x, y) = choices[turn], COKE_GRID[cell]
    return _robot(COKE_ROBOT) | {"can_x": x, "can_y": y, "orientation": float(orientation)}


def _draw_near(
    task: Task, kind: str, rng: np.random.Generator, seed: int | None
) -> dict[str, float]:
    del task
    episode = _cell(NEAR_CELLS, rng, seed if kind == "grid" else None)
    triplet, rest = divmod(episode, len(PAIRS) * len(LAYOUTS))
    layout, pair = divmod(rest, len(PAIRS))
    places = np.array(LAYOUTS[layout])
    if kind != "grid":
        shift = np.zeros_like(places)
        while np.linalg.norm(shift, axis=1).min() <= KEEP_AWAY:
            shift = rng.uniform(-NEAR_SPREAD, NEAR_SPREAD, places.shape)
        places += shift
    drawn = {"triplet": float(triplet), "pair": float(pair)}
    for i, (x, y) in enumerate(places.tolist()):
        drawn |= {f"x{i}": x, f"y{i}": y}
    return _robot(NEAR_ROBOT) | drawn


def _cell(cells: int, rng: np.random.Generator, seed: int | None) -> int:
    return int(rng.integers(cells)) if seed is None else seed % cells


def _robot(pose: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("robot_x", "robot_y", "robot_yaw"), pose, strict=True))


@dataclass(frozen=True)
class Placed:
    """An object at the start: model, place on the table (m), turn about its origin."""

    model: str
    xy: tuple[float, float]
    turn: Quaternion

    @property
    def radius(self) -> float:
        """Half the diagonal of its box on the table (m), as SIMPLER measures it."""
        return float(np.linalg.norm(rotate(list(self.turn), list(MODELS[self.model].box))[:2]) / 2)


def objects(task: Task, placement: dict[str, float]) -> list[Placed]:
    """What lies on the table; in move near source, target, other."""
    if task.name != "move_near":
        turn = list(ORIENTATIONS.values())[round(placement["orientation"])]
        return [Placed(COKE, (placement["can_x"], placement["can_y"]), turn)]
    names, order = _near_order(placement)
    return [
        Placed(names[i], (placement[f"x{i}"], placement[f"y{i}"]), MODELS[names[i]].turn)
        for i in order
    ]


def _near_order(placement: dict[str, float]) -> tuple[tuple[str, ...], list[int]]:
    pair = PAIRS[round(placement["pair"])]
    other = next(i for i in range(3) if i not in pair)
    return TRIPLETS[round(placement["triplet"])], [*pair, other]


def words(placement: dict[str, float]) -> dict[str, str]:
    """What fills the braces of an instruction: move near's source and target; else nothing."""
    if "pair" not in placement:
        return {}
    names, (source, target, _) = _near_order(placement)
    return {"source": MODELS[names[source]].name, "target": MODELS[names[target]].name}


class CokeRules:
    """Lifted 1 cm in the grasp and touching nothing else, or lifted 2 cm so for five steps."""

    LIFT, HIGH, STEPS = 0.01, 0.02, 5

    def __init__(self, task: Task) -> None:
        del task  # one rule

    def reset(self, privileged: Privileged) -> None:
        self._start = float(privileged["objects"][0, 2])
        self._gain, self._lifted, self._ever_grasped, self._high = 0.0, False, False, 0

    def update(self, privileged: Privileged, subtask: int) -> None:
        grasped = bool(privileged["grasped"][0])
        # Once lifted free it stays lifted, whatever it brushes, until the grasp is lost.
        self._lifted = grasped and (self._lifted or not privileged["touches"][0])
        self._gain = float(privileged["objects"][0, 2]) - self._start
        self._ever_grasped |= grasped
        self._high += self._lifted and self._gain > self.HIGH

    def success(self) -> bool:
        return (self._lifted and self._gain > self.LIFT) or self._high >= self.STEPS

    def progress(self) -> dict[str, float]:
        return {
            "grasped": float(self._ever_grasped),
            "lift": self._gain,
            "lifted_steps": float(self._high),
        }


class MoveNearRules:
    """The source moved, and the others less; it is near the target, nothing nearer; none fell."""

    MOVED, NEAR, SLACK = 0.03, 0.10, 0.01
    SINK, FALL = -0.02, -0.15

    def __init__(self, task: Task) -> None:
        del task  # one rule

    def reset(self, privileged: Privileged) -> None:
        self._start = privileged["objects"][:, :3].astype(np.float64)
        self._limit = float(privileged["radii"][:2].sum()) + self.NEAR
        self._lifted = False
        self.update(privileged, 0)

    def update(self, privileged: Privileged, subtask: int) -> None:
        place = privileged["objects"][:, :3].astype(np.float64)
        self._moved = np.linalg.norm((place - self._start)[:, :2], axis=1)
        self._gain = (place - self._start)[:, 2]
        away = np.linalg.norm(place[1:, :2] - place[0, :2], axis=1)
        self._target, self._others = float(away[0]), away[1:]
        self._lifted |= bool(self._gain[0] > 0.02)

    def _right_object(self) -> bool:
        source, rest = self._moved[0], self._moved[1:]
        return bool(source > self.MOVED and np.all(rest < source))

    def _upright(self) -> bool:
        return bool(np.all(self._gain[2:] > self.SINK) and np.all(self._gain[:2] > self.FALL))

    def _near(self) -> bool:
        return self._target < self._limit and bool(np.all(self._target < self._others + self.SLACK))

    def success(self) -> bool:
        return self._upright() and self._right_object() and self._near()

    def progress(self) -> dict[str, float]:
        return {
            "moved": float(self._moved[0]),
            "lifted": float(self._lifted),
            "distance": self._target,
            "right_object": float(self._right_object()),
            "near": float(self._near()),
        }


TABLE_RULES = {
    "pick_coke_can": CokeRules,
    **{f"pick_{orientation}_coke_can": CokeRules for orientation in ORIENTATIONS},
    "move_near": MoveNearRules,
}
