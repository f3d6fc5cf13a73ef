"""SIMPLER's four WidowX tasks: objects, start placements and success rules, on privileged state.

World frame, metres. A task puts a source object on a target. Everything here is SIMPLER's; its 24
trials of a task are `grid_cell(name, 0..23)`.
"""

from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np

from selfflow.datasets.rotations import rotate
from selfflow.datasets.spec import Task

Privileged = dict[str, np.ndarray]
TRIALS = 24
TABLE_PHOTO, SINK_PHOTO = "bridge_real_eval_1", "bridge_sink"
TABLE_CENTRE = np.array([-0.16, 0.0])
BASKET, EGGPLANT_CENTRE = (-0.125, 0.025), np.array([-0.105, 0.206])
# m about the centre; further out it is dropped on the sink's slope, and rolls or jumps off
EGGPLANT_SPREAD = ((-0.045, -0.005), (0.01, 0.055))
EGGPLANT_ROLLED = ((-0.124, 0.236), (-0.093, 0.231))  # where two of the trials come to rest
KEEP_AWAY = 0.02  # m between a drawn source and every source of the grid
APART = 0.10  # m at least between a drawn source and target
NEAR = 0.003  # m of slack beside the target's half diagonal


@dataclass(frozen=True)
class Pair:
    """What is put on what. Sizes and slack (the largest gap in height) in m."""

    source: str
    target: str
    source_size: tuple[float, float, float]
    target_size: tuple[float, float, float]
    corners: tuple[float, ...] = ()  # half edges of the squares at whose corners the two stand
    yaws: tuple[float, ...] = (0.0,)  # of the source, rad
    slack: float = 0.02
    alone: bool = False  # the source may touch nothing but the target and the robot


_CUBE = (0.03, 0.03, 0.03)
PAIRS = {
    "widowx_carrot_on_plate": Pair(
        "bridge_carrot_generated_modified",
        "bridge_plate_objaverse_larger",
        (0.115, 0.032, 0.038),
        (0.11, 0.11, 0.006),
        corners=(0.075,),
        yaws=(np.pi, -np.pi / 2),
        alone=True,
    ),
    "widowx_spoon_on_towel": Pair(
        "bridge_spoon_generated_modified",
        "table_cloth_generated_shorter",
        (0.14, 0.0346, 0.026042),
        (0.10, 0.10, 0.01),
        corners=(0.075,),
        yaws=(0.0, np.pi / 2),
    ),
    "widowx_stack_cube": Pair(
        "baked_green_cube_3cm",
        "baked_yellow_cube_3cm",
        _CUBE,
        _CUBE,
        corners=(0.05, 0.1),
        alone=True,
    ),
    "widowx_eggplant_in_basket": Pair(
        "eggplant",
        "dummy_sink_target_plane",
        (0.0783, 0.0374, 0.038),
        (0.13, 0.08, 0.002),
        yaws=(0.0, np.pi / 4, -np.pi / 4),
        slack=0.06,
    ),
}


def bridge_photo(task: Task) -> str:
    """The photograph behind the table; the eggplant's is of a sink."""
    return TABLE_PHOTO if PAIRS[task.name].corners else SINK_PHOTO


def grid_cell(name: str, trial: int) -> dict[str, float]:
    """Placement of SIMPLER's trial 0..23: positions in turn, each with all its yaws."""
    pair = PAIRS[name]
    if pair.corners:
        spots = [
            (TABLE_CENTRE + half * np.array(a), TABLE_CENTRE + half * np.array(b))
            for half in pair.corners
            for a, b in permutations(product((-1.0, 1.0), repeat=2), 2)
        ]
    else:
        offsets = product((-0.01, 0.01), np.linspace(-0.015, 0.015, 4))
        spots = [(EGGPLANT_CENTRE + offset, np.array(BASKET)) for offset in offsets]
    index, turn = divmod(trial % TRIALS, len(pair.yaws))
    return _placement(*spots[index], pair.yaws[turn])


