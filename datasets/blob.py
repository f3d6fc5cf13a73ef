"""Bytes of the episode store: arrays and JPEG frames in a blob, JSON lines saying where."""

import json
import mmap
import os
import zlib
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import UInt8

QUALITY = 95  # JPEG with full chroma: 42 dB on an RT-1 frame at 128×160
ArrayPlace = dict[str, Any]  # {"at": byte offset in the blob, "dtype": "<f4", "shape": [T, 7]}


class Packer:
    """Collects what will be appended to a blob at byte `start`."""

    def __init__(self, start: int) -> None:
        self._start, self._parts, self._size = start, [], 0

    def array(self, array: np.ndarray) -> ArrayPlace:
        """Adds an array; returns its place."""
        array = np.asarray(array)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"cannot store an array of {array.dtype}")
        array = array.astype(array.dtype.newbyteorder("<"))
        return {
            "at": self._add(array.tobytes()),
            "dtype": array.dtype.str,
            "shape": list(array.shape),
        }

    def jpegs(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> ArrayPlace:
        """Adds frames as JPEG; returns the place of the n + 1 offsets that bound them."""
        bounds = [self._start + self._size]
        for image in images:
            data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=QUALITY)
            bounds.append(self._add(data) + len(data))
        return self.array(np.array(bounds, np.int64))

    def data(self) -> bytes:
        """Everything added, in order."""
        return b"".join(self._parts)

    def _add(self, data: bytes) -> int:
        at = self._start + self._size
        self._parts.append(data)
        self._size += len(data)
        return at


def read_array(blob: memoryview, place: ArrayPlace) -> np.ndarray:
    """The array at this place, as a copy that may be written to."""
    count = int(np.prod(place["shape"], dtype=np.int64))
    flat = np.frombuffer(blob, place["dtype"], count, place["at"])
    return flat.reshape(place["shape"]).copy()


def read_jpegs(
    blob: memoryview, place: ArrayPlace, steps: Iterable[int]
) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """Decoded frames by number."""
    bounds = read_array(blob, place)
    return [simplejpeg.decode_jpeg(blob[bounds[s] : bounds[s + 1]]) for s in steps]


def mapped(path: Path) -> memoryview:
    """The file's bytes, mapped into memory; empty for an empty or missing file."""
    if not path.exists() or path.stat().st_size == 0:
        return memoryview(b"")
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def checksum(data: bytes | memoryview) -> int:
    """crc32."""
    return zlib.crc32(data)


def write_all(handle: int, data: bytes) -> None:
    """Writes all of data at the end of the open file and waits until it is on the disk."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]
    os.fsync(handle)


def to_json(value: dict[str, Any]) -> str:
    """One line of JSON; numpy's numbers and arrays become plain ones."""
    return json.dumps(value, separators=(",", ":"), default=_plain)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """JSON objects of a file of lines, and the number of lines that are torn."""
    text = path.read_bytes() if path.exists() else b""
    lines = [_parse(line) for line in text.split(b"\n") if line]
    whole = [line for line in lines if line is not None]
    return whole, len(lines) - len(whole)


def run_lengths(texts: Sequence[str]) -> list[tuple[str, int]]:
    """Equal neighbours counted: a a b -> (a, 2), (b, 1)."""
    return [(text, len(list(group))) for text, group in groupby(texts)]


def from_run_lengths(runs: Iterable[Sequence[Any]]) -> list[str]:
    """The inverse of `run_lengths`."""
    return [text for text, count in runs for _ in range(count)]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # also what undecodable bytes raise
        return None
    return value if isinstance(value, dict) else None


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be kept as JSON: {value!r}")
