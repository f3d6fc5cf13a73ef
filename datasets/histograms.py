"""Histograms of columns as one PNG, drawn with Pillow: a panel each, its quantiles marked."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 240, 150  # of a panel, pixels
SIDE, TOP, BOTTOM = 12, 24, 30  # margins within it
SHARP = 2  # everything is drawn so much larger, then reduced
HEAD = 26  # height of a row's heading
PAPER, INK, FAINT = (255, 255, 255), (40, 40, 40), (140, 140, 140)
Number = float | int
BAR, MARK, OTHER = (120, 160, 205), (200, 60, 50), (90, 150, 90)


@dataclass(frozen=True)
class Histogram:
    """Counts of equal parts of low .. high, values to mark, and published ones to compare with."""

    title: str
    low: float
    high: float
    counts: Int[np.ndarray, "_"]
    marks: tuple[float, ...] = ()
    others: tuple[float, ...] = ()


def save_histograms(rows: Sequence[tuple[str, Sequence[Histogram]]], path: Path) -> None:
    """Writes a PNG with a heading and a row of panels for each; whole or not at all."""
    columns = max(len(panels) for _, panels in rows)
    size = (columns * WIDTH, len(rows) * (HEAD + HEIGHT))
    image = Image.new("RGB", (size[0] * SHARP, size[1] * SHARP), PAPER)
    draw = ImageDraw.Draw(image)
    for r, (heading, panels) in enumerate(rows):
        y = r * (HEAD + HEIGHT)
        _text(draw, (SIDE, y + HEAD // 2 + 2), heading, "lm", INK, 14)
        for c, panel in enumerate(panels):
            _panel(draw, panel, c * WIDTH, y + HEAD)
    part = path.with_name(f".{path.stem}.part.png")
    image.resize(size, Image.Resampling.LANCZOS).save(part)
    os.replace(part, path)


def _panel(draw: ImageDraw.ImageDraw, panel: Histogram, x: int, y: int) -> None:
    left, right = x + SIDE, x + WIDTH - SIDE
    top, bottom = y + TOP, y + HEIGHT - BOTTOM
    tallest = max(1, int(panel.counts.max()))
    width = (right - left) / len(panel.counts)
    for k, count in enumerate(panel.counts):
        if count:
            height = max(1.0, (bottom - top) * float(count) / tallest)
            at = left + k * width
            _box(draw, (at, bottom - height, at + width, bottom), BAR)
    _box(draw, (left, bottom, right, bottom + 1), INK)
    span = (panel.high - panel.low) or 1.0
    for values, colour in ((panel.others, OTHER), (panel.marks, MARK)):
        for value in values:
            at = left + (right - left) * (value - panel.low) / span
            if left <= at <= right:
                _box(draw, (at - 0.5, top, at + 0.5, bottom + 4), colour)
    _text(draw, (x + WIDTH // 2, y + TOP // 2), panel.title, "mm", INK, 12)
    _text(draw, (left, bottom + 8), f"{panel.low:.3g}", "lt", FAINT, 11)
    _text(draw, (right, bottom + 8), f"{panel.high:.3g}", "rt", FAINT, 11)


def _box(draw: ImageDraw.ImageDraw, box: tuple[Number, ...], colour: tuple[int, ...]) -> None:
    draw.rectangle([round(v * SHARP) for v in box], colour)


def _text(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    anchor: str,
    colour: tuple[int, ...],
    size: int,
) -> None:
    font = ImageFont.load_default(size * SHARP)
    draw.text((at[0] * SHARP, at[1] * SHARP), text, colour, font, anchor)
