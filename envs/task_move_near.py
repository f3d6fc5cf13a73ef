"""Move one of three things near another (move_near).

    config = replace(task_move_near.default_config(), near=0.05)
    env = make_mujoco(task_named("move_near"), config=config)

World frame; the robot stands at ROBOT, where the photograph was taken.
"""

from dataclasses import dataclass

import numpy as np

from selfflow.datasets.spec import Task, UserError
from selfflow.envs.placements import ATTEMPTS, KEEP_AWAY, Privileged, cell_number, no_room
from selfflow.envs.table_objects import MODELS, Placed

PHOTOGRAPHS = ("google_move_near_real_eval_1",)
ROBOT = {"robot_x": 0.35, "robot_y": 0.21, "robot_yaw": -0.09}
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
CELLS = len(TRIPLETS) * len(PAIRS) * len(LAYOUTS)


@dataclass(frozen=True)
class Config:
    """SIMPLER's thresholds and how far things are drawn about its layouts; all in m."""

    moved: float = 0.03  # by the source at least, and further than the others
    near: float = 0.10  # from the target's outline at most
    slack: float = 0.01  # by which another may be nearer to the source than the target is
    sink: float = 0.02  # of the others' height at most: they stay upright
    fall: float = 0.15  # of source's and target's at most: they stay on the table
    lifted: float = 0.02  # of the source above its start, for progress only
    spread: float = 0.03  # of drawn things about their layout, each way in x and y
    keep_away: float = KEEP_AWAY  # of each from its place in the layout

    def __post_init__(self) -> None:
        if self.spread < 0:
            raise UserError(f"spread={self.spread}: must not be negative")


def default_config() -> Config:
    """SIMPLER's rule; things some centimetres beside its layouts."""
    return Config()


def draw(
    task: Task, config: Config, kind: str, rng: np.random.Generator, seed: int | None
) -> dict[str, float]:
    """Which things stand where, and the pair: `grid` has 60 episodes; other kinds draw one and
    shift its things."""
    del task  # one only
    episode = cell_number(CELLS, rng, seed if kind == "grid" else None)
    triplet, rest = divmod(episode, len(PAIRS) * len(LAYOUTS))
    layout, pair = divmod(rest, len(PAIRS))
    places = np.array(LAYOUTS[layout])
    if kind != "grid":
        places += _draw_shift(config, rng)
    drawn = {"triplet": float(triplet), "pair": float(pair)}
    for i, (x, y) in enumerate(places.tolist()):
        drawn |= {f"x{i}": x, f"y{i}": y}
    return ROBOT | drawn


def _draw_shift(config: Config, rng: np.random.Generator) -> np.ndarray:
    for _ in range(ATTEMPTS):
        shift = rng.uniform(-config.spread, config.spread, (3, 2))
        if np.linalg.norm(shift, axis=1).min() > config.keep_away:
            return shift
    raise no_room(config)


def objects(placement: dict[str, float]) -> list[Placed]:
    """What lies on the table: source, target, other."""
    names, order = _order(placement)
    return [
        Placed(names[i], (placement[f"x{i}"], placement[f"y{i}"]), MODELS[names[i]].turn)
        for i in order
    ]


def words(placement: dict[str, float]) -> dict[str, str]:
    """What fills the braces of the instruction."""
    names, (source, target, _) = _order(placement)
    return {"source": MODELS[names[source]].name, "target": MODELS[names[target]].name}


def _order(placement: dict[str, float]) -> tuple[tuple[str, ...], list[int]]:
    pair = PAIRS[round(placement["pair"])]
    other = next(i for i in range(3) if i not in pair)
    return TRIPLETS[round(placement["triplet"])], [*pair, other]


class Rules:
    """The source moved, and the others less; it is near the target, nothing nearer; none fell."""

    def __init__(self, task: Task, config: Config | None = None) -> None:
        del task  # one rule
        self._config = config or default_config()

    def reset(self, privileged: Privileged) -> None:
        self._start = privileged["objects"][:, :3].astype(np.float64)
        self._limit = float(privileged["radii"][:2].sum()) + self._config.near
        self._lifted = False
        self.step(privileged, 0)

    def step(self, privileged: Privileged, subtask: int) -> None:
        del subtask  # one only
        place = privileged["objects"][:, :3].astype(np.float64)
        self._moved = np.linalg.norm((place - self._start)[:, :2], axis=1)
        self._gain = (place - self._start)[:, 2]
        away = np.linalg.norm(place[1:, :2] - place[0, :2], axis=1)
        self._target, self._others = float(away[0]), away[1:]
        self._lifted |= bool(self._gain[0] > self._config.lifted)
        self._tool = float(np.linalg.norm(privileged["tool"][:3] - place[0]))

    def _right_object(self) -> bool:
        source, rest = self._moved[0], self._moved[1:]
        return bool(source > self._config.moved and np.all(rest < source))

    def _upright(self) -> bool:
        others, pair = self._gain[2:], self._gain[:2]
        return bool(np.all(others > -self._config.sink) and np.all(pair > -self._config.fall))

    def _near(self) -> bool:
        nearest = np.all(self._target < self._others + self._config.slack)
        return self._target < self._limit and bool(nearest)

    def success(self) -> bool:
        return self._upright() and self._right_object() and self._near()

    def progress(self) -> dict[str, float]:
        """The tool's way to the source, how far that has moved and is from the target's middle
        (m); whether it was ever lifted, and which of success's conditions hold, 0 or 1."""
        return {
            "tool_to_source": self._tool,
            "moved": float(self._moved[0]),
            "lifted": float(self._lifted),
            "distance": self._target,
            "right_object": float(self._right_object()),
            "near": float(self._near()),
            "upright": float(self._upright()),
        }
