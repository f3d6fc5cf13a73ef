"""Scripted experts: they read privileged state and act only through the 7-D action.

One plan per task family, written as a generator of waypoints, so it reads top to bottom; the same
plan runs in the twin and in SIMPLER. Drawers open by hooking the upper edge of the front with
closed fingers pitched 30 degrees down (handles have no collision shape). World frame, metres.
"""

from collections.abc import Generator, Iterator
from itertools import cycle

import numpy as np

from selfflow.datasets.rotations import (
    compose,
    from_axis_angle,
    from_matrix,
    inverse,
    rotate,
    to_axis_angle,
)
from selfflow.datasets.spec import Task, UserError
from selfflow.envs.cabinet_placements import DRAWERS, FRONT_HEIGHTS, HALF_FRONT

Command = tuple[np.ndarray, bool]  # action (7,), and whether the subtask is done before it
Move = Generator[Command, None, bool]

MAX_MOVE, MAX_TURN = 0.15, 0.4  # commanded per step; about 30 % of it arrives
OPEN, CLOSED = 1.0, 0.0
LEAN = 0.3  # rad, of the grasp
HOOK_DEPTH = 0.02  # of the commanded tool below the front's upper edge; the tips reach further down
PULL = 0.12  # commanded a step
SLIPPED = 0.06  # the tool has moved that much more than the drawer
OPENED, WIDE, SHUT = 0.16, 0.20, 0.02  # opening: enough to stop trying, to stop pulling or pushing
IN_DRAWER = 0.80  # the apple is below
ASTRIDE, LOST = 0.04, 0.07  # tool to apple: near enough to close on it, too far to hold it


class Waypoints:
    """A plan that acts through the 7-D action; subclasses write it as a generator (`_script`)."""

    _plan: Iterator[Command] | None

    def reset(self, start: dict[str, np.ndarray] | None = None) -> None:
        """Call at the start of every episode. `start` is its first state, and needed only where
        something else acts before the expert does."""
        self._first, self._plan = start, None

    def act(self, privileged: dict[str, np.ndarray]) -> Command:
        """The next action, and True where it says that the current subtask is done."""
        if self._plan is None:
            self._see(privileged if self._first is None else self._first)
            self._home_p, self._home_q = self._p.copy(), self._q.copy()
            self._plan = self._script()
        self._see(privileged)
        return next(self._plan)

    def _see(self, privileged: dict[str, np.ndarray]) -> None:
        tool, base = (privileged[k].astype(np.float64) for k in ("tool", "base"))
        self._p, self._q = tool[:3], tool[3:]
        self._base_p, self._base_q = base[:3], base[3:]

    def _script(self) -> Iterator[Command]:
        raise NotImplementedError

    def _go(
        self,
        target,
        turn: np.ndarray,
        opening: float,
        tolerance: float,
        angle: float = 9.0,
        steps: int = 25,
    ) -> Move:
        """Commands until the tool is within tolerance (m) and angle (rad); False after `steps`.

        Near the edge of the workspace a large command has no inverse kinematics and the arm holds:
        while nothing moves the command is halved, down to a fifth.
        """
        target, scale, last = np.asarray(target, np.float64), 1.0, self._p
        for _ in range(steps):
            off = np.linalg.norm(target - self._p)
            turned = np.linalg.norm(to_axis_angle(compose(turn, inverse(self._q))))
            if off < tolerance and turned < angle:
                return True
            yield self._command(target, turn, opening, scale)
            moved = np.linalg.norm(self._p - last)
            scale = max(0.2, scale / 2) if moved < 5e-4 else min(1.0, scale * 2)
            last = self._p
        return False

    def _command(self, target, turn: np.ndarray, opening: float, scale: float = 1.0) -> Command:
        """One action towards a tool pose, within the largest move and turn of a step."""
        move = np.asarray(target, np.float64) - self._p
        spin = to_axis_angle(compose(turn, inverse(self._q)))
        move *= scale * min(1.0, MAX_MOVE / max(np.linalg.norm(move), 1e-9))
        spin *= scale * min(1.0, MAX_TURN / max(np.linalg.norm(spin), 1e-9))
        to_base = inverse(self._base_q)
        return np.array([*rotate(to_base, move), *rotate(to_base, spin), opening]), False

    def _hold(self, opening: float) -> Command:
        return np.array([0.0] * 6 + [opening]), False


