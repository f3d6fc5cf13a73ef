"""What an operator moves the robot with: a terminal's keys, a script of keys, a gamepad, a
SpaceMouse. Each is read once a control step and says what it wants as an Input.

Motion is seen from the robot: forward, left, up, and turns about those axes, right-handed.
"""

import os
import re
import select
import struct
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from selfflow.datasets.spec import UserError

AXES = ("forward", "left", "up", "roll", "pitch", "yaw")
DONE, KEEP, DISCARD, QUIT, HOLD, HELP = "done", "keep", "discard", "quit", "hold", "help"
FINE = 0.25  # of a step, by a capital letter

KEY_MOTION = {  # key -> axis of AXES, sign
    "w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1),
    "o": (3, 1), "u": (3, -1), "down": (4, 1), "up": (4, -1), "left": (5, 1), "right": (5, -1),
}  # fmt: skip
KEY_COMMANDS = {
    "t": DONE, "enter": KEEP, "backspace": DISCARD, "q": QUIT, ".": HOLD, "h": HELP,
}  # fmt: skip
KEY_HELP = """\
w s   forward, back        arrows    tilt up, down; turn left, right    t          subtask is done
a d   left, right          u o       roll                               enter      keep the episode
r f   up, down             capitals  a quarter of the step              backspace  discard it
space gripper open, shut   .         one step without motion            q quit, h this help"""

# What terminals send for keys that are no letters.
SEQUENCES = {
    "\x1b[A": "up", "\x1b[B": "down", "\x1b[C": "right", "\x1b[D": "left",
    "\x1bOA": "up", "\x1bOB": "down", "\x1bOC": "right", "\x1bOD": "left",
    "\r": "enter", "\n": "enter", "\x7f": "backspace", "\b": "backspace", " ": "space",
}  # fmt: skip
_TYPED = re.compile(r"\x1b\[[0-9;]*[ -/]*[@-~]|\x1bO.|.", re.DOTALL)
NAMES = {*KEY_MOTION, *KEY_COMMANDS, "space"}


@dataclass(frozen=True)
class Input:
    """What the operator wants in one control step."""

    motion: Float[np.ndarray, "6"] = field(default_factory=lambda: np.zeros(6))  # -1..1, by AXES
    toggle: bool = False  # the gripper
    commands: tuple[str, ...] = ()  # of DONE .. HELP

    @property
    def moves(self) -> bool:
        """Whether the robot is to do something."""
        return self.toggle or HOLD in self.commands or bool(np.any(self.motion))


@runtime_checkable
class Device(Protocol):
    def read(self) -> Input:
        """What has been wanted since the last call; returns at once."""
        ...

    def close(self) -> None: ...


def from_keys(keys: list[str]) -> Input:
    """Keys pressed within one control step; a repeated key counts once, unknown ones not at all."""
    motion = np.zeros(6)
    for key in dict.fromkeys(keys):
        fine = len(key) == 1 and key.isupper()
        if (name := key.lower() if fine else key) in KEY_MOTION:
            axis, sign = KEY_MOTION[name]
            motion[axis] += sign * (FINE if fine else 1)
    return Input(
        np.clip(motion, -1, 1),
        keys.count("space") % 2 == 1,
        tuple(dict.fromkeys(KEY_COMMANDS[key] for key in keys if key in KEY_COMMANDS)),
    )


def typed_keys(text: str) -> list[str]:
    """Names of the keys behind what a terminal sent."""
    parts: list[str] = _TYPED.findall(text)
    return [SEQUENCES.get(part, part) for part in parts]


class Keyboard:
    """The terminal's keys as they are pressed, and those of `others` (a web page's). The terminal
    echoes nothing until `close`; Ctrl-C stays an interrupt."""

    def __init__(self, others: Callable[[], list[str]] = list) -> None:
        if not sys.stdin.isatty():
            raise UserError(
                "device=keyboard: standard input is no terminal; run it in one, or device=script"
            )
        self._others, self._file = others, sys.stdin.fileno()
        self._before = termios.tcgetattr(self._file)
        tty.setcbreak(self._file)

    def read(self) -> Input:
        text = b""
        while select.select([self._file], [], [], 0)[0] and (part := os.read(self._file, 1024)):
            text += part
        return from_keys(typed_keys(text.decode(errors="ignore")) + self._others())

    def close(self) -> None:
        termios.tcsetattr(self._file, termios.TCSADRAIN, self._before)


class Script:
    """Keys written down: `w*5 space f+d*3 t enter` is w in five steps, the gripper, f and d at once
    in three steps, and so on. Quits at its end."""

    def __init__(self, text: str) -> None:
        self._steps: Iterator[list[str]] = iter(script_steps(text))

    def read(self) -> Input:
        return from_keys(next(self._steps, ["q"]))

    def close(self) -> None:
        """Nothing is held."""


def script_steps(text: str) -> list[list[str]]:
    """The keys of each control step. Raises UserError for what is no key."""
    steps = []
    for word in text.split():
        keys, star, times = word.partition("*")
        pressed = keys.split("+")
        wrong = [k for k in pressed if (k.lower() if len(k) == 1 else k) not in NAMES]
        if wrong or (star and not times.isdecimal()):
            raise UserError(
                f"keys: {word!r} is none of {', '.join(sorted(NAMES))}; write like w*5 a+r space"
            )
        steps += [pressed] * int(times or 1)
    return steps


