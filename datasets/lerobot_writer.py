"""Any source of episodes as a LeRobotDataset v3.0, which LeRobot trains on and lerobot.py reads.

    observation.state              x, y, z, qw, qx, qy, qz, gripper_open
    action                         dx, dy, dz, rx, ry, rz, gripper_open: spec.py's, base frame
    valid.state, valid.action      false where that row is not known and holds zeros
    terminate                      at this step the task is done
    observation.images.CAMERA      mp4, many episodes a file

The instruction of every step is its task. meta/selfflow.json, which LeRobot does not look at, says
robot and cameras, so that reading it again needs no spec. What a source measures beside
(`Measures`) is not written.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from selfflow.datasets.episodes import EpisodeSource, Signals
from selfflow.datasets.lerobot import ACTION, ACTION_VALID, STATE, STATE_VALID, TERMINATE
from selfflow.datasets.lerobot_meta import FIXED, INFO, NOTED, OURS, need_pyarrow
from selfflow.datasets.lerobot_stats import Pixels, statistics, table_statistics
from selfflow.datasets.lerobot_video import CHUNK, CODECS, VIDEO_MB, VideoFiles
from selfflow.datasets.spec import ACTION_NAMES, UserError

DATA_MB = 100  # at which the next file begins
FLUSH = 100  # episodes whose row is held in memory
STATE_NAMES = ("x", "y", "z", "qw", "qx", "qy", "qz", "gripper_open")
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
BLOCK = 32  # frames held at once


def write_lerobot(
    source: EpisodeSource,
    folder: str | Path,
    codec: str = "h264",
    crf: int | None = None,
    cameras: Sequence[str] | None = None,
    episodes: Iterable[int] | None = None,
) -> None:
    """Writes these episodes and cameras of a source (all, if None) into a new folder.

    `codec` is h264 or av1, `crf` its quality (less is better; 23 and 30 by default). The folder
    appears when it is whole; whatever stops the writing, nothing of it stays. Raises UserError if
    the folder exists, or what the source holds cannot be written.
    """
    folder = Path(folder)
    keys = {name: f"observation.images.{name}" for name in cameras or source.cameras}
    if codec not in CODECS:
        raise UserError(f"codec={codec}: choose one of {', '.join(CODECS)}")
    if folder.exists():
        raise UserError(f"{folder}: exists; give a new folder, or delete it")
    with _partial(folder) as partial:
        writer = _Writer(source, partial, keys, codec, crf)
        try:
            chosen = list(range(len(source)) if episodes is None else episodes)
            console = Console(stderr=True)
            hidden = not console.is_terminal
            for i in track(chosen, "writing", console=console, transient=True, disable=hidden):
                writer.add(i)
        finally:
            writer.close()
        writer.finish()


@dataclass
class _Writer:
    source: EpisodeSource
    folder: Path
    keys: dict[str, str]  # camera -> feature
    codec: str
    crf: int | None
    rows: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    count: int = 0  # episodes written

    def __post_init__(self) -> None:
        rate = Fraction(self.source.embodiment.control_hz).limit_denominator(1001)
        self.fps = rate.numerator / rate.denominator
        self.data = _DataFiles(self.folder)
        self.episodes = _EpisodeFile(self.folder / EPISODES)
        self.videos = {
            key: VideoFiles(self.folder, VIDEO_PATH, key, rate, self.codec, self.crf)
            for key in self.keys.values()
        }
        self.pixels = {key: Pixels() for key in self.videos}

    def add(self, i: int) -> None:
        """Appends episode i of the source."""
        signals, steps = self.source.signals(i), self.source.length(i)
        number = self.count
        columns = _columns(signals, steps, self.fps)
        for text in signals.instruction:
            self.tasks.setdefault(text, len(self.tasks))
        columns["task_index"] = np.array([self.tasks[text] for text in signals.instruction])
        columns["episode_index"] = np.full(steps, number)
        columns["index"] = self.rows + np.arange(steps)
        chunk, file = self.data.append(columns)
        row = {
            "episode_index": number,
            "tasks": list(dict.fromkeys(signals.instruction)),
            "length": steps,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": self.rows,
            "dataset_to_index": self.rows + steps,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
            NOTED: json.dumps(self.source.metadata(i)),
        }
        noted = {key: statistics(values) for key, values in columns.items()}
        for camera, key in self.keys.items():
            row |= self._film(i, steps, camera, key, noted)
        row |= {f"stats/{k}/{name}": v for k, s in noted.items() for name, v in s.items()}
        self.episodes.append(row)
        self.rows, self.count = self.rows + steps, number + 1

    def _film(
        self, i: int, steps: int, camera: str, key: str, noted: dict[str, dict]
    ) -> dict[str, Any]:
        """Encodes the episode's frames of a camera. Returns where they are."""
        seen, videos = Pixels(), self.videos[key]
        start = videos.begin()
        sampled = set(np.linspace(0, steps - 1, min(steps, 16)).astype(int).tolist())
        for first in range(0, steps, BLOCK):
            block = range(first, min(first + BLOCK, steps))
            for step, frame in zip(block, self.source.frames(i, block, camera), strict=True):
                videos.add(frame)
                if step in sampled:
                    seen.add(frame)
        noted[key] = seen.statistics()
        self.pixels[key].merge(seen)
        place = videos.end()
        names = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        values = (*place, start / self.fps, (start + steps) / self.fps)
        return {f"videos/{key}/{name}": v for name, v in zip(names, values, strict=True)}

    def close(self) -> None:
        """Ends all files."""
        for files in (self.data, self.episodes, *self.videos.values()):
            files.close()

    def finish(self) -> None:
        """Writes what is known only when all files are ended."""
        if not self.count:
            raise UserError(f"{self.source.name}: no episode to write")
        tasks = self.folder / "meta/tasks.parquet"
        need_pyarrow().parquet.write_table(_task_table(list(self.tasks)), tasks)
        stats = table_statistics(sorted(self.folder.glob("data/*/*.parquet")))
        stats |= {key: pixels.statistics() for key, pixels in self.pixels.items()}
        ours = {"embodiment": asdict(self.source.embodiment), "cameras": self.keys}
        for name, values in (
            (INFO, self._info()),
            ("meta/stats.json", stats),
            (OURS, ours | {"source": self.source.name}),
        ):
            (self.folder / name).write_text(json.dumps(values, indent=4) + "\n")

    def _info(self) -> dict[str, Any]:
        features: dict[str, Any] = {
            STATE: {"dtype": "float32", "shape": [8], "names": list(STATE_NAMES)},
            ACTION: {"dtype": "float32", "shape": [7], "names": list(ACTION_NAMES)},
        }
        for key in (STATE_VALID, ACTION_VALID, TERMINATE):
            features[key] = {"dtype": "bool", "shape": [1], "names": None}
        for key, videos in self.videos.items():
            features[key] = videos.feature()
        for key in FIXED:
            kind = "float32" if key == "timestamp" else "int64"
            features[key] = {"dtype": kind, "shape": [1], "names": None}
        return {
            "codebase_version": "v3.0",
            "robot_type": self.source.embodiment.name,
            "total_episodes": self.count,
            "total_frames": self.rows,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": int(self.fps) if self.fps == int(self.fps) else self.fps,
            "splits": {"train": f"0:{self.count}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": features,
        }


class _DataFiles:
    """Parquet files, one row group an episode."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, -1
        self._writer: Any = None
        self._path = folder

    def append(self, columns: dict[str, np.ndarray]) -> tuple[int, int]:
        """Writes an episode. Returns chunk and number of its file."""
        pyarrow = need_pyarrow()
        table = pyarrow.table({key: _arrow(values) for key, values in columns.items()})
        if self._writer is None or self._path.stat().st_size > DATA_MB << 20:
            self.close()
            self.number += 1
            chunk, file = divmod(self.number, CHUNK)
            self._path = self.folder / DATA_PATH.format(chunk_index=chunk, file_index=file)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pyarrow.parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)
        return divmod(self.number, CHUNK)

    def close(self) -> None:
        """Ends the file: without its footer it could not be read."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class _EpisodeFile:
    """The table of episodes, written as it grows."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True)
        self.path = path
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None

    def append(self, row: dict[str, Any]) -> None:
        """Adds an episode's row; all have the same keys."""
        self._rows.append(row)
        if len(self._rows) >= FLUSH:
            self._flush()

    def close(self) -> None:
        """Writes what is left, and the footer."""
        if self._rows:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        pyarrow = need_pyarrow()
        schema = None if self._writer is None else self._writer.schema
        table = pyarrow.Table.from_pylist(self._rows, schema=schema)
        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(self.path, table.schema)
        self._writer.write_table(table)
        self._rows.clear()


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one, which takes its name in the end, or is deleted.

    One that a killed process left behind is written anew. Raises UserError if another writes it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is writing it") from None
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "meta").mkdir(parents=True)
        try:
            yield partial
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(FileNotFoundError):
                os.unlink(lock.name)


def _columns(signals: Signals, steps: int, fps: float) -> dict[str, np.ndarray]:
    frame = np.arange(steps)
    return {
        STATE: signals.proprio,
        ACTION: signals.actions,
        STATE_VALID: signals.proprio_valid,
        ACTION_VALID: signals.action_valid,
        TERMINATE: signals.terminate,
        "timestamp": (frame / fps).astype(np.float32),
        "frame_index": frame,
    }


def _arrow(values: np.ndarray) -> Any:
    pyarrow = need_pyarrow()
    flat = pyarrow.array(np.ascontiguousarray(values).ravel())
    if values.ndim == 1:
        return flat
    return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _task_table(tasks: list[str]) -> Any:
    """Column task_index by text, which pandas reads as the index."""
    column = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    number = {"pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    about = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": "task_index", "field_name": "task_index"} | number,
            {"name": "task", "field_name": "task"} | column,
        ],
        "pandas_version": "2.0.0",
    }
    table = need_pyarrow().table({"task_index": np.arange(len(tasks)), "task": tasks})
    return table.replace_schema_metadata({"pandas": json.dumps(about)})
