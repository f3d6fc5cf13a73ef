"""TFRecord files and tf.train.Example without TensorFlow.

A file is a row of records: length (uint64), crc of length, data, crc of data, all little-endian. An
Example is the protobuf message map<string, bytes_list | float_list | int64_list>; only the fields
asked for are decoded. Reading maps the file into memory and touches what is read.
"""

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from selfflow.datasets.blob import mapped
from selfflow.datasets.spec import UserError

Feature = list[memoryview] | np.ndarray  # a bytes list, or float32 / int64 values
HEADER, FOOTER = 12, 4  # bytes around the data of a record


class CorruptRecord(UserError):
    """A file that is truncated or damaged; the message names the file and the record."""


class TFRecordFile:
    """Random access to the records of one file.

    Raises CorruptRecord where the file ends within a record; with `skip_corrupt` the rest is left
    out and `skipped` is 1. `check_crc` checks every length on opening and every record when
    it is read (1.3 ms for 140 KB).
    """

    def __init__(self, path: Path, check_crc: bool = False, skip_corrupt: bool = False) -> None:
        self.path, self._check_crc = path, check_crc
        self._data = mapped(path)
        self._ranges: list[tuple[int, int]] = []
        self.skipped = 0
        try:
            self._ranges.extend(self._index())
        except CorruptRecord:
            if not skip_corrupt:
                raise
            self.skipped = 1

    def __len__(self) -> int:
        return len(self._ranges)

    def record(self, i: int) -> memoryview:
        """Data of record i, not copied."""
        start, end = self._ranges[i]
        data = self._data[start:end]
        if self._check_crc and masked_crc32c(data) != _u32(self._data[end : end + FOOTER]):
            raise self.corrupt(i, "its checksum does not match")
        return data

    def example(self, i: int, keys: Collection[str] | None = None) -> dict[str, Feature]:
        """Features of record i, those of `keys` only. Raises CorruptRecord if it does not parse."""
        try:
            return parse_example(self.record(i), keys)
        except ValueError as e:
            raise self.corrupt(i, str(e)) from e

    def corrupt(self, i: int, reason: str) -> CorruptRecord:
        """The error that names this file and record."""
        return CorruptRecord(f"{self.path}: record {i}: {reason}")

    def _index(self) -> Iterator[tuple[int, int]]:
        at, count = 0, 0
        while at < len(self._data):
            header = self._data[at : at + HEADER]
            if len(header) < HEADER:
                raise self.corrupt(count, "the file ends within its header")
            start = at + HEADER
            end = start + int.from_bytes(header[:8], "little")
            if self._check_crc and masked_crc32c(header[:8]) != _u32(header[8:]):
                raise self.corrupt(count, "the checksum of its length does not match")
            at = end + FOOTER
            if at > len(self._data):
                raise self.corrupt(count, "the file ends within its data, or its length is damaged")
            yield start, end
            count += 1


def parse_example(
    data: bytes | memoryview, keys: Collection[str] | None = None
) -> dict[str, Feature]:
    """Features by name, those of `keys` only; all if None. Raises ValueError if it does not parse.

    An empty feature (no kind, or no values) is an empty list.
    """
    found: dict[str, Feature] = {}
    for number, features in _fields(memoryview(data)):
        if number != 1:
            continue
        for _, entry in _fields(_bytes(features)):
            parts = dict(_fields(_bytes(entry)))
            try:
                key = str(_bytes(parts.get(1, memoryview(b""))), "utf-8")
            except UnicodeDecodeError as e:
                raise ValueError("a feature's name is not text") from e
            if keys is None or key in keys:
                found[key] = _feature(_bytes(parts.get(2, memoryview(b""))))
    return found


def encode_example(features: Mapping[str, Sequence[bytes] | np.ndarray]) -> bytes:
    """The inverse of `parse_example`: bytes, float and integer lists by name."""
    return _message(1, b"".join(_message(1, _entry(k, v)) for k, v in features.items()))


def write_records(path: Path, records: Iterable[bytes]) -> None:
    """Writes a TFRecord file with checksums."""
    with open(path, "wb") as file:
        for data in records:
            length = struct.pack("<Q", len(data))
            file.write(length + struct.pack("<I", masked_crc32c(length)))
            file.write(data + struct.pack("<I", masked_crc32c(data)))


