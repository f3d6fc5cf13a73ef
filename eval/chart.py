"""Charts as a PNG, drawn with Pillow: lines with intervals in panels, or a row a name; one legend
below."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 420, 270  # of a panel, pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 42  # margins within it
SHARP = 2  # everything is drawn so much larger, then reduced
LEGEND = 24  # height of a line of it
INK, FAINT, PAPER = (40, 40, 40), (222, 222, 222), (255, 255, 255)
Number = float | int
COLOURS = (
    (31, 119, 180),
    (214, 39, 40),
    (44, 160, 44),
    (148, 103, 189),
    (255, 127, 14),
    (23, 160, 175),
    (227, 119, 194),
    (127, 127, 127),
)


@dataclass(frozen=True)
class Line:
    """A named line; `low` and `high` draw bars. Lines of one name have one colour throughout."""

    name: str
    x: Sequence[Number]
    y: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes; without `bottom` and `top` the y axis holds all that is drawn."""

    title: str
    x_label: str
    lines: Sequence[Line]
    bottom: Number | None = None
    top: Number | None = None


@dataclass(frozen=True)
class Span:
    """A value with its interval, and the single values that it came from."""

    value: Number
    low: Number
    high: Number
    parts: Sequence[Number] = ()


def save_chart(panels: Sequence[Panel], path: Path, columns: int) -> None:
    """Writes the PNG, whole or not at all."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    rows = -(-len(panels) // columns)
    with _paper(path, (columns * WIDTH, rows * HEIGHT), names, columns) as draw:
        for i, panel in enumerate(panels):
            _Axes(draw, panel, (i % columns * WIDTH, i // columns * HEIGHT)).draw(colours)


def save_rows(rows: dict[str, dict[str, Span]], title: str, path: Path) -> None:
    """Writes the PNG: a row a name, in it a span a series, on an axis from 0 to 1."""
    series = list(dict.fromkeys(name for spans in rows.values() for name in spans))
    wide, left, each = 2 * WIDTH, 170, 10 + 12 * len(series)
    bottom = TOP + each * len(rows)

    def across(value: Number) -> Number:
        return left + value * (wide - RIGHT - left)

    with _paper(path, (wide, bottom + BOTTOM), series, 2) as draw:
        for value in ticks(0, 1):
            draw.line(_scaled((across(value), TOP), (across(value), bottom)), FAINT, SHARP)
            _text(draw, (across(value), bottom + 6), f"{value:g}", "mt")
        draw.rectangle(_scaled((left, TOP), (wide - RIGHT, bottom)), outline=INK, width=SHARP)
        _text(draw, ((left + wide - RIGHT) / 2, TOP - 8), title, "mb")
        for i, (name, spans) in enumerate(rows.items()):
            _text(draw, (left - 8, TOP + each * (i + 0.5)), name, "rm")
            for label, span in spans.items():
                k = series.index(label)
                y = TOP + each * i + 11 + 12 * k
                draw.line(_scaled((across(span.low), y), (across(span.high), y)), COLOURS[k], SHARP)
                for part in span.parts:
                    draw.line(_scaled((across(part), y - 3), (across(part), y + 3)), INK, SHARP)
                x = across(span.value)
                draw.ellipse(_scaled((x - 3.5, y - 3.5), (x + 3.5, y + 3.5)), COLOURS[k])


@contextmanager
def _paper(
    path: Path, size: tuple[int, int], names: Sequence[str], columns: int
) -> Iterator[ImageDraw.ImageDraw]:
    """What is drawn on it goes to the PNG, whole or not at all, with a legend of the names below
    the size."""
    whole = (size[0], size[1] + -(-len(names) // columns) * LEGEND + 8)
    image = Image.new("RGB", (whole[0] * SHARP, whole[1] * SHARP), PAPER)
    draw = ImageDraw.Draw(image)
    yield draw
    for i, name in enumerate(names):
        x, y = i % columns * WIDTH + LEFT, size[1] + i // columns * LEGEND + LEGEND // 2
        draw.line(_scaled((x, y), (x + 26, y)), COLOURS[i % len(COLOURS)], 3 * SHARP)
        _text(draw, (x + 34, y), name, "lm")
    part = path.with_name(f".{path.stem}.part.png")
    image.resize(whole, Image.Resampling.LANCZOS).save(part)
    os.replace(part, path)


class _Axes:
    """A panel on the paper: from values to pixels."""

    def __init__(self, draw: ImageDraw.ImageDraw, panel: Panel, corner: tuple[int, int]) -> None:
        self._draw, self._panel = draw, panel
        x0, y0 = corner
        self._box = (x0 + LEFT, y0 + TOP, x0 + WIDTH - RIGHT, y0 + HEIGHT - BOTTOM)
        xs = [x for line in panel.lines for x in line.x]
        ys = [v for k in panel.lines for v in (*k.y, *k.low, *k.high) if math.isfinite(v)]
        self._whole = all(float(x).is_integer() for x in xs)
        self._x = _span(xs, None, None)
        self._y = _span(ys, panel.bottom, panel.top)

    def draw(self, colours: dict[str, tuple[int, int, int]]) -> None:
        """Frame, ticks, lines and bars."""
        left, top, right, bottom = self._box
        for value in ticks(*self._y):
            y = self._at(0, value)[1]
            self._draw.line(_scaled((left, y), (right, y)), FAINT, SHARP)
            _text(self._draw, (left - 6, y), f"{value:g}", "rm")
        for value in ticks(*self._x, whole=self._whole):
            x = self._at(value, 0)[0]
            _text(self._draw, (x, bottom + 6), f"{value:g}", "mt")
        self._draw.rectangle(_scaled((left, top), (right, bottom)), outline=INK, width=SHARP)
        _text(self._draw, ((left + right) / 2, top - 8), self._panel.title, "mb")
        _text(self._draw, ((left + right) / 2, bottom + 24), self._panel.x_label, "mt")
        for number, line in enumerate(self._panel.lines):
            # side by side where they would hide each other
            self._line(line, colours[line.name], 3 * (number - (len(self._panel.lines) - 1) / 2))

    def _line(self, line: Line, colour: tuple[int, int, int], aside: Number) -> None:
        points = [self._at(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        self._draw.line(_scaled(*points), colour, 2 * SHARP)
        for x, low, high in zip(line.x, line.low, line.high, strict=False):
            ends = [(a + aside, b) for a, b in (self._at(x, low), self._at(x, high))]
            self._draw.line(_scaled(*ends), colour, SHARP)
        if len(points) > 2 or line.low:
            for x, y in points:
                self._draw.ellipse(_scaled((x - 2.5, y - 2.5), (x + 2.5, y + 2.5)), colour)

    def _at(self, x: Number, y: Number) -> tuple[Number, Number]:
        left, top, right, bottom = self._box
        (x0, x1), (y0, y1) = self._x, self._y
        across, up = (x - x0) / (x1 - x0), (min(max(y, y0), y1) - y0) / (y1 - y0)
        return left + across * (right - left), bottom - up * (bottom - top)


def ticks(low: Number, high: Number, whole: bool = False) -> list[Number]:
    """Four to nine round numbers between; fewer where only whole ones will do."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= max(k for k in (1, 2, 5) if k * step <= (high - low) / 4)
    step = max(step, 1) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _span(
    values: Sequence[Number], low: Number | None, high: Number | None
) -> tuple[Number, Number]:
    """The axis' ends, with a little room where they are not given."""
    least, most = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.05 * (most - least) or 0.5
    return least - room if low is None else low, most + room if high is None else high


def _scaled(*points: tuple[Number, Number]) -> list[tuple[Number, Number]]:
    return [(x * SHARP, y * SHARP) for x, y in points]


def _text(draw: ImageDraw.ImageDraw, at: tuple[Number, Number], text: str, anchor: str) -> None:
    font = ImageFont.load_default(12 * SHARP)
    draw.text((at[0] * SHARP, at[1] * SHARP), text, INK, font, anchor)