class DrawerExpert(Waypoints):
    """Opens or closes one drawer, or opens the top one and places the apple in it."""

    def __init__(self, task: Task) -> None:
        family = task.name.split("_")[0]
        if family not in ("open", "close"):
            raise UserError(
                f"no scripted expert for {task.name}; there is one for the drawer tasks"
            )
        self._task, self._closes = task, family == "close"
        self._drawer = 0
        if task.name != "open_drawer_place":
            self._drawer = next(i for i, d in enumerate(DRAWERS) if d in task.name)

    def _see(self, privileged: dict[str, np.ndarray]) -> None:
        super()._see(privileged)
        self._opening = float(privileged["drawers"][self._drawer])
        self._apple = privileged["apple"][:3].astype(np.float64)

    def _script(self) -> Iterator[Command]:
        if self._closes:
            yield from self._push()
        else:
            yield from self._open()
        if self._task.name == "open_drawer_place":
            yield self._hold(CLOSED)[0], True
            yield from self._place()
        while True:
            yield self._hold(OPEN if self._task.name == "open_drawer_place" else CLOSED)

    def _open(self) -> Iterator[Command]:
        for shift in cycle((0.0, 0.05, -0.05, 0.10)):
            if self._opening >= OPENED:
                return
            yield from self._hook_and_pull(
                float(np.clip(self._base_p[1] + 0.09 + shift, -0.2, 0.2))
            )

    def _hook_and_pull(self, y: float) -> Iterator[Command]:
        """Fingers behind the front's upper edge, towards the robot, and up out of the gap."""
        top = FRONT_HEIGHTS[DRAWERS[self._drawer]] + HALF_FRONT[1]
        turn = self._pitched(np.radians(30))
        front = self._opening  # the front has moved out by what is open already
        above, behind = (0.22 + front, y, top + 0.06), (-0.03 + front, y, top + 0.03)
        yield from self._go(above, turn, CLOSED, tolerance=0.03, angle=0.15)
        yield from self._go(behind, turn, CLOSED, tolerance=0.02, angle=0.15)
        hooked = (behind[0], y, top - HOOK_DEPTH)
        yield from self._go(hooked, turn, CLOSED, tolerance=0.012, steps=7)
        lead = self._p[0] - self._opening
        for _ in range(16):
            if self._opening >= WIDE or self._p[0] - self._opening > lead + SLIPPED:
                break
            # Always the same height and y: told only to move in x, the tool drifts up and off.
            yield self._command((self._p[0] + PULL, y, hooked[2]), turn, CLOSED)
        out = np.add(self._p, (-0.01, 0, 0.15))
        yield from self._go(out, turn, CLOSED, tolerance=0.06, steps=8)

    def _push(self) -> Iterator[Command]:
        z = FRONT_HEIGHTS[DRAWERS[self._drawer]]
        turn = self._pitched(np.radians(45))
        y = float(np.clip(self._base_p[1] + 0.09, -0.2, 0.2))
        while self._opening > SHUT:
            start = (0.0175 + self._opening + 0.12, y, z + 0.01)
            yield from self._go(start, turn, CLOSED, tolerance=0.03, angle=0.15)
            for _ in range(20):
                if self._opening <= SHUT:
                    return
                yield self._command(np.add(self._p, (-0.12, 0, 0)), turn, CLOSED)

    def _place(self) -> Iterator[Command]:
        # Leaning forward by LEAN the wrist stays nearer to the robot: reaches the far apples.
        home = compose(from_axis_angle([0.0, LEAN, 0.0]), self._home_q)
        start = np.add(self._home_p, (0, 0, 0.02))
        yield from self._go(start, home, OPEN, tolerance=0.08, angle=0.25)
        while self._apple[2] > IN_DRAWER:
            if (yield from self._pick(home)):
                yield from self._drop(home)

    def _pick(self, turn: np.ndarray) -> Move:
        """Whether the apple hangs in the gripper."""
        over = np.add(self._apple, (0, 0, 0.08))
        yield from self._go(over, turn, OPEN, tolerance=0.02, angle=0.12)
        yield from self._go(self._apple.copy(), turn, OPEN, tolerance=0.006, angle=0.12, steps=14)
        if np.linalg.norm(self._apple - self._p) > ASTRIDE:
            return False  # a finger stands on the apple: up again
        grip = self._apple.copy()
        for _ in range(5):
            yield self._command(grip, turn, CLOSED)
        return (yield from self._carry(np.add(grip, (0, 0, 0.08)), turn, 0.03))

    def _drop(self, turn: np.ndarray) -> Iterator[Command]:
        """Carries the apple over the drawer, lets it fall, and moves up."""
        x, y = 0.02 + 0.55 * self._opening, float(np.clip(self._apple[1], -0.12, 0.12))
        if not (yield from self._carry((x, y, 0.96), turn, 0.02, steps=25)):
            return
        yield from self._carry((x, y, 0.88), turn, 0.02)
        for _ in range(4):
            yield self._command((x, y, 0.88), turn, OPEN)
        yield from self._go((x, y, 0.98), turn, OPEN, tolerance=0.04, steps=5)

    def _carry(self, target, turn: np.ndarray, tolerance: float, steps: int = 8) -> Move:
        """Moves with closed fingers; False as soon as the apple has slipped out of them."""
        for command in self._go(target, turn, CLOSED, tolerance, angle=0.2, steps=steps):
            yield command
            if np.linalg.norm(self._apple - self._p) > LOST:
                return False
        return True

    def _pitched(self, pitch: float) -> np.ndarray:
        """Tool pointing at the cabinet and down by `pitch`, fingers closing along y.

        Of the two wrist angles half a turn apart the nearer one.
        """
        z = np.array([-np.cos(pitch), 0.0, -np.sin(pitch)])
        turns = []
        for side in (1.0, -1.0):
            y = np.array([0.0, side, 0.0])
            turns.append(from_matrix(np.stack([np.cross(y, z), y, z], axis=-1)))
        return min(turns, key=lambda q: np.linalg.norm(to_axis_angle(compose(q, inverse(self._q)))))


def perturb(
    action: np.ndarray, rng: np.random.Generator, metres: float, radians: float
) -> np.ndarray:
    """The action with Gaussian noise on its arm part: executed, while the label stays clean."""
    noise = np.concatenate([rng.normal(0, metres, 3), rng.normal(0, radians, 3), [0.0]])
    turned = compose(from_axis_angle(noise[3:6]), from_axis_angle(action[3:6]))
    return np.array([*(action[:3] + noise[:3]), *to_axis_angle(turned), action[6]])
