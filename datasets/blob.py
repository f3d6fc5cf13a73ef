"""Bytes of the episode store: arrays and frames in a blob, JSON lines saying where."""

import json
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import UInt8

from selfflow.datasets.spec import UserError

QUALITY = 95  # JPEG with full chroma: 42 dB on an RT-1 frame at 128×160
ArrayPlace = dict[str, Any]  # {"at": byte offset in the blob, "dtype": "<f4", "shape": [T, 7]}
Frame = UInt8[np.ndarray, "_ _ 3"]


class Appender:
    """Writes arrays and frames one by one at the end of an open blob; `crc32` is that of all."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.start = self.end = os.fstat(handle).st_size
        self.crc32 = 0

    def array(self, array: np.ndarray) -> ArrayPlace:
        """Adds an array; returns its place."""
        array = np.asarray(array)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"cannot store an array of {array.dtype}")
        array = array.astype(array.dtype.newbyteorder("<"))
        at = self._add(array.tobytes())
        return {"at": at, "dtype": array.dtype.str, "shape": list(array.shape)}

    def jpegs(self, images: Iterable[Frame | bytes | memoryview]) -> ArrayPlace:
        """Adds frames, or JPEG data as it is; returns the place of the n + 1 offsets that bound
        them."""
        bounds = [self.end]
        for image in images:
            self._add(to_jpeg(image) if isinstance(image, np.ndarray) else image)
            bounds.append(self.end)
        return self.array(np.array(bounds, np.int64))

    def raw(self, images: Iterable[Frame]) -> ArrayPlace:
        """Adds frames of one size as pixels; returns the place of them all."""
        at, shapes = self.end, []
        for image in images:
            shapes.append(image.shape)
            if image.shape != shapes[0]:
                raise UserError(
                    f"frames of {shapes[0]} and of {image.shape} in one episode cannot be raw; "
                    "give size=[height, width], or frames=jpeg"
                )
            self._add(np.ascontiguousarray(image).data.cast("B"))
        return {"at": at, "dtype": "|u1", "shape": [len(shapes), *shapes[0]]}

    def _add(self, data: bytes | memoryview) -> int:
        at = self.end
        write_all(self._handle, data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.end += len(data)
        return at


@contextmanager
def appending(handle: int) -> Iterator[Appender]:
    """An Appender whose bytes are on the disk at the end, or are taken back after an error."""
    appender, whole = Appender(handle), False
    try:
        yield appender
        os.fsync(handle)
        whole = True
    finally:
        if not whole:
            os.ftruncate(handle, appender.start)


def to_jpeg(image: Frame) -> bytes:
    """The frame as the store keeps it."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=QUALITY)


def read_array(blob: memoryview, place: ArrayPlace) -> np.ndarray:
    """The array at this place, as a copy that may be written to."""
    return _view(blob, place).copy()


def are_jpegs(place: ArrayPlace) -> bool:
    """Whether the place of frames is one of JPEG data, not of pixels."""
    return len(place["shape"]) == 1


def read_frames(blob: memoryview, place: ArrayPlace, steps: Iterable[int]) -> list[Frame]:
    """Frames by number: decoded, or views of the pixels, which cannot be written to."""
    if are_jpegs(place):
        return [simplejpeg.decode_jpeg(data) for data in read_encoded(blob, place, steps)]
    pixels = _view(blob, place)
    return [pixels[step] for step in steps]


def read_encoded(blob: memoryview, place: ArrayPlace, steps: Iterable[int]) -> list[memoryview]:
    """JPEG data of frames by number."""
    bounds = _view(blob, place)
    return [blob[bounds[s] : bounds[s + 1]] for s in steps]


def mapped(path: Path) -> memoryview:
    """The file's bytes, mapped into memory; empty for an empty or missing file."""
    if not path.exists() or path.stat().st_size == 0:
        return memoryview(b"")
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def checksum(data: bytes | memoryview) -> int:
    """crc32."""
    return zlib.crc32(data)


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Writes all of data at the end of the open file."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def to_json(value: Mapping[str, Any]) -> str:
    """One line of JSON; numpy's numbers and arrays become plain ones."""
    return json.dumps(value, separators=(",", ":"), default=_plain)


def run_lengths(texts: Sequence[str]) -> list[tuple[str, int]]:
    """Equal neighbours counted: a a b -> (a, 2), (b, 1)."""
    return [(text, len(list(group))) for text, group in groupby(texts)]


def from_run_lengths(runs: Iterable[Sequence[Any]]) -> list[str]:
    """The inverse of `run_lengths`."""
    return [text for text, count in runs for _ in range(count)]


def _view(blob: memoryview, place: ArrayPlace) -> np.ndarray:
    count = int(np.prod(place["shape"], dtype=np.int64))
    return np.frombuffer(blob, place["dtype"], count, place["at"]).reshape(place["shape"])


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be kept as JSON: {value!r}")
