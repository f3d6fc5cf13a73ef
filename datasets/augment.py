"""Random changes of pictures: one draw a sample, so that all its frames change alike.

Context and future frames, student and teacher therefore see the same change. Only training draws
them; evaluation loads pictures as they are.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

ASPECT = 1.1  # of a random crop: height and width are stretched by up to this, either way
LUMA = np.array([0.299, 0.587, 0.114])  # of R, G, B in the brightness that is seen (BT.601)
# RGB -> YIQ, whose last two are colour: hue turns them
YIQ = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


@dataclass(frozen=True)
class Augment:
    """How far a draw may go; the defaults change nothing."""

    crop: float = 1.0  # a random part of at least this share of the area becomes the picture
    brightness: float = 0.0  # times 1 - this .. 1 + this
    contrast: float = 0.0  # about the mean grey, times 1 - this .. 1 + this
    saturation: float = 0.0  # about the pixel's own grey, times 1 - this .. 1 + this
    hue: float = 0.0  # turned by up to this share of the colour circle

    def __post_init__(self) -> None:
        for f in fields(self):
            low, high = {"crop": (0.05, 1.0), "hue": (0.0, 0.5)}.get(f.name, (0.0, 1.0))
            value = getattr(self, f.name)
            if not low <= value <= high:
                raise ValueError(f"augment.{f.name}={value}: must lie in {low} .. {high}")

    @property
    def coloured(self) -> bool:
        """Whether colours change."""
        return bool(self.brightness or self.contrast or self.saturation or self.hue)


@dataclass(frozen=True)
class Change:
    """One draw."""

    box: tuple[float, float, float, float] | None = None  # left, top, right, bottom, as shares
    colour: tuple[float, float, float, float] | None = None  # three factors, and hue in radians
    shift: tuple[int, int] = (0, 0)  # pixels down and right


def draw(rng: np.random.Generator, augment: Augment, shift: int = 0) -> Change:
    """A change within these bounds, and a shift of at most so many pixels each way."""
    box = colour = None
    if augment.crop < 1:
        area, stretch = rng.uniform(augment.crop, 1), rng.uniform(-1, 1)
        side, aspect = math.sqrt(area), ASPECT ** (stretch / 2)
        width, height = min(1.0, side * aspect), min(1.0, side / aspect)
        left, top = rng.uniform(0, 1, 2) * (1 - width, 1 - height)
        box = (left, top, left + width, top + height)
    if augment.coloured:
        a = augment
        factors = 1 + rng.uniform(-1, 1, 3) * (a.brightness, a.contrast, a.saturation)
        colour = (*factors.tolist(), 2 * math.pi * a.hue * rng.uniform(-1, 1))
    return Change(box, colour, tuple(rng.integers(-shift, shift + 1, 2).tolist()))


def resize(
    image: UInt8[np.ndarray, "_ _ 3"],
    height: int,
    width: int,
    box: tuple[float, float, float, float] | None = None,
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """The image at another size by averaging boxes of whole pixels, squashed if its aspect differs.

    Where the ratio is whole this is the area average; enlarging repeats pixels. Training and
    policies both use it, so that they see the same picture. `box` (left, top, right, bottom as
    shares of the sides) cuts out a part first, whose pixels are then weighted smoothly.
    """
    h, w = image.shape[:2]
    if box is not None:
        part = tuple(share * side for share, side in zip(box, (w, h, w, h), strict=True))
        picture = Image.fromarray(image)
        return np.array(picture.resize((width, height), Image.Resampling.BILINEAR, part))
    if (h, w) == (height, width):
        return image
    picture = Image.fromarray(image)
    if h % height == 0 and w % width == 0:  # whole blocks: the same, in half the time
        return np.array(picture.reduce((w // width, h // height)))
    return np.array(picture.resize((width, height), Image.Resampling.BOX))


def apply(change: Change, frames: UInt8[np.ndarray, "F H W 3"]) -> None:
    """Colours and shifts the frames of a sample in place; they were cut by `resize`."""
    if change.colour is not None:
        grey = float(frames[:, ::4, ::4].mean((0, 1, 2)) @ LUMA)  # all pixels: 12 times as slow
        frames[:] = coloured(frames, colour_matrix(change.colour, grey))
    if change.shift != (0, 0):
        frames[:] = shifted(frames, *change.shift)


def colour_matrix(
    colour: tuple[float, float, float, float], grey: float
) -> Float64[np.ndarray, "3 4"]:
    """RGB and 1 -> RGB: brightness, contrast about `grey`, saturation and hue, in this order."""
    bright, contrast, saturation, turn = colour
    keep = saturation * np.eye(3) + (1 - saturation) * LUMA  # each row mixes in the pixel's grey
    plane = np.eye(3)
    plane[1:, 1:] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    turned = np.linalg.inv(YIQ) @ plane @ YIQ @ keep
    offset = turned @ np.full(3, (1 - contrast) * bright * grey)
    return np.column_stack([turned * bright * contrast, offset])


def coloured(
    images: UInt8[np.ndarray, "F H W 3"], matrix: Float64[np.ndarray, "3 4"]
) -> UInt8[np.ndarray, "F H W 3"]:
    """Every pixel through the matrix, cut off at 0 and 255."""
    f, h, w, _ = images.shape
    picture = Image.fromarray(images.reshape(f * h, w, 3))
    return np.array(picture.convert("RGB", tuple(matrix.ravel().tolist()))).reshape(f, h, w, 3)


def shifted(images: UInt8[np.ndarray, "F H W 3"], dy: int, dx: int) -> UInt8[np.ndarray, "F H W 3"]:
    """All images moved down by dy and right by dx pixels, their edges repeated."""
    if dy == dx == 0:
        return images
    h, w = images.shape[1:3]
    margin = max(abs(dy), abs(dx))
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="edge")
    return padded[:, margin - dy :, margin - dx :][:, :h, :w]
