"""RLDS/TFDS datasets on disk, read without TensorFlow.

A dataset is a folder with features.json and NAME-SPLIT.tfrecord-00000-of-00001 files, one
tf.train.Example per episode, whose lists hold all steps. What its keys mean is said by one
`DatasetSpec` per dataset (bridge.py). Only the shards that are there are read, so partial downloads
work; where their episodes lie is found once (rlds_index.py). Files are mapped into memory, at most
MAPPED at a time.
"""

import io
import json
import logging
import time
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import simplejpeg
from jaxtyping import Float32, UInt8
from PIL import Image

from selfflow.datasets.blob import mapped
from selfflow.datasets.episodes import DatasetSpec, Metadata, Signals, check_camera
from selfflow.datasets.rlds_index import missing, read_index, shard_files
from selfflow.datasets.rlds_schema import STEPS, Leaf, read_schema
from selfflow.datasets.spec import Embodiment, UserError
from selfflow.datasets.tfrecord import CorruptRecord, Feature, parse_example

log = logging.getLogger(__name__)

USE_DIM = 512  # values of a Universal Sentence Encoder vector
SHARED = {"episode_metadata/episode_id": "episode", "episode_metadata/success": "success"}
SHOWN = 10  # corrupt records that are named one by one
MAPPED = 64  # files, well below the 1024 that a process may have open
NUMBERS = {"bool", "float16", "float32", "float64"}  # and all integers