class Gamepad:
    """A gamepad by Linux's joystick interface, with the axes and buttons of an Xbox one.

    Left stick: forward, left; triggers: up, down; right stick: yaw, pitch; LB, RB: roll;
    A: gripper; X: subtask is done; Start: keep; B: discard; Back: quit; Y: one step without motion.
    """

    BUTTONS = {1: DISCARD, 2: DONE, 3: HOLD, 6: QUIT, 7: KEEP}  # noqa: RUF012
    DEAD = 0.15  # of a stick's range, within which it rests

    def __init__(self, path: Path | None = None) -> None:
        path = path or next(iter(sorted(Path("/dev/input").glob("js*"))), None)
        if path is None:
            raise UserError(
                "device=gamepad: none found (/dev/input/js*, Linux); plug one in, or "
                "choose device=keyboard"
            )
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except PermissionError as e:
            raise UserError(f"device=gamepad: {path} may not be read; join group input") from e
        self._axes, self._buttons = np.zeros(8), np.zeros(16, bool)
        self._axes[[2, 5]] = -1  # triggers rest there

    def read(self) -> Input:
        pressed = [number for kind, number, value in self._events() if kind == 1 and value]
        a = np.where(np.abs(self._axes) > self.DEAD, self._axes, 0)
        lift = (self._axes[5] - self._axes[2]) / 2
        roll = float(self._buttons[5]) - float(self._buttons[4])
        commands = tuple(self.BUTTONS[n] for n in dict.fromkeys(pressed) if n in self.BUTTONS)
        motion = np.array([-a[1], -a[0], lift if abs(lift) > self.DEAD else 0, roll, -a[4], -a[3]])
        return Input(motion, pressed.count(0) % 2 == 1, commands)

    def _events(self) -> Iterator[tuple[int, int, int]]:
        """Kind (1 button, 2 axis), number and value of what has happened."""
        while True:
            try:
                event = os.read(self._file, 8)
            except BlockingIOError:
                return
            except OSError as e:
                raise UserError(f"device=gamepad: it was unplugged ({e.strerror})") from e
            if len(event) < 8:
                return
            value, kind, number = struct.unpack("hBB", event[4:])
            if kind & 2 and number < len(self._axes):
                self._axes[number] = value / 32767
            if kind & 1 and number < len(self._buttons):
                self._buttons[number] = bool(value)
            yield kind, number, value  # what is so at the start has 0x80 in its kind: no press

    def close(self) -> None:
        os.close(self._file)


class SpaceMouse:
    """A 3Dconnexion SpaceMouse by USB. Push, lift and twist the cap; left button: gripper, right
    button: subtask is done. Keeping and discarding is left to the keyboard (`others`)."""

    VENDORS = (0x256F, 0x046D)
    RANGE, DEAD = 350.0, 0.08
    TO_ROBOT = np.array([[0, -1, 0], [-1, 0, 0], [0, 0, -1.0]])  # from right, back, down

    def __init__(self, others: Device) -> None:
        try:
            import hid  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as e:
            raise UserError("device=spacemouse: pip install 'selfflow[teleop]'") from e
        found = [
            d for vendor in self.VENDORS for d in hid.enumerate(vendor)
            if re.search(r"space|3dconnexion", str(d.get("product_string", "")), re.IGNORECASE)
        ]  # fmt: skip
        if not found:
            raise UserError("device=spacemouse: none found; plug one in, or choose device=keyboard")
        self._hid: Any = hid.device()
        try:
            self._hid.open_path(found[0]["path"])
        except OSError as e:
            raise UserError(f"device=spacemouse: may not be opened; give a udev rule ({e})") from e
        self._hid.set_nonblocking(True)
        self._others, self._cap, self._buttons = others, np.zeros(6), 0

    def read(self) -> Input:
        pressed = 0
        while report := bytes(self._hid.read(64)):
            pressed |= self._take(report)
        cap = np.where(np.abs(self._cap) > self.DEAD, self._cap, 0)
        motion = np.concatenate([self.TO_ROBOT @ cap[:3], self.TO_ROBOT @ cap[3:]])
        typed = self._others.read()
        commands = (DONE,) * bool(pressed & 2) + typed.commands
        return Input(
            np.clip(motion + typed.motion, -1, 1), bool(pressed & 1) != typed.toggle, commands
        )

    def _take(self, report: bytes) -> int:
        """Notes a report: 1 is the cap's push (in some models and its twist), 2 its twist, 3 the
        buttons. Returns bits of the buttons that went down."""
        kind, values = report[0], report[1:]
        if kind == 3:
            down = values[0] & ~self._buttons
            self._buttons = values[0]
            return down
        if kind in (1, 2):
            count = 6 if kind == 1 and len(values) >= 12 else 3
            first = 0 if kind == 1 else 3
            numbers = np.array(struct.unpack_from(f"<{count}h", values)) / self.RANGE
            self._cap[first : first + count] = np.clip(numbers, -1, 1)
        return 0

    def close(self) -> None:
        self._hid.close()
        self._others.close()


DEVICES = ("keyboard", "gamepad", "spacemouse", "script")


def open_device(name: str, keys: str, others: Callable[[], list[str]] = list) -> Device:
    """The device of that name; `keys` is the script's text. Raises UserError."""
    if name == "script":
        return Script(keys)
    if name == "gamepad":
        return Gamepad()
    return SpaceMouse(Keyboard(others)) if name == "spacemouse" else Keyboard(others)
