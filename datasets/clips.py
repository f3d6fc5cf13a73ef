"""Clips as a source of episodes: one JSON of annotations and one mp4 per camera for each.

    FOLDER/annotation/**/<name>.json   numbers and texts; `videos` [{video_path}, ...] or video_path
    FOLDER/videos/**                   the mp4 files, whose paths are relative to FOLDER

So Ctrl-World keeps DROID (droid.py) and IRASim Language-Table (language_table.py). What the keys
mean is said by a `DatasetSpec`: a camera's key is its place in `videos`, a number's key is a key of
the JSON. Its rows are handed to `convert` as they are, at whatever rate they were taken; the number
of steps is that of the frames, one text each. An episode without a text has an empty instruction.
"""

import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8

from selfflow.datasets.describe import needs_spec
from selfflow.datasets.droid import DROID_CLIPS
from selfflow.datasets.episodes import DatasetSpec, Metadata, Signals, check_camera
from selfflow.datasets.language_table import LANGUAGE_TABLE_CLIPS
from selfflow.datasets.spec import UserError
from selfflow.datasets.video_file import open_video

log = logging.getLogger(__name__)

KEPT = 256  # annotations held in memory, some 100 KB each


class ClipFolder:
    """Annotated clips as an EpisodeSource.

    `spec` None is DROID's or Language-Table's, by what the first annotation holds. Raises UserError
    naming file and key; with `skip_corrupt` a clip that cannot be read is left out and counted.
    """

    def __init__(
        self, path: str | Path, spec: DatasetSpec | None = None, skip_corrupt: bool = False
    ) -> None:
        self.path = Path(path)
        self.name = self.path.resolve().name
        files = annotations(self.path)
        if not files:
            raise UserError(f"{path}: no annotation/**/*.json")
        self._spec = default_spec(_read(files[0]), self.path) if spec is None else spec
        self.embodiment = self._spec.embodiment
        self.cameras = tuple(self._spec.cameras)
        self.skipped = 0
        self._first = next(iter(self._spec.cameras.values()))
        self._episodes: list[tuple[Path, int]] = []  # annotation, T
        self._silent, measures = 0, {}
        for file in files:
            self._list(file, skip_corrupt, measures)
        if not self._episodes:
            raise UserError(f"{path}: no clip ({self.skipped} skipped)")
        self.measures = tuple(measures)
        if self._silent:
            log.warning("%s: %d of %d clips have no text", self.name, self._silent, len(self))

    def __len__(self) -> int:
        return len(self._episodes)

    def length(self, i: int) -> int:
        """Number of frames of clip i."""
        return self._episodes[i][1]

    def frames(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Frames of clip i at these steps; the video is decoded from the key frame before the first
        to the last of them."""
        key = self._spec.cameras[check_camera(camera, self.cameras, self.name)]
        video = self._video(self._episodes[i][0], key)
        fps = header(video)[1]
        return open_video(video).at([step / fps for step in steps], tolerance=0.4 / fps)

    def signals(self, i: int) -> Signals:
        """Clip i in the project's convention."""
        file, length = self._episodes[i]
        values = _read(file)
        numbers = {k: self._numbers(file, k, width) for k, width in self._spec.numbers.items()}
        return self._spec.convert(numbers, [self._text(values)] * length)

    def measured(self, i: int, key: str) -> np.ndarray | None:
        """Any numbers of the annotation that come once a frame."""
        file, length = self._episodes[i]
        values: Any = _read(file).get(key)
        rows = np.asarray(values if _is_numbers(values) else [], np.float64)
        return rows if len(rows) == length else None

    def metadata(self, i: int) -> Metadata:
        """Number, success where it is said, rate of the video, file."""
        file = self._episodes[i][0]
        values = _read(file)
        found: Metadata = {"file": str(file.relative_to(self.path))}
        if str(values.get("episode_id", "")).isdigit():
            found["episode"] = int(values["episode_id"])
        if "success" in values:
            found["success"] = bool(values["success"])
        return found | {"fps": header(self._video(file, self._first))[1]}

    def _list(self, file: Path, skip_corrupt: bool, measures: dict[str, None]) -> None:
        """Takes note of a clip, and of the keys it has numbers under, one row a frame."""
        try:
            values = _read(file)
            length = values.get("video_length")
            if not isinstance(length, int):
                length = header(self._video(file, self._first))[0]
            self._episodes.append((file, length))
            self._silent += not self._text(values)
            rows = (k for k, v in values.items() if _is_numbers(v) and len(v) == length)
            measures.update(dict.fromkeys(rows))
        except UserError as e:
            if not skip_corrupt:
                raise
            self.skipped += 1
            log.warning("left out: %s", e)

    def _video(self, file: Path, key: str) -> Path:
        values = _read(file)
        videos = values.get("videos") or [values]
        if int(key) >= len(videos) or "video_path" not in videos[int(key)]:
            raise UserError(f"{file}: no video number {key}; it has {len(videos)}")
        return self.path / videos[int(key)]["video_path"]

    def _numbers(self, file: Path, key: str, width: int) -> np.ndarray:
        values = _read(file)
        if not _is_numbers(values.get(key)):
            raise UserError(f"{file}: no numbers under {key}; it has {', '.join(sorted(values))}")
        rows = np.asarray(values[key], np.float64).reshape(len(values[key]), -1)
        if width and rows.shape[1] != width:
            raise UserError(f"{file}: {key} has {rows.shape[1]} values a row, expected {width}")
        return rows

    def _text(self, values: dict[str, Any]) -> str:
        if self._spec.instruction is None:
            return self._spec.text
        found = values.get(self._spec.instruction, "")
        return str(found[0] if isinstance(found, list) and found else found or "")


def recognised(path: Path) -> bool:
    """Whether this is a folder of annotated clips."""
    return (path / "videos").is_dir() and bool(annotations(path))


def annotations(path: Path) -> list[Path]:
    """The JSON files of a folder of clips, sorted."""
    return sorted(path.glob("annotation/**/*.json"))


def default_spec(values: dict[str, Any], folder: Path) -> DatasetSpec:
    """What is known of a clip by its keys. Raises UserError where they say nothing."""
    for spec in (DROID_CLIPS, LANGUAGE_TABLE_CLIPS):
        if all(_is_numbers(values.get(key)) for key in spec.numbers):
            return spec
    found = {k: _kind(v) for k, v in values.items()}
    raise needs_spec(folder, "folder of clips", found)


@lru_cache(KEPT)
def header(path: Path) -> tuple[int, float]:
    """Number of frames of an mp4, and frames a second, as it says. Raises UserError."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames, fps = stream.frames, stream.average_rate
    except (FFmpegError, IndexError) as e:
        raise UserError(f"{path}: not a video that can be decoded ({e})") from e
    if not frames or not fps:
        raise UserError(f"{path}: a video that does not say its length and rate")
    return frames, float(fps)


def _read(file: Path) -> dict[str, Any]:
    """The annotation in a file. Raises UserError."""
    try:
        return _parsed(file, file.stat().st_mtime_ns)
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: not an annotation that can be read ({e})") from e


@lru_cache(KEPT)
def _parsed(file: Path, changed: int) -> dict[str, Any]:
    values = json.loads(file.read_text())
    if not isinstance(values, dict):
        raise ValueError("a JSON object was expected")
    return values


def _is_numbers(values: Any) -> bool:
    """Whether it is a list of numbers, or of rows of numbers."""
    first = values
    while isinstance(first, list) and first:
        first = first[0]
    number = isinstance(first, int | float) and not isinstance(first, bool)
    return isinstance(values, list) and number


def _kind(values: Any) -> str:
    if _is_numbers(values):
        return f"numbers {np.shape(values)}"
    return f"{len(values)} entries" if isinstance(values, list) else type(values).__name__