class RldsSource:
    """One split of an RLDS dataset as an EpisodeSource.

    Raises CorruptRecord, naming file and record, for one that is truncated or does not parse; with
    `skip_corrupt` it is left out and counted instead. `check_crc` checks all records on opening,
    once as long as the files stay the same. `shards` reads only so many of those that are there.
    """

    def __init__(
        self,
        folder: Path,
        spec: DatasetSpec,
        split: str = "train",
        check_crc: bool = False,
        skip_corrupt: bool = False,
        shards: int | None = None,
    ) -> None:
        self.folder, self.spec = folder, spec
        self.name = f"{dataset_name(folder)}/{split}"
        self._files = shard_files(folder, split)
        self.embodiment: Embodiment = spec.embodiment
        self.cameras = tuple(spec.cameras)
        away = missing(self._files)
        if away and shards is None:
            log.warning("%s: %d shards are here, %d are not", folder, len(self._files), away)
        self._files = self._files[:shards]
        if not spec.cameras:
            raise UserError(
                f"{folder}: its spec names no camera; steps are counted by their frames"
            )
        first = spec.cameras[self.cameras[0]]
        found = read_index(self._files, split, first, check_crc)
        problems = [
            f"{file}: record {record}: {reason}"
            for file, shard in zip(self._files, found, strict=True)
            for record, reason in shard.problems.items()
        ]
        self.skipped = len(problems)
        if problems and not skip_corrupt:
            raise CorruptRecord(problems[0])
        for problem in problems[:SHOWN]:
            log.warning("left out %s", problem)
        if len(problems) > SHOWN:
            log.warning("%s: left out %d records in all", folder, len(problems))
        self._file_of = np.repeat(np.arange(len(found)), [len(shard.rows) for shard in found])
        self._opened = time.monotonic_ns()
        self._table = np.concatenate([shard.rows for shard in found])

    def __len__(self) -> int:
        return len(self._table)

    def length(self, i: int) -> int:
        """Number of steps of episode i."""
        return int(self._table[i, 3])

    def frames(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Frames of episode i at these steps; only they are decoded."""
        try:
            return [decode_image(data) for data in self.encoded(i, steps, camera)]
        except OSError as e:
            key = self.spec.cameras[camera or self.cameras[0]]
            raise self._corrupt(i, f"a frame of {key}: {e}") from e

    def encoded(self, i: int, steps: Sequence[int], camera: str | None = None) -> list[memoryview]:
        """The same frames as they are in the file, JPEG or PNG."""
        key = self.spec.cameras[check_camera(camera, self.cameras, self.name)]
        images = self._feature(i, self._example(i, (key,)), key, self.length(i))
        return [images[step] for step in steps]

    def signals(self, i: int) -> Signals:
        """Episode i in the project's convention."""
        spec = self.spec
        texts = () if spec.instruction is None else (spec.instruction,)
        found = self._example(i, (*spec.numbers, *texts))
        numbers = {
            key: self._rows_of(i, found, key, width).astype(np.float64)
            for key, width in spec.numbers.items()
        }
        return spec.convert(numbers, self._instructions(i, found))

    @cached_property
    def measures(self) -> tuple[str, ...]:
        """Keys of all numbers of a fixed size in the steps, as they are on the wire."""
        return tuple(
            key
            for key, leaf in self.schema.items()
            if key.startswith(STEPS) and _numeric(leaf) and min(leaf.shape, default=0) >= 0
        )

    def measured(self, i: int, key: str) -> np.ndarray | None:
        """(T, ...) of episode i as it is there, before any conversion; None without such a key."""
        if key not in self.measures:
            return None
        leaf, found = self.schema[key], self._example(i, (key,))
        width = int(np.prod(leaf.shape))
        return (
            self._rows_of(i, found, key, width)
            .reshape(self.length(i), *leaf.shape)
            .astype(leaf.dtype)
        )

    def metadata(self, i: int) -> Metadata:
        """Shard, record, rate, and what the record says of the episode in single values, by key."""
        about: Metadata = {
            "file": self._files[self._file_of[i]].name,
            "record": int(self._table[i, 0]),
            "fps": self.embodiment.control_hz,
        }
        keys = [k for k, leaf in self.schema.items() if not k.startswith(STEPS) and _single(leaf)]
        for key, values in self._example(i, keys).items():
            if len(values) == 1:
                about[key] = _plain(values[0], self.schema[key])
        for key, name in SHARED.items():
            if key in about:
                about[name] = about[key]
        if about.get("aspects/has_aspects"):  # RT-1 says by it whether the others mean anything
            about["success"] = about["aspects/success"]
        return about

    def text_embeddings(self, i: int) -> dict[str, Float32[np.ndarray, "512"]]:
        """The data set's own USE vector of each distinct instruction of episode i, as it is there.

        Its key is that of the text with "embedding" for "instruction", in fractal as in Bridge.
        """
        if self.spec.instruction is None:
            raise UserError(f"{self.name}: holds no instructions, so no vectors of them")
        key = self.spec.instruction.replace("instruction", "embedding")
        found = self._example(i, (self.spec.instruction, key))
        vectors = self._rows_of(i, found, key, USE_DIM).astype(np.float32)
        rows = zip(self._instructions(i, found), vectors, strict=True)
        return {text: row for text, row in reversed(list(rows))}

    @cached_property
    def schema(self) -> dict[str, Leaf]:
        """All features of the dataset by key. Raises UserError where features.json is no such."""
        return read_schema(self.folder)

    def _example(self, i: int, keys: Sequence[str] | None) -> dict[str, Feature]:
        _, start, size, _ = self._table[i].tolist()
        file = self._files[self._file_of[i]]
        try:
            return parse_example(_mapped(file, self._opened)[start : start + size], keys)
        except ValueError as e:
            raise self._corrupt(i, str(e)) from e

    def _feature(
        self, i: int, found: Mapping[str, Feature], key: str, count: int | None = None
    ) -> Feature:
        """One feature. Raises CorruptRecord unless it is there, with `count` values."""
        feature = found.get(key)
        if feature is None or len(feature) == 0:
            have = ", ".join(sorted(self._example(i, None)))
            raise self._corrupt(i, f"no feature {key}; it has {have}")
        if count is not None and len(feature) != count:
            raise self._corrupt(i, f"{key} has {len(feature)} values, expected {count}")
        return feature

    def _rows_of(self, i: int, found: Mapping[str, Feature], key: str, width: int) -> np.ndarray:
        """(T, width) values of a feature; width 0 is as many as there are."""
        values, steps = self._feature(i, found, key), self.length(i)
        if isinstance(values, list):
            try:
                values = _unpacked(values, self.schema.get(key, Leaf("other")))
            except (ValueError, zlib.error) as e:
                raise self._corrupt(i, f"{key}: {e}") from e
        expected = steps * width if width else len(values) // steps * steps
        if len(values) != expected:
            raise self._corrupt(i, f"{key} has {len(values)} values, expected {expected}")
        return values.reshape(steps, -1)

    def _instructions(self, i: int, found: Mapping[str, Feature]) -> list[str]:
        """The text of every step: as text, as rows of bytes (Language-Table), or one for all."""
        key, steps = self.spec.instruction, self.length(i)
        if key is None:
            return [self.spec.text] * steps
        values = self._feature(i, found, key)
        if isinstance(values, np.ndarray):
            rows = self._rows_of(i, found, key, 0).astype(np.uint8)
            values = [memoryview(row.tobytes().rstrip(b"\0")) for row in rows]
        if len(values) == 1 and not key.startswith(STEPS):
            values = values * steps
        self._feature(i, {key: values}, key, steps)
        return [str(text, "utf-8", "replace") for text in values]

    def _corrupt(self, i: int, reason: str) -> CorruptRecord:
        """The error that names file and record."""
        file = self._files[self._file_of[i]]
        return CorruptRecord(f"{file}: record {self._table[i, 0]}: {reason}")


def find_dataset(place: Path) -> Path | None:
    """The dataset folder at `place` or up to two levels below (NAME/VERSION), or None.

    Raises UserError if there are several.
    """
    found = [
        path.parent
        for pattern in ("features.json", "*/features.json", "*/*/features.json")
        for path in sorted(place.glob(pattern))
        if any(path.parent.glob("*.tfrecord*"))
    ]
    if len(found) > 1:
        raise UserError(f"{place}: several datasets; give one of {', '.join(map(str, found))}")
    return found[0] if found else None


def dataset_name(folder: Path) -> str:
    """TFDS's name of the dataset: from dataset_info.json, else from the names of the shards."""
    info = folder / "dataset_info.json"
    if info.is_file():
        try:
            return str(json.loads(info.read_text())["name"])
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{info}: says no name of a dataset ({e})") from e
    return next(iter(sorted(folder.glob("*.tfrecord*")))).name.rsplit(".", 1)[0].rsplit("-", 1)[0]


def decode_image(data: bytes | memoryview) -> UInt8[np.ndarray, "_ _ 3"]:
    """RGB of JPEG data by simplejpeg, of anything else by Pillow. Raises OSError if neither can."""
    try:
        return simplejpeg.decode_jpeg(data)
    except ValueError:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@lru_cache(MAPPED)
def _mapped(file: Path, opened: int) -> memoryview:
    """The file's bytes, for the source that was opened then: a later one sees a file's changes."""
    return mapped(file)


def _numeric(leaf: Leaf) -> bool:
    return leaf.dtype in NUMBERS or leaf.dtype.startswith(("int", "uint"))


def _single(leaf: Leaf) -> bool:
    return leaf.shape == () and (leaf.dtype == "text" or _numeric(leaf))


def _plain(value: memoryview | np.generic, leaf: Leaf) -> str | int | float | bool:
    if isinstance(value, memoryview):
        return str(value, "utf-8", "replace")
    return bool(value) if leaf.dtype == "bool" else value.item()


def _unpacked(values: list[memoryview], leaf: Leaf) -> np.ndarray:
    """Numbers of arrays that were written as bytes, one a step. Raises ValueError, zlib.error."""
    if leaf.encoding not in ("bytes", "zlib"):
        raise ValueError(f"bytes where numbers should be ({leaf})")
    packed = [zlib.decompress(v) if leaf.encoding == "zlib" else v for v in values]
    return np.frombuffer(b"".join(packed), leaf.dtype)
