"""The tasks by name: start placements, instructions, and rules on a simulator's privileged state.

| tasks | file: thresholds and ranges (`default_config`), `draw`, `Rules` |
|---|---|
| open_{top,middle,bottom}_drawer | envs/task_open_drawer.py |
| close_{top,middle,bottom}_drawer | envs/task_close_drawer.py |
| open_drawer_place | envs/task_open_drawer_place.py |
| pick_coke_can, pick_{horizontal,vertical,standing}_coke_can | envs/task_pick_coke_can.py |
| move_near | envs/task_move_near.py |
| widowx_* | envs/bridge_tasks.py, without a config |

Success is SIMPLER's, in every simulator. World frame, metres.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import numpy as np

from selfflow.datasets.spec import Task, UserError
from selfflow.envs import (
    task_close_drawer,
    task_move_near,
    task_open_drawer,
    task_open_drawer_place,
    task_pick_coke_can,
)
from selfflow.envs.bridge_tasks import BRIDGE_RULES, bridge_photo, draw_bridge_placement
from selfflow.envs.cabinet_placements import DRAWERS
from selfflow.envs.placements import Privileged
from selfflow.envs.simpler_assets import URDF_VERSIONS
from selfflow.envs.table_objects import Placed

KINDS = ("mild", "grid", "variants", "train")
DRAWER_TASKS = {
    **{f"open_{drawer}_drawer": task_open_drawer for drawer in DRAWERS},
    **{f"close_{drawer}_drawer": task_close_drawer for drawer in DRAWERS},
    "open_drawer_place": task_open_drawer_place,
}
TABLE_TASKS = {
    "pick_coke_can": task_pick_coke_can,
    **{f"pick_{way}_coke_can": task_pick_coke_can for way in task_pick_coke_can.ORIENTATIONS},
    "move_near": task_move_near,
}
FILES = {**DRAWER_TASKS, **TABLE_TASKS}
RULES = {**{name: file.Rules for name, file in FILES.items()}, **BRIDGE_RULES}


@runtime_checkable  # so that beartype can check arguments in tests
class Rules(Protocol):
    """What a task's file says of an episode; one instance may see many."""

    def reset(self, privileged: Privileged) -> None:
        """The state at the start."""
        ...

    def step(self, privileged: Privileged, subtask: int) -> None:
        """The state after a control step, and the number of the subtask."""
        ...

    def success(self) -> bool:
        """Whether the task is solved at this step."""
        ...

    def progress(self) -> dict[str, float]:
        """Measures to shape a reward from, m or 0 and 1 where the name does not say otherwise."""
        ...


def default_config(task: Task) -> Any:
    """The `Config` of the task's file, to be changed with dataclasses.replace. Raises UserError."""
    if task.name not in FILES:
        raise UserError(f"{task.name} has no config; have: {', '.join(FILES)}")
    return FILES[task.name].default_config()


def config_with(task: Task, changes: Mapping[str, Any]) -> Any:
    """The default config with other values, given as a yaml file has them: lists for tuples, a
    mapping for what has fields itself; None without any. Raises UserError."""
    return _replaced(default_config(task), changes, "task_config") if changes else None


def _replaced(config: Any, changes: Mapping[str, Any], at: str) -> Any:
    values = {}
    for name, value in changes.items():
        if name not in (names := [field.name for field in fields(config)]):
            raise UserError(f"{at}.{name}: no such key; choose one of {', '.join(names)}")
        usual: Any = getattr(config, name)
        kind: Any = type(usual)
        if is_dataclass(usual) and isinstance(value, Mapping):
            values[name] = _replaced(usual, value, f"{at}.{name}")
        elif not _alike(value, usual):
            raise UserError(f"{at}.{name}={value}: must be like {usual}")
        elif isinstance(usual, tuple):
            values[name] = tuple(type(usual[0])(v) for v in value)
        else:
            values[name] = kind(value)
    try:
        return replace(config, **values)
    except UserError as e:
        raise UserError(f"{at}.{e}") from e


def _alike(value: Any, usual: Any) -> bool:
    """Whether a value of a yaml file may stand for this one: as many numbers, or any words."""
    if isinstance(usual, tuple):
        if not isinstance(value, list | tuple) or not all(_alike(v, usual[0]) for v in value):
            return False
        return isinstance(usual[0], str) or len(value) == len(usual)
    if isinstance(usual, str):
        return isinstance(value, str)
    kinds: Any = {int: int, float: (int, float)}.get(type(usual), ())
    if isinstance(value, bool) or not isinstance(value, kinds):
        return False
    return isfinite(value) or value == usual


def rules_of(task: Task, config: Any = None) -> Rules:
    """The task's rules, with another config than the default if given. Raises UserError."""
    if config is None:
        return RULES[task.name](task)
    wanted = type(default_config(task))
    if not isinstance(config, wanted):
        kind = type(config)
        raise UserError(
            f"config of {task.name}: must be {wanted.__module__}.{wanted.__name__}, "
            f"got {kind.__module__}.{kind.__name__}"
        )
    return RULES[task.name](task, config)


def draw_placement(
    task: Task, kind: str, rng: np.random.Generator, seed: int | None, config: Any = None
) -> dict[str, float]:
    """Where everything starts, and in training what the scene looks like.

    | kind | |
    |---|---|
    | mild | drawn from ranges |
    | grid | SIMPLER's cell seed mod cells |
    | variants | the same of variant aggregation: the robot stands elsewhere before the cabinet |
    | train | drawn from ranges about the grid, away from every cell; further entries below |

    Google robot: `colouring`, an index into URDF_VERSIONS. Drawers also: `photo`, an index into
    DRAWER_POSES or PLAIN, and the colours of a plain background, 0 to 255, top_r .. bottom_b.
    """
    if kind not in KINDS:
        raise ValueError(f"placement={kind}: choose mild, grid, variants or train")
    if kind == "variants" and task.name not in DRAWER_TASKS:
        kind = "grid"
    if task.name in BRIDGE_RULES:
        return draw_bridge_placement(task, kind, rng, seed)
    config = default_config(task) if config is None else config
    drawn = FILES[task.name].draw(task, config, kind, rng, seed)
    if kind == "train":
        drawn |= {"colouring": float(rng.integers(len(URDF_VERSIONS)))}
    return drawn


def photographs(task: Task, config: Any = None) -> tuple[str, ...]:
    """Names (envs/simpler_assets.py) of those that training placements show.

    Place-apple is evaluated on a0, b0 and c0, which its default config leaves out. The other drawer
    tasks, coke can, move near and WidowX are evaluated on the very photographs that are shown here.
    """
    if task.name in BRIDGE_RULES:
        return (bridge_photo(task),)
    if task.name in DRAWER_TASKS:
        return (config or default_config(task)).photographs
    return TABLE_TASKS[task.name].PHOTOGRAPHS


def objects(task: Task, placement: dict[str, float]) -> list[Placed]:
    """What lies on the table of a task in TABLE_TASKS, the one to move first."""
    return TABLE_TASKS[task.name].objects(placement)


def instruction(task: Task, subtask: int, placement: dict[str, float]) -> str:
    """What the robot is told, with the names of the placement's objects."""
    words = task_move_near.words(placement) if task.name == "move_near" else {}
    return task.instructions[subtask].format(**words)