def draw_bridge_placement(
    task: Task, kind: str, rng: np.random.Generator, seed: int | None
) -> dict[str, float]:
    """`grid` is SIMPLER's trial seed mod 24; `mild` and `train` are drawn about the grid, the
    source KEEP_AWAY from all of its sources: demonstrations must not hold the test's cells."""
    if kind == "grid":
        return grid_cell(task.name, int(rng.integers(TRIALS)) if seed is None else seed)
    pair, taken = PAIRS[task.name], _grid_sources(task.name)
    while True:
        if pair.corners:
            half = max(pair.corners)
            source, target = TABLE_CENTRE + rng.uniform(-half, half, (2, 2))
            yaw = pair.yaws[int(rng.integers(len(pair.yaws)))] + rng.uniform(-0.3, 0.3)
        else:
            source = EGGPLANT_CENTRE + rng.uniform(*EGGPLANT_SPREAD)
            target, yaw = np.array(BASKET), rng.uniform(-np.pi / 4, np.pi / 4)
        far = np.linalg.norm(source - taken, axis=1).min() >= KEEP_AWAY
        if far and np.linalg.norm(source - target) >= APART:
            return _placement(source, target, float(yaw))


@cache
def _grid_sources(name: str) -> np.ndarray:
    """x, y of the source in every trial, and where two roll to before the robot moves, (n, 2)."""
    cells = [grid_cell(name, trial) for trial in range(TRIALS)]
    sources = [(cell["source_x"], cell["source_y"]) for cell in cells]
    return np.array(sources if PAIRS[name].corners else [*sources, *EGGPLANT_ROLLED])


def _placement(source: np.ndarray, target: np.ndarray, yaw: float) -> dict[str, float]:
    values = (*source.tolist(), float(yaw), *target.tolist())
    names = ("source_x", "source_y", "source_yaw", "target_x", "target_y")
    return dict(zip(names, values, strict=True))


class PutOnRules:
    """The source's centre is over the target (within its half diagonal + NEAR) and above it, with
    at most `slack` between the two; where the pair says so the source touches nothing else.

    "grasped" and "moved" (by 3 cm, and further than the target) are SIMPLER's partial scores.
    """

    def __init__(self, task: Task) -> None:
        self._pair = PAIRS[task.name]

    def reset(self, privileged: Privileged) -> None:
        self._start = {key: privileged[key][:2].copy() for key in ("source", "target")}
        self._grasped = self._moved = False
        # SIMPLER measures the boxes along the world's axes, as the objects lie at the start.
        self._half = {
            "source": _half_extents(privileged["source"], self._pair.source_size),
            "target": _half_extents(privileged["target"], self._pair.target_size),
        }
        self.step(privileged, 0)

    def step(self, privileged: Privileged, subtask: int) -> None:
        del subtask  # one only
        offset = (privileged["source_centre"] - privileged["target_centre"]).astype(np.float64)
        self._distance = float(np.linalg.norm(offset[:2]))
        gap = offset[2] - self._half["source"][2] - self._half["target"][2]
        over = self._distance <= np.linalg.norm(self._half["target"][:2]) + NEAR
        self._success = bool(over and offset[2] > 0 and gap <= self._pair.slack)
        if self._pair.alone and privileged["source_touches_other"][0]:
            self._success = False
        self._grasped |= bool(privileged["source_grasped"][0])
        went = {
            key: np.linalg.norm(privileged[key][:2] - start) for key, start in self._start.items()
        }
        self._moved |= bool(went["source"] > 0.03 and went["source"] > went["target"])

    def success(self) -> bool:
        return self._success

    def progress(self) -> dict[str, float]:
        return {
            "distance": self._distance,
            "grasped": float(self._grasped),
            "moved": float(self._moved),
        }


def _half_extents(pose: np.ndarray, size: tuple[float, float, float]) -> np.ndarray:
    """Half the box of an object in this pose, as SIMPLER has it: |turned half diagonal|."""
    return np.abs(rotate(pose[3:], np.asarray(size) / 2))


BRIDGE_RULES = {name: PutOnRules for name in PAIRS}
