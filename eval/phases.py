"""What an episode has to get done, in order: how far it came, and how near to what it missed.

A phase is a number in metres that says what is missing until it is reached, read from the
simulator's privileged state alone: so a recorded demonstration has phases as a rollout has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from selfflow.datasets.spec import Task
from selfflow.envs import task_close_drawer, task_move_near, task_open_drawer
from selfflow.envs import task_open_drawer_place as place
from selfflow.envs import task_pick_coke_can as coke
from selfflow.envs.bridge_tasks import BRIDGE_RULES
from selfflow.envs.cabinet_placements import DRAWERS, distance_to_front, drawer_of
from selfflow.envs.placements import Privileged

AT_FRONT, AT_THING = 0.06, 0.05  # m from the drawer's front, from a thing's middle: there
TABLE_EDGE, HALF_DRAWER = 0.02, 0.26  # m, world: x of the cabinet's front edge, |y| of a drawer
BRIDGE_MOVED, BRIDGE_OVER = 0.03, 0.05  # m
END = "success at the last step"  # every task's last phase

Gap = Callable[[Privileged, Privileged], float]  # the reset's state, this step's -> m, <= 0: there


@dataclass(frozen=True)
class Phase:
    """Reached at the first step whose gap is 0 or less. Within a `part` whoever reached a later
    phase has passed the earlier ones: an apple pushed in need not be grasped."""

    name: str
    part: str
    gap: Gap


class Watch:
    """Follows one episode. `reached`: the step of each phase that was, 0 the reset. `nearest`: step
    and gap (m) at which the first phase not passed was nearest, since it was the first, the
    earliest of equals; of END the last step with success, gap 0, if any."""

    def __init__(self, task: Task, start: Privileged) -> None:
        self._phases, self._start = phases_of(task), start
        self.reached: dict[str, int] = {}
        self.next = self._phases[0].name
        self.nearest: tuple[int, float] | None = None
        self.see(start, False, 0)

    def see(self, now: Privileged, success: bool, step: int) -> None:
        """The state at this step."""
        gaps = {p.name: p.gap(self._start, now) for p in self._phases}
        gaps[END] = float(not success)
        for phase in self._phases:
            if gaps[phase.name] <= 0:
                self.reached.setdefault(phase.name, step)
        before, self.next = self.next, first_missing(self._phases, self.reached)
        if before != self.next:
            self.nearest = None
        gap = round(gaps[self.next], 4)
        least = float("inf") if self.nearest is None else self.nearest[1]
        if gap < least or (gap == least and self.next == END):
            self.nearest = step, gap


def first_missing(phases: tuple[Phase, ...], reached: Mapping[str, int]) -> str:
    """The first phase that was not passed, END where all were."""
    for i, phase in enumerate(phases):
        if not any(p.name in reached for p in phases[i:] if p.part == phase.part):
            return phase.name
    return END


def phases_of(task: Task) -> tuple[Phase, ...]:
    """In order, without END."""
    if task.name == "open_drawer_place":
        return _PLACE
    if task.name == "move_near":
        return _NEAR
    if task.name in BRIDGE_RULES:
        return _BRIDGE
    if "coke_can" in task.name:
        return _COKE
    drawer = drawer_of(task)
    last = _open(drawer) if task.name.startswith("open_") else _shut(drawer)
    return (_at_front(drawer), last)


def _opening(now: Privileged, drawer: str) -> float:
    return float(now["drawers"][DRAWERS.index(drawer)])


def _at_front(drawer: str) -> Phase:
    def gap(start: Privileged, now: Privileged) -> float:
        return distance_to_front(now["tool"], drawer, _opening(now, drawer)) - AT_FRONT

    return Phase("tool at the drawer", "drawer", gap)


def _open(drawer: str) -> Phase:
    least = task_open_drawer.default_config().opened
    return Phase(
        f"drawer open {100 * least:.0f} cm",
        "drawer",
        lambda start, now: least - _opening(now, drawer),
    )


def _shut(drawer: str) -> Phase:
    most = task_close_drawer.default_config().shut
    return Phase(
        f"drawer shut to {100 * most:.0f} cm",
        "drawer",
        lambda start, now: _opening(now, drawer) - most,
    )


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """m between two positions."""
    return float(np.linalg.norm(a[:3].astype(np.float64) - b[:3]))


def _held(now: Privileged, flag: str, thing: np.ndarray) -> float:
    """0 in the grasp, else the tool's way to the thing."""
    return 0.0 if now[flag][0] else _apart(now["tool"], thing)


