"""TFRecord files and tf.train.Example without TensorFlow.

A file is a row of records: length (uint64), crc of length, data, crc of data, all little-endian. An
Example is the protobuf message map<string, bytes_list | float_list | int64_list>; only the fields
asked for are decoded. Reading maps the file into memory and touches what is read.
"""

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from selfflow.datasets.blob import mapped
from selfflow.datasets.spec import UserError

Feature = list[memoryview] | np.ndarray  # a bytes list, or float32 / int64 values
HEADER, FOOTER = 12, 4  # bytes around the data of a record


class CorruptRecord(UserError):
    """A file that is truncated or damaged; the message names the file and the record."""


def scan(data: memoryview, check_crc: bool = False) -> tuple[list[tuple[int, int]], dict[int, str]]:
    """(start, end) of the data of every record of a file, and what is wrong, by record number.

    The length of every record is checked by its checksum, the data with `check_crc` only (0.1 ms a
    MB). Behind a damaged length or a cut nothing can be found: that problem is the last record's.
    """
    ranges: list[tuple[int, int]] = []
    problems: dict[int, str] = {}
    at = 0
    while at < len(data):
        try:
            start, end = _framed(data, at)
        except ValueError as e:
            problems[len(ranges)] = str(e)
            break
        at = end + FOOTER
        if check_crc and masked_crc32c(data[start:end]) != _little(data[end:at]):
            problems[len(ranges)] = "its checksum does not match"
        ranges.append((start, end))
    return ranges, problems


def _framed(data: memoryview, at: int) -> tuple[int, int]:
    """(start, end) of the data of the record that begins at `at`."""
    header = data[at : at + HEADER]
    if len(header) < HEADER:
        raise ValueError("the file ends within its header")
    if masked_crc32c(header[:8]) != _little(header[8:]):
        raise ValueError("the checksum of its length does not match")
    end = at + HEADER + _little(header[:8])
    if end + FOOTER > len(data):
        raise ValueError("the file ends within its data")
    return at + HEADER, end


def read_records(path: Path) -> list[memoryview]:
    """Data of every record of a file, mapped, checksums checked. Raises CorruptRecord."""
    data = mapped(path)
    ranges, problems = scan(data, check_crc=True)
    for number, reason in problems.items():
        raise CorruptRecord(f"{path}: record {number}: {reason}")
    return [data[start:end] for start, end in ranges]


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
    crc = google_crc32c.value(bytes(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _little(data: memoryview) -> int:
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
