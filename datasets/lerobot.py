"""LeRobotDataset v3.0 and v2.x as a source of episodes, read without the lerobot package.

What its features mean is said by a `DatasetSpec` (describe.py: one's own YAML); what
lerobot_writer.py wrote says it itself. Frames are decoded from the mp4 files when they are asked
for, or from the pictures in the parquet files. Episodes whose files are not there are left out and
counted. The instruction's key `task` is the text that task_index names.
"""

import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from selfflow.datasets.describe import needs_spec
from selfflow.datasets.episodes import DatasetSpec, Metadata, Signals, check_camera
from selfflow.datasets.lerobot_meta import (
    FIXED,
    INFO,
    OURS,
    LeRobotMeta,
    broken,
    need_pyarrow,
    read_meta,
)
from selfflow.datasets.rlds import decode_image
from selfflow.datasets.spec import Embodiment, UserError
from selfflow.datasets.video_file import open_video

log = logging.getLogger(__name__)

STATE, ACTION = "observation.state", "action"
STATE_VALID, ACTION_VALID, TERMINATE = "valid.state", "valid.action", "terminate"
NUMBERS = {STATE: 8, ACTION: 7, STATE_VALID: 1, ACTION_VALID: 1, TERMINATE: 1}


class LeRobotSource:
    """A dataset's folder as an EpisodeSource. Raises UserError, with the features, if `spec` is
    None and the data are not ours, or if it names what is not there."""

    def __init__(self, folder: str | Path, spec: DatasetSpec | None = None) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self.meta = read_meta(self.folder)
        found = spec or own_spec(self.folder)
        if found is None:
            raise needs_spec(folder, "LeRobot dataset", self.meta.described())
        _check(found, self.meta)
        self._spec: DatasetSpec = found
        self.embodiment: Embodiment = found.embodiment
        self.cameras = tuple(self._spec.cameras)
        self.measures = tuple(self.meta.numbers)
        here = self.meta.here()
        for key in found.cameras.values():
            if self.meta.features[key]["dtype"] == "video":
                here &= self.meta.here(key)
        self._rows = np.flatnonzero(here).tolist()  # of the table of episodes
        self.skipped = len(here) - len(self._rows)
        if self.skipped:
            log.warning("%s: left out %d episode(s) without their files", folder, self.skipped)

    def __len__(self) -> int:
        return len(self._rows)

    def length(self, i: int) -> int:
        """Number of steps of episode i."""
        return int(self.meta.lengths[self._rows[i]])

    def frames(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Frames of episode i at these steps; only they, and what they depend on, are decoded."""
        key = self._spec.cameras[check_camera(camera, self.cameras, self.name)]
        if self.meta.features[key]["dtype"] == "image":
            return [self._picture(i, step, key) for step in steps]
        row, fps = self._rows[i], self.meta.fps
        start = self.meta.video_start(row, key)
        video = open_video(self.meta.video_file(row, key))
        return video.at([start + step / fps for step in steps], 0.45 / fps)

    def signals(self, i: int) -> Signals:
        """Episode i in the project's convention."""
        spec = self._spec
        key = "task_index" if spec.instruction == "task" else spec.instruction
        table = self._table(i, [*spec.numbers, *([key] if key else [])])
        if key is None:
            texts = [spec.text] * self.length(i)
        elif key == "task_index":
            texts = [self.meta.tasks[n] for n in table.column(key).to_pylist()]
        else:
            texts = [str(text) for text in table.column(key).to_pylist()]
        numbers = {k: _numbers(table.column(k)) for k in spec.numbers}
        return spec.convert(numbers, texts)

    def metadata(self, i: int) -> Metadata:
        """Number, task, rate, and what else the table of episodes holds in single values."""
        return self.meta.episode(self._rows[i])

    def measured(self, i: int, key: str) -> np.ndarray | None:
        """The feature `key` of episode i as it is there, (T, values); None where there is none."""
        return _numbers(self._table(i, [key]).column(key)) if key in self.measures else None

    def _table(self, i: int, columns: list[str]) -> Any:
        """These columns of episode i's rows."""
        row = self._rows[i]
        path, first, count = self.meta.data_file(row), self.meta.first_rows[row], self.length(i)
        number = self.meta.numbers_in_data[row]
        groups, offset = _covering(path, int(first), int(first) + count)
        table = _read(path, groups, tuple(dict.fromkeys([*columns, "episode_index"])))
        table = table.slice(int(first) - offset, count)
        if len(table) != count or set(table.column("episode_index").to_pylist()) != {number}:
            raise UserError(f"{path}: rows {first}..{first + count - 1} are not episode {number}")
        return table

    def _picture(self, i: int, step: int, key: str) -> UInt8[np.ndarray, "_ _ 3"]:
        row = self._rows[i]
        path, at = self.meta.data_file(row), int(self.meta.first_rows[row]) + step
        groups, offset = _covering(path, at, at + 1)
        value = _read_kept(path, groups, (key,)).column(key)[at - offset].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        try:
            return decode_image(
                (self.folder / value["path"]).read_bytes() if data is None else data
            )
        except OSError as e:
            raise UserError(f"{path}: picture of {key} at row {at} ({e})") from e


def recognised(path: Path) -> bool:
    """Whether this is a LeRobot dataset."""
    return (path / INFO).is_file()


def own_spec(folder: Path) -> DatasetSpec | None:
    """The spec of what lerobot_writer.py wrote; None for other datasets."""
    if not (folder / OURS).is_file():
        return None
    try:
        noted = json.loads((folder / OURS).read_text())
        robot = noted["embodiment"]
        tuples = {"cameras": tuple(robot["cameras"]), "limits": tuple(robot["limits"])}
        cameras, embodiment = dict(noted["cameras"]), Embodiment(**robot | tuples)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{folder / OURS}: cannot be read ({e})") from e
    return DatasetSpec(embodiment, cameras, "task", NUMBERS, _own_signals)


def _own_signals(numbers: dict[str, np.ndarray], texts: list[str]) -> Signals:
    state_valid, action_valid, terminate = (
        numbers[key][:, 0] > 0 for key in (STATE_VALID, ACTION_VALID, TERMINATE)
    )
    state, action = (numbers[key].astype(np.float32) for key in (STATE, ACTION))
    return Signals(state, state_valid, action, action_valid, terminate, texts)


def _check(spec: DatasetSpec, meta: LeRobotMeta) -> None:
    texts = [] if spec.instruction in (None, "task") else [spec.instruction]
    wrong = [key for key in spec.cameras.values() if key not in meta.cameras]
    wrong += [key for key in spec.numbers if key not in (*meta.numbers, *FIXED)]
    wrong += [key for key in texts if key not in meta.features]
    if wrong:
        have = ", ".join(f"{key} ({what})" for key, what in meta.described().items())
        raise UserError(f"{meta.folder}: the spec's {', '.join(wrong)} is not there; it has {have}")


def _numbers(column: Any) -> np.ndarray:
    """(T, values) float64 of a column of numbers or of lists of them."""
    array = column.combine_chunks()
    count = len(array)
    while (storage := hasattr(array, "storage")) or hasattr(array, "flatten"):
        array = array.storage if storage else array.flatten()  # 2-D ones are extension arrays
    return array.to_numpy(zero_copy_only=False).astype(np.float64).reshape(count, -1)


@lru_cache(64)
def _footer(path: Path) -> tuple[Any, np.ndarray]:
    """A parquet file's metadata, and the row at which each of its groups ends."""
    pyarrow = need_pyarrow()
    try:
        footer = pyarrow.parquet.read_metadata(path)
    except (OSError, pyarrow.ArrowException) as e:
        raise broken(path, e) from e
    rows = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
    return footer, np.cumsum(rows, dtype=np.int64)


def _covering(path: Path, first: int, stop: int) -> tuple[tuple[int, ...], int]:
    """The row groups that hold rows first .. stop - 1, and the row that the first of them begins
    with."""
    ends = _footer(path)[1]
    a, b = np.searchsorted(ends, first, side="right"), np.searchsorted(ends, stop, side="left")
    groups = tuple(range(int(a), min(int(b) + 1, len(ends))))
    return groups, int(ends[a - 1]) if a else 0


def _read(path: Path, groups: tuple[int, ...], columns: tuple[str, ...]) -> Any:
    pyarrow = need_pyarrow()
    try:
        # Opened anew each time: a reader is not for several threads, and the footer is known.
        with pyarrow.parquet.ParquetFile(path, metadata=_footer(path)[0], memory_map=True) as file:
            return file.read_row_groups(list(groups), columns=list(columns), use_threads=False)
    except (OSError, pyarrow.ArrowException) as e:
        raise broken(path, e) from e


_read_kept = lru_cache(4)(_read)  # pictures: the groups that were read last
