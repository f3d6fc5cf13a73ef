"""Episodes as films: an mp4 with a caption strip, and a contact sheet."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from selfflow.datasets.film import Film

__all__ = ["Film", "captioned", "contact_sheet", "thumbnail"]

STRIP = 40  # px of caption under the picture
MIN_WIDTH = 320  # smaller pictures are enlarged, so that the caption can be read
SHEET_WIDTH = 400  # of a contact sheet's frame, at most


def captioned(
    image: UInt8[np.ndarray, "h w 3"], instruction: str, step: int, success: bool
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture above a strip with instruction, step and success; both sides even."""
    factor = max(1, -(-MIN_WIDTH // image.shape[1]))
    picture = Image.fromarray(image)
    picture = picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC
    )
    width, height = picture.width + picture.width % 2, picture.height + STRIP
    canvas = Image.new("RGB", (width, height + height % 2), (24, 24, 24))
    canvas.paste(picture, (0, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    draw.text((6, picture.height + 3), instruction, (235, 235, 235), font)
    draw.text((6, picture.height + 20), f"step {step}", (170, 170, 170), font)
    if success:
        draw.text((width - 62, picture.height + 20), "success", (90, 220, 90), font)
    return np.asarray(canvas)


def thumbnail(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """The frame for a contact sheet: at most SHEET_WIDTH wide."""
    height, width = frame.shape[:2]
    if width <= SHEET_WIDTH:
        return frame
    size = (SHEET_WIDTH, round(height * SHEET_WIDTH / width))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def contact_sheet(
    frames: list[UInt8[np.ndarray, "h w 3"]], path: Path, columns: int = 4, count: int = 12
) -> None:
    """A PNG of `count` frames spread evenly from first to last."""
    chosen = [
        frames[i] for i in np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    ]
    height, width = chosen[0].shape[:2]
    rows = -(-len(chosen) // columns)
    sheet = np.full((rows * height, columns * width, 3), 24, np.uint8)
    for i, frame in enumerate(chosen):
        y, x = i // columns * height, i % columns * width
        sheet[y : y + height, x : x + width] = frame
    part = path.with_name(f".{path.stem}.part.png")
    Image.fromarray(sheet).save(part)
    os.replace(part, path)
