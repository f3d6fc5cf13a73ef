"""An episode as an mp4: all its cameras side by side, its actions as curves below."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from selfflow.datasets.curves import BACK, TEXT, Panel, font
from selfflow.datasets.episodes import EpisodeSource
from selfflow.datasets.film import Film

WIDTH, MOST = 640, 1280  # px of the film, at least and at most
PICTURE, SMALL = 400, 256  # height of the pictures, at most; to which small ones are enlarged
BLOCK = 16  # frames held at once


def write_film(source: EpisodeSource, i: int, cameras: Sequence[str], path: Path) -> None:
    """Episode i at its own rate, as an mp4 that appears when it is whole."""
    rate = fps_of(source, i)
    pictures = [source.frames(i, [0], camera)[0] for camera in cameras]
    sizes = picture_sizes([(image.shape[0], image.shape[1]) for image in pictures])
    width = max(WIDTH, sum(w for _, w in sizes))
    panel = Panel(source.signals(i), width + width % 2, rate)
    with Film(path, max(rate, 1.0)) as film:
        for first in range(0, source.length(i), BLOCK):
            steps = range(first, min(first + BLOCK, source.length(i)))
            columns = [source.frames(i, steps, camera) for camera in cameras]
            for step, images in zip(steps, zip(*columns, strict=True), strict=True):
                film.add(composed(images, cameras, sizes, panel, step))


def fps_of(source: EpisodeSource, i: int) -> float:
    """Steps a second of episode i: what the data say, else the robot's."""
    rate = source.metadata(i).get("fps")
    if isinstance(rate, int | float) and rate > 0:
        return float(rate)
    return source.embodiment.control_hz


def picture_sizes(native: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(height, width) in the film: of one height, as large as fits, at most SMALL or doubled."""
    aspect = sum(w / h for h, w in native)
    height = min(PICTURE, round(MOST / aspect), max(SMALL, *(2 * h for h, _ in native)))
    height -= height % 2
    return [(height, round(height * w / h)) for h, w in native]


def composed(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    cameras: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    panel: Panel,
    step: int,
) -> UInt8[np.ndarray, "H W 3"]:
    """A frame of the film."""
    height = sizes[0][0]
    canvas = Image.new("RGB", (panel.width, height + panel.height), BACK)
    draw, x = ImageDraw.Draw(canvas), (panel.width - sum(w for _, w in sizes)) // 2
    for image, camera, (h, w) in zip(images, cameras, sizes, strict=True):
        canvas.paste(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC), (x, 0))
        if len(cameras) > 1:
            draw.text((x + 6, 4), camera, TEXT, font(13), stroke_width=2, stroke_fill=BACK)
        x += w
    canvas.paste(Image.fromarray(panel.at(step)), (0, height))
    return np.asarray(canvas)
