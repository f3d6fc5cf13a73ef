"""An episode's signals as curves under its pictures, with a cursor at the present step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from selfflow.datasets.episodes import Signals
from selfflow.datasets.spec import ACTION_NAMES, GRIPPER, OPENING, POSITION, ROTATION

HEIGHT, LEGEND, MARGIN, GAP, TOP = 92, 128, 12, 10, 52  # px: of a strip, of its legend, ...
FINE = 3  # curves are drawn so many times larger, then shrunk, which smooths them
BACK, PLOT, GRID = (20, 22, 27), (30, 33, 40), (62, 67, 78)
TEXT, DIM, CURSOR = (232, 234, 238), (146, 152, 164), (255, 255, 255)
UNKNOWN, ENDED, CHANGE = (44, 46, 52), (255, 92, 92), (250, 204, 92)
COLOURS = ((255, 122, 112), (106, 208, 128), (108, 168, 255))  # x, y, z
OPEN, SENSED = (250, 178, 84), (148, 128, 200)


@dataclass(frozen=True)
class Strip:
    """Curves that share an axis; rows that are not valid are gaps."""

    title: str
    names: Sequence[str]
    colours: Sequence[tuple[int, int, int]]
    values: Float[np.ndarray, "T k"]
    valid: Bool[np.ndarray, "T k"]
    low: float
    high: float


class Panel:
    """Curves of an episode, `width` pixels wide: position, rotation and gripper."""

    def __init__(self, signals: Signals, width: int, fps: float) -> None:
        self.signals, self.width, self.fps = signals, width, fps
        self.steps = len(signals.terminate)
        self.strips = strips(signals)
        self.height = TOP + len(self.strips) * (HEIGHT + GAP) + MARGIN // 2
        self.height += self.height % 2

    def at(self, step: int) -> UInt8[np.ndarray, "h w 3"]:
        """The panel with its cursor at a step, and the values there."""
        image = self._curves.copy()
        draw = ImageDraw.Draw(image)
        x = round(self._x(step))
        for n, strip in enumerate(self.strips):
            top = self._top(n)
            draw.line([(x, top), (x, top + HEIGHT - 1)], CURSOR, 1)
            for k, name in enumerate(strip.names):
                shown = f"{strip.values[step, k]:+.3f}" if strip.valid[step, k] else "–"
                y = top + 20 + 20 * k
                left = self.width - MARGIN - LEGEND + 12
                draw.text((left, y), name, strip.colours[k], font(14))
                draw.text((self.width - MARGIN, y), shown, TEXT, font(14), anchor="ra")
        self._head(draw, step)
        return np.asarray(image)

    def _head(self, draw: ImageDraw.ImageDraw, step: int) -> None:
        """The instruction, the step, and what holds there."""
        text = fitted(self.signals.instruction[step] or "(no instruction)", self.width, 17)
        draw.text((MARGIN, 6), text, TEXT, font(17))
        place = f"step {step} of {self.steps}    {step / self.fps:.1f} s"
        draw.text((MARGIN, 29), place, DIM, font(13))
        marks = (
            ("terminate", ENDED, self.signals.terminate.any()),
            ("new instruction", CHANGE, bool(changes(self.signals.instruction))),
            ("not known", DIM, not self.signals.action_valid[step]),
        )
        right = self.width - MARGIN
        for name, colour, there in marks:
            if there:
                draw.text((right, 29), name, colour, font(13), anchor="ra")
                right -= round(font(13).getlength(name)) + 14

    @cached_property
    def _curves(self) -> Image.Image:
        fine = Image.new("RGB", (self.width * FINE, self.height * FINE), BACK)
        draw = ImageDraw.Draw(fine)
        for n, strip in enumerate(self.strips):
            self._plot(draw, strip, self._top(n))
        image = fine.resize((self.width, self.height), Image.Resampling.BOX)
        draw = ImageDraw.Draw(image)
        for n, strip in enumerate(self.strips):
            top, right = self._top(n), self.width - MARGIN - LEGEND
            draw.text((right + 12, top + 1), strip.title, DIM, font(12))
            draw.text((right - 4, top + 1), f"{strip.high:.2g}", DIM, font(10), anchor="ra")
            low = f"{strip.low:.2g}"
            draw.text((right - 4, top + HEIGHT - 2), low, DIM, font(10), anchor="rd")
        return image

    def _plot(self, draw: ImageDraw.ImageDraw, strip: Strip, top: int) -> None:
        left, right = MARGIN * FINE, (self.width - MARGIN - LEGEND) * FINE
        first, last = top * FINE, (top + HEIGHT) * FINE
        draw.rectangle((left, first, right, last), PLOT)
        half = (self._x(1) - self._x(0)) / 2 * FINE
        for step in np.flatnonzero(~strip.valid[:, 0]).tolist():
            x = self._x(step) * FINE
            draw.rectangle((x - half, first, x + half, last), UNKNOWN)
        if strip.low < 0 < strip.high:
            y = self._y(strip, 0.0, top) * FINE
            draw.line([(left, y), (right, y)], GRID, FINE)
        for step in changes(self.signals.instruction):
            x = self._x(step - 0.5) * FINE
            draw.line([(x, first), (x, last)], CHANGE, 2 * FINE)
        for step in np.flatnonzero(self.signals.terminate).tolist():
            x = self._x(step) * FINE
            draw.line([(x, first), (x, last)], ENDED, 2 * FINE)
        for k in reversed(range(len(strip.names))):
            for run in runs(strip.valid[:, k]):
                points = [
                    (self._x(t) * FINE, self._y(strip, strip.values[t, k], top) * FINE) for t in run
                ]
                width = 2 * FINE
                draw.line(points if len(points) > 1 else points * 2, strip.colours[k], width)
                for x, y in (points[0], points[-1]):
                    draw.ellipse((x - width, y - width, x + width, y + width), strip.colours[k])

    def _top(self, n: int) -> int:
        return TOP + n * (HEIGHT + GAP)

    def _x(self, step: int | float) -> float:
        room = self.width - 2 * MARGIN - LEGEND
        return MARGIN + room * (step + 0.5) / self.steps

    def _y(self, strip: Strip, value: float, top: int) -> float:
        share = (value - strip.low) / (strip.high - strip.low)
        return top + HEIGHT - 5 - (HEIGHT - 10) * share


def strips(signals: Signals) -> list[Strip]:
    """Position, rotation and gripper of the actions, with the sensed opening."""
    actions, valid = signals.actions, signals.action_valid
    found = []
    for part, title in ((POSITION, "position, m"), (ROTATION, "rotation, rad")):
        values = actions[:, part].astype(float)
        high = limit(values[valid])
        three = np.tile(valid[:, None], 3)
        found.append(Strip(title, ACTION_NAMES[part], COLOURS, values, three, -high, high))
    gripper = np.stack([actions[:, GRIPPER], signals.proprio[:, OPENING]], 1).astype(float)
    known = np.stack([valid, signals.proprio_valid], 1)
    names, colours = ("target", "sensed"), (OPEN, SENSED)
    found.append(Strip("gripper, 1 = open", names, colours, gripper, known, 0.0, 1.0))
    return found


def limit(values: np.ndarray) -> float:
    """The largest magnitude, for an axis around zero."""
    return float(np.abs(values).max(initial=0.0)) or 1.0


def changes(texts: Sequence[str]) -> list[int]:
    """Steps whose text is not that of the step before."""
    return [t for t in range(1, len(texts)) if texts[t] != texts[t - 1]]


def runs(valid: Bool[np.ndarray, "T"]) -> list[range]:
    """Steps that are valid, in pieces without a gap."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], valid, [False]]).astype(int)))
    return [range(a, b) for a, b in edges.reshape(-1, 2).tolist()]


def fitted(text: str, width: int, size: int) -> str:
    """The text, cut so that it fits the width at this size of letters."""
    text = " ".join(text.split())
    room = width - 2 * MARGIN
    if font(size).getlength(text) <= room:
        return text
    while text and font(size).getlength(text + " …") > room:
        text = text[:-1]
    return text + " …"


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Letters of this size."""
    return ImageFont.load_default(size)
