"""Scripted experts for SIMPLER's tasks: they read privileged state and act through the 7-D action.

Table tasks: one plan picks the thing up with the gripper's first orientation (tilted 18 degrees,
fingers closing along x), which every place on the table can be reached with. World frame, metres.
"""

from collections.abc import Iterator

import numpy as np

from selfflow.datasets.rotations import compose, from_axis_angle, inverse, rotate
from selfflow.datasets.spec import Task, UserError
from selfflow.envs.bridge_expert import BridgeExpert
from selfflow.envs.bridge_tasks import BRIDGE_RULES
from selfflow.envs.expert import CLOSED, OPEN, Command, DrawerExpert, Move, Waypoints
from selfflow.envs.tasks import TABLE_TASKS

TABLE_TOP = 0.882
PALM = 0.047  # a thing's top above the tool point when it is gripped
LOWEST = 0.027  # of the tool point above the table
HOVER = 0.10  # above the place of the grip
SWEEP, SWEEP_CLOSED = 0.16, 0.075  # from the tool's way, where open and closed fingers may touch
FINGERTIPS = 0.06  # of the open, tilted fingers below the tool point, and a margin
MAX_LEAN = 0.4  # rad
LIFT = 0.06
HALF_OPEN = 0.7  # so that letting go does not knock the neighbour
GAP, NEAR = 0.06, 0.09  # between the two things' outlines: wanted, and enough (0.10 succeeds)
MOVED = 0.04  # at least, by the carry (0.03 succeeds)
GAIN = 2.0  # of the commanded over the wanted move, of which about a third arrives in a step


class TableExpert(Waypoints):
    """Lifts the coke can, or carries move near's source next to its target."""

    def __init__(self, task: Task) -> None:
        if task.name not in TABLE_TASKS:
            raise UserError(f"no scripted expert for {task.name}; this one is for the table tasks")
        self._carries = task.name == "move_near"

    def _see(self, privileged: dict[str, np.ndarray]) -> None:
        super()._see(privileged)
        self._things = privileged["objects"][:, :3].astype(np.float64)
        self._radii = privileged["radii"].astype(np.float64)
        self._thing_q = privileged["objects"][0, 3:].astype(np.float64)

    def _script(self) -> Iterator[Command]:
        start = self._things.copy()
        for _ in range(3):
            if (yield from self._pick()) and (not self._carries or (yield from self._carry(start))):
                break
        while True:
            yield self._hold(OPEN if self._carries else CLOSED)

    def _pick(self) -> Move:
        height = float(self._things[0, 2])
        self._rest, self._thing_q0 = height, self._thing_q
        top = 2 * height - TABLE_TOP  # things are as high above their middle as below it
        grip = max(top - PALM, TABLE_TOP + LOWEST)
        over = np.array([*self._things[0, :2], grip + HOVER])
        turn = self._turn = self._leaning(over)
        passing = CLOSED if self._highest_beside(over, SWEEP) else OPEN
        over[2] = max(over[2], self._highest_beside(over, SWEEP_CLOSED) + FINGERTIPS)
        if passing == CLOSED and over[2] > self._p[2] + HOVER / 2:
            aside = (*self._p[:2], over[2])
            yield from self._go(aside, turn, CLOSED, tolerance=0.02, steps=8)
        yield from self._go(over, turn, passing, tolerance=0.02, angle=0.15, steps=16)
        for _ in range(3 if passing == CLOSED else 0):
            yield self._command(over, turn, OPEN)
        for _ in range(14):  # the thing may be nudged on the way down
            off = np.array([*self._things[0, :2], grip]) - self._p
            if np.linalg.norm(off) < 0.005:
                break
            yield self._command(self._p + GAIN * off, turn, OPEN)
        place = self._p.copy()
        for _ in range(4):
            yield self._command(place, turn, CLOSED)
        up = np.add(place, (0, 0, LIFT))
        yield from self._go(up, turn, CLOSED, tolerance=0.015, steps=8)
        return self._things[0, 2] > height + LIFT / 3

    def _carry(self, start: np.ndarray) -> Move:
        turn = self._turn
        away = start[0, :2] - self._things[1, :2]
        reach = float(self._radii[:2].sum())
        apart = float(np.linalg.norm(away))
        left = np.clip(apart - MOVED - 0.03, reach + 0.01, reach + GAP)
        goal = self._things[1, :2] + away / apart * left
        height = self._rest
        # Tilted fingers tilt what they hold; it will stand on the foot that it stood on.
        down = np.array([0.0, 0.0, height - TABLE_TOP])
        tilt = compose(self._thing_q, inverse(self._thing_q0))
        offset = self._p - (self._things[0] - rotate(tilt, down) + down)
        over = np.array([*goal, height + LIFT]) + offset
        yield from self._go(over, turn, CLOSED, tolerance=0.02, angle=0.3)
        if self._things[0, 2] < height + LIFT / 3:
            return False  # lost on the way
        down = np.array([*goal, height + 0.003]) + offset
        yield from self._go(down, turn, CLOSED, tolerance=0.012, angle=0.3, steps=8)
        for _ in range(3):
            yield self._command(down, turn, HALF_OPEN)
        yield from self._go(np.add(down, (0, 0, 0.12)), turn, HALF_OPEN, tolerance=0.03, steps=6)
        left = np.linalg.norm(self._things[1:, :2] - self._things[0, :2], axis=1)
        moved = np.linalg.norm(self._things[0, :2] - start[0, :2])
        return bool(left[0] < min(reach + NEAR, *left[1:]) and moved > MOVED)

    def _leaning(self, target: np.ndarray) -> np.ndarray:
        """The first orientation, or leaning forward where the arm would not reach as high as that
        so far ahead (0.73 m at a height of 1 m, 9 cm less for every 10 cm more)."""
        ahead = self._base_p[0] - target[0]
        short = ahead - (0.73 - 0.9 * (target[2] - 1.0))
        lean = float(np.clip(4 * (short - 0.03), 0.0, MAX_LEAN))
        return compose(from_axis_angle([0.0, lean, 0.0]), self._home_q)

    def _highest_beside(self, target: np.ndarray, sweep: float) -> float:
        """Height of what the fingers would brush, within `sweep` of the straight way to the target;
        0 if nothing."""
        way, low = target[:2] - self._p[:2], min(target[2], self._p[2]) - FINGERTIPS
        highest = 0.0
        for thing in self._things[1:]:
            share = np.clip((thing[:2] - self._p[:2]) @ way / max(way @ way, 1e-9), 0, 1)
            off = np.linalg.norm(self._p[:2] + share * way - thing[:2])
            top = 2 * thing[2] - TABLE_TOP
            if off < sweep and top > low:
                highest = max(highest, top)
        return highest


Script = Waypoints | BridgeExpert


def expert_for(task: Task) -> Script:
    """The scripted expert of a task. Raises UserError where there is none."""
    if task.name in TABLE_TASKS:
        return TableExpert(task)
    return BridgeExpert(task) if task.name in BRIDGE_RULES else DrawerExpert(task)
