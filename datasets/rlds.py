"""RLDS/TFDS datasets on disk, read without TensorFlow.

A dataset is a folder with features.json and NAME-SPLIT.tfrecord-00000-of-00001 files, one
tf.train.Example per episode, whose lists hold all steps. What its keys mean is said by one
`DatasetSpec` per dataset (bridge.py). Only the shards that are there are read, so partial downloads
work.
"""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from jaxtyping import Float32, UInt8
from PIL import Image

from selfflow.datasets.episodes import DatasetSpec, Signals, check_camera
from selfflow.datasets.spec import EMBODIMENTS, Embodiment, UserError
from selfflow.datasets.tfrecord import CorruptRecord, Feature, TFRecordFile

log = logging.getLogger(__name__)

USE_DIM = 512  # values of a Universal Sentence Encoder vector


class RldsSource:
    """One split of an RLDS dataset as an EpisodeSource.

    Raises CorruptRecord, naming file and record, for one that is truncated or does not parse; with
    `skip_corrupt` it is left out and counted instead. `check_crc` checks every record that is read.
    """

    def __init__(
        self,
        folder: Path,
        spec: DatasetSpec,
        split: str = "train",
        check_crc: bool = False,
        skip_corrupt: bool = False,
    ) -> None:
        files = sorted(folder.glob(f"*-{split}.tfrecord*"))
        if not files:
            raise UserError(f"{folder}: no shard of split {split!r}; found {_splits(folder)}")
        self.name = f"{dataset_name(folder)}/{split}"
        self.embodiment: Embodiment = EMBODIMENTS[spec.embodiment]
        self.skipped = 0
        self._spec = spec
        self._episodes: list[tuple[TFRecordFile, int, int]] = []  # file, record, T
        for path in files:
            self._open_shard(TFRecordFile(path, check_crc, skip_corrupt), skip_corrupt)

    def __len__(self) -> int:
        return len(self._episodes)

    def length(self, i: int) -> int:
        """Number of steps of episode i."""
        return self._episodes[i][2]

    def frames(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Frames of episode i at these steps; only they are decoded."""
        file, record, length = self._episodes[i]
        key = self._spec.cameras[check_camera(camera, list(self._spec.cameras), self.name)]
        images = _feature(file, record, key, length)
        try:
            return [decode_image(images[step]) for step in steps]
        except OSError as e:
            raise file.corrupt(record, f"a frame of {key}: {e}") from e

    def signals(self, i: int) -> Signals:
        """Episode i in the project's convention."""
        file, record, length = self._episodes[i]
        keys = {**self._spec.numbers, self._spec.instruction: 1}
        features = file.example(record, keys)
        numbers = {
            key: np.asarray(_feature(file, record, key, length * width, features))
            .astype(np.float64)
            .reshape(length, width)
            for key, width in self._spec.numbers.items()
        }
        texts = _feature(file, record, self._spec.instruction, length, features)
        return self._spec.convert(numbers, [str(text, "utf-8", "replace") for text in texts])

    def text_embeddings(self, i: int) -> dict[str, Float32[np.ndarray, "512"]]:
        """The data set's own USE vector of each distinct instruction of episode i, as it is there.

        Its key is that of the text with "embedding" for "instruction", in fractal as in Bridge.
        """
        file, record, length = self._episodes[i]
        texts_key = self._spec.instruction
        key = texts_key.replace("instruction", "embedding")
        features = file.example(record, (texts_key, key))
        vectors = np.asarray(_feature(file, record, key, length * USE_DIM, features), np.float32)
        texts = _feature(file, record, texts_key, length, features)
        rows = zip(texts, vectors.reshape(length, USE_DIM), strict=True)
        return {str(text, "utf-8", "replace"): row for text, row in reversed(list(rows))}

    def _open_shard(self, file: TFRecordFile, skip_corrupt: bool) -> None:
        skipped = file.skipped
        for record in range(len(file)):
            try:
                steps = _feature(file, record, self._spec.instruction)
            except CorruptRecord:
                if not skip_corrupt:
                    raise
                skipped += 1
                continue
            self._episodes.append((file, record, len(steps)))
        if skipped:
            log.warning("%s: left out %d corrupt record(s)", file.path, skipped)
        self.skipped += skipped


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


def _feature(
    file: TFRecordFile,
    record: int,
    key: str,
    count: int | None = None,
    features: Mapping[str, Feature] | None = None,
) -> Feature:
    """One feature of a record. Raises CorruptRecord unless it is there, with `count` values."""
    found = (file.example(record, (key,)) if features is None else features).get(key)
    if found is None or len(found) == 0:
        have = ", ".join(sorted(file.example(record)))
        raise file.corrupt(record, f"no feature {key}; it has {have}")
    if count is not None and len(found) != count:
        raise file.corrupt(record, f"{key} has {len(found)} values, expected {count}")
    return found


def _splits(folder: Path) -> str:
    names = {p.name.split(".tfrecord")[0].rpartition("-")[2] for p in folder.glob("*.tfrecord*")}
    return ", ".join(sorted(names)) or "none"