def _over_drawer(start: Privileged, now: Privileged) -> float:
    """Horizontally, to the open part of the top drawer."""
    x, y = (float(value) for value in now["apple"][:2])
    return max(TABLE_EDGE - x, x - TABLE_EDGE - _opening(now, "top"), abs(y) - HALF_DRAWER)


def _to_floor(start: Privileged, now: Privileged) -> float:
    if now["apple_on_drawer_floor"][0]:
        return 0.0
    return _apart(now["apple"], np.add(place.FLOOR, (_opening(now, "top"), 0.0, 0.0)))


def _lift(key: str, row: int | None, least: float) -> Gap:
    def gap(start: Privileged, now: Privileged) -> float:
        before, after = (s[key] if row is None else s[key][row] for s in (start, now))
        return float(before[2]) + least - float(after[2])

    return gap


def _near_target(start: Privileged, now: Privileged) -> float:
    limit = float(now["radii"][:2].sum()) + task_move_near.default_config().near
    things = now["objects"][:, :2]
    return float(np.linalg.norm(things[0] - things[1])) - limit


def _moved(start: Privileged, now: Privileged) -> float:
    way = np.linalg.norm((now["objects"][0] - start["objects"][0])[:2])
    return task_move_near.default_config().moved - float(way)


def _bridge_apart(start: Privileged, now: Privileged) -> float:
    off = now["source_centre"][:2] - now["target_centre"][:2]
    return float(np.linalg.norm(off)) - BRIDGE_OVER


def _bridge_moved(start: Privileged, now: Privileged) -> float:
    return BRIDGE_MOVED - float(np.linalg.norm((now["source"] - start["source"])[:2]))


_LIFTED, _HIGH = place.default_config().lifted, coke.default_config().high
_PLACE = (
    _at_front("top"),
    _open("top"),
    Phase(
        "tool at the apple", "apple", lambda _, now: _apart(now["tool"], now["apple"]) - AT_THING
    ),
    Phase("apple grasped", "apple", lambda _, s: _held(s, "apple_grasped", s["apple"])),
    Phase(f"apple lifted {100 * _LIFTED:.0f} cm", "apple", _lift("apple", None, _LIFTED)),
    Phase("apple over the drawer", "apple", _over_drawer),
    Phase("apple on the drawer's floor", "apple", _to_floor),
)


def _things(name: str) -> tuple[Phase, ...]:
    """To the first of the things on the table, and its grasp."""
    return (
        Phase(
            f"tool at the {name}",
            name,
            lambda start, now: _apart(now["tool"], now["objects"][0]) - AT_THING,
        ),
        Phase(
            f"{name} grasped",
            name,
            lambda start, now: _held(now, "grasped", now["objects"][0]),
        ),
    )


_COKE = (
    *_things("can"),
    Phase(f"can lifted {100 * _HIGH:.0f} cm", "can", _lift("objects", 0, _HIGH)),
)
_NEAR = (
    *_things("right thing"),
    Phase("right thing moved 3 cm", "right thing", _moved),
    Phase("near the target", "target", _near_target),
)
_BRIDGE = (
    Phase(
        "tool at the source",
        "source",
        lambda start, now: _apart(now["tool"], now["source_centre"]) - AT_THING,
    ),
    Phase(
        "source grasped",
        "source",
        lambda start, now: _held(now, "source_grasped", now["source_centre"]),
    ),
    Phase("source moved 3 cm", "source", _bridge_moved),
    Phase("source over the target", "target", _bridge_apart),
)
