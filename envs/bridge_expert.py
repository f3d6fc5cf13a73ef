"""Scripted experts of the WidowX tasks: pick the source, set it down on the target.

They read privileged state and act only through the 7-D action, one way-point plan for all four
tasks. Commands are measured from the controller's target, not from the sensed tool, since that is
what an action moves. World frame, metres.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from selfflow.datasets.rotations import (
    compose,
    from_axis_angle,
    inverse,
    rotate,
    to_axis_angle,
)
from selfflow.datasets.spec import Task, UserError
from selfflow.envs.bridge_tasks import PAIRS
from selfflow.envs.expert import CLOSED, OPEN, Command

MAX_MOVE, MAX_TURN = 0.035, 0.25  # m and rad of a step
TRIES = 3


@dataclass(frozen=True)
class Grip:
    """How to take a source and carry it, m."""

    height: float = 0.005  # of the tool above the source's centre of mass
    lift: float = 0.08
    drop: float = 0.006  # free fall onto the target


GRIPS = {
    "widowx_carrot_on_plate": Grip(),
    "widowx_spoon_on_towel": Grip(),
    "widowx_stack_cube": Grip(drop=0.003),
    "widowx_eggplant_in_basket": Grip(lift=0.12, drop=0.03),
}


class BridgeExpert:
    """Picks and places in one of the WidowX tasks; tries again where the source was not lifted."""

    def __init__(self, task: Task) -> None:
        if task.name not in GRIPS:
            raise UserError(f"no scripted expert of WidowX tasks for {task.name}")
        self._grip, self._pair = GRIPS[task.name], PAIRS[task.name]

    def reset(self, start: dict[str, np.ndarray] | None = None) -> None:
        """Call at the start of every episode. `start` is its first state, and needed only where
        something else acts before the expert does."""
        self._first = start
        self._plan: Iterator[Command] | None = None

    def act(self, privileged: dict[str, np.ndarray]) -> Command:
        """The next action; the tasks have one subtask, so it never says that one is done."""
        self._state = {name: value.astype(np.float64) for name, value in privileged.items()}
        if self._plan is None:
            first = privileged if self._first is None else self._first
            self._home = first["tool_target"][3:].astype(np.float64)
            self._plan = self._script()
        return next(self._plan)

    # --- plan ------------------------------------------------------------------------------------

    def _script(self) -> Iterator[Command]:
        for _ in range(TRIES):
            yield from self._pick()
            if self._lifted():
                break
        yield from self._place()
        while True:
            yield self._towards(self._state["tool_target"][:3], self._turn, OPEN)

    def _pick(self) -> Iterator[Command]:
        self._turn = self._across_source()
        self._start = self._state["source_centre"][2]
        above = np.array([0.0, 0.0, self._grip.lift])
        yield from self._go(self._grip_point() + above, self._turn, OPEN, tolerance=0.015)
        yield from self._go(self._grip_point(), self._turn, OPEN, tolerance=0.004)
        grip = self._state["tool_target"][:3]
        for _ in range(3):
            yield self._towards(grip, self._turn, CLOSED)
        yield from self._go(grip + above, self._turn, CLOSED, tolerance=0.02)

    def _place(self) -> Iterator[Command]:
        held = self._state["source_centre"] - self._tool
        goal = self._state["target_centre"] - held
        halves = (self._pair.source_size[2] + self._pair.target_size[2]) / 2
        goal[2] += halves + self._grip.drop
        over = np.array([goal[0], goal[1], max(goal[2] + 0.03, self._state["tool_target"][2])])
        yield from self._go(over, self._turn, CLOSED, tolerance=0.006)
        yield from self._go(goal, self._turn, CLOSED, tolerance=0.004)
        for _ in range(3):
            yield self._towards(goal, self._turn, OPEN)
        yield from self._go(
            np.add(goal, [0.0, 0.0, self._grip.lift]), self._turn, OPEN, tolerance=0.02
        )

    # --- what the state says ---------------------------------------------------------------------

    @property
    def _tool(self) -> np.ndarray:
        return self._state["tool"][:3]

    def _lifted(self) -> bool:
        return bool(self._state["source_centre"][2] > self._start + self._grip.lift / 2)

    def _grip_point(self) -> np.ndarray:
        return np.add(self._state["source_centre"], [0.0, 0.0, self._grip.height])

    def _across_source(self) -> np.ndarray:
        """The first orientation, turned about z so that the fingers close across the source."""
        closing = rotate(self._home, [0.0, 1.0, 0.0])
        across = rotate(self._state["source"][3:], [0.0, 1.0, 0.0])
        angle = np.arctan2(across[1], across[0]) - np.arctan2(closing[1], closing[0])
        angle = (angle + np.pi / 2) % np.pi - np.pi / 2  # either finger may be on either side
        return compose(from_axis_angle([0.0, 0.0, angle]), self._home)

    # --- moves -----------------------------------------------------------------------------------

    def _go(
        self, goal: np.ndarray, turn: np.ndarray, opening: float, tolerance: float, steps: int = 16
    ) -> Iterator[Command]:
        """Commands until the sensed tool is within tolerance (m) and 0.1 rad of the goal."""
        for _ in range(steps):
            off = np.linalg.norm(goal - self._tool)
            left = to_axis_angle(compose(turn, inverse(self._state["tool"][3:])))
            if off < tolerance and np.linalg.norm(left) < 0.1:
                return
            yield self._towards(goal, turn, opening)

    def _towards(self, goal: np.ndarray, turn: np.ndarray, opening: float) -> Command:
        """The action that takes the controller's target there, within a step's largest move."""
        target, base = self._state["tool_target"], self._state["base"][3:]
        move = goal - target[:3]
        move *= min(1.0, MAX_MOVE / max(float(np.linalg.norm(move)), 1e-9))
        spin = to_axis_angle(compose(turn, inverse(target[3:])))
        spin *= min(1.0, MAX_TURN / max(float(np.linalg.norm(spin)), 1e-9))
        # The controller turns its target about the sensed tool, which shifts the target too.
        arm = target[:3] - self._tool
        move += arm - rotate(from_axis_angle(spin), arm)
        to_base = inverse(base)
        return np.array([*rotate(to_base, move), *rotate(to_base, spin), opening]), False