def masked_crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of data, masked as TFRecord does."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C by numpy: up to 1024 pieces side by side, then joined two by two.

    Without initial and final inversion a crc is linear: crc(a + b) = shift(crc(a)) ^ crc(b), where
    shift appends len(b) zero bytes, and zero bytes in front change nothing.
    """
    flat = np.frombuffer(data, np.uint8)
    if len(flat) < 4:  # the initial inversion needs four bytes to act on: invert by hand
        state = 0xFFFFFFFF
        for byte in flat:
            state = int(_table()[(state ^ int(byte)) & 0xFF]) ^ (state >> 8)
        return state ^ 0xFFFFFFFF
    lanes = 1 if len(flat) < 256 else 1024
    width = -(-len(flat) // lanes)
    pieces = np.zeros(lanes * width, np.uint8)
    pieces[-len(flat) :] = flat
    pieces[len(pieces) - len(flat) :][:4] ^= 0xFF  # what starting from all ones amounts to
    crcs = _advance(np.zeros(lanes, np.uint32), pieces.reshape(lanes, width).T)
    shift = _advance(np.uint32(1) << np.arange(32, dtype=np.uint32), np.zeros((width, 1), np.uint8))
    while len(crcs) > 1:
        crcs = _apply(shift, crcs[0::2]) ^ crcs[1::2]
        shift = _apply(shift, shift)
    return int(crcs[0]) ^ 0xFFFFFFFF


@cache
def _table() -> np.ndarray:
    state = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        state = (state >> np.uint32(1)) ^ np.where(state & 1, np.uint32(0x82F63B78), np.uint32(0))
    return state


def _advance(states: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """crc states after one more byte each, column by column."""
    table, eight = _table(), np.uint32(8)
    for column in columns:
        states = table[(states ^ column) & 0xFF] ^ (states >> eight)
    return states


def _apply(matrix: np.ndarray, states: np.ndarray) -> np.ndarray:
    """A linear map over GF(2), given by the images of the 32 bits, applied to states."""
    bits = (states[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.bitwise_xor.reduce(np.where(bits, matrix, np.uint32(0)), axis=1)


def _u32(data: memoryview) -> int:
    return int.from_bytes(data, "little")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, position behind it)."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number is cut off")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(field number, content) of a protobuf message; content of varint fields is a number."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"not a protobuf message: wire type {kind}")
        if at + size > len(data):
            raise ValueError("a field is cut off")
        yield tag >> 3, data[at : at + size]
        at += size


def _bytes(content: memoryview | int) -> memoryview:
    if isinstance(content, int):
        raise ValueError("a number where a message should be")
    return content


def _feature(data: memoryview) -> Feature:
    values: Feature = []
    for kind, content in _fields(data):
        items = [item for number, item in _fields(_bytes(content)) if number == 1]
        if kind == 1:
            values = [_bytes(item) for item in items]
        elif kind == 2:  # packed in one piece, or four bytes each
            packed = b"".join(_bytes(item) for item in items)
            if len(packed) % 4:
                raise ValueError("a float list of odd length")
            values = np.frombuffer(packed, "<f4")
        elif kind == 3:
            values = np.array([n for item in items for n in _integers(item)], np.int64)
    return values


def _integers(item: memoryview | int) -> Iterator[int]:
    """int64 values of one item: a single number, or many packed."""
    at, numbers = 0, [item] if isinstance(item, int) else []
    while not isinstance(item, int) and at < len(item):
        number, at = _varint(item, at)
        numbers.append(number)
    for number in numbers:
        if number >= 2**64:
            raise ValueError("a number of more than 64 bits")
        yield number - 2**64 if number >= 2**63 else number


def _entry(key: str, values: Sequence[bytes] | np.ndarray) -> bytes:
    if not isinstance(values, np.ndarray):
        feature = _message(1, b"".join(_message(1, v) for v in values))
    elif values.dtype.kind == "f":
        feature = _message(2, _message(1, values.astype("<f4").tobytes()))
    else:
        feature = _message(3, _message(1, b"".join(_number(int(v) % 2**64) for v in values.flat)))
    return _message(1, key.encode()) + _message(2, feature)


def _message(number: int, content: bytes) -> bytes:
    return _number(number << 3 | 2) + _number(len(content)) + content


def _number(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
