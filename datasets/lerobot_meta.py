"""What the meta folder of a LeRobotDataset says, v3.0 and v2.x alike: where its episodes are.

    meta/info.json                       version, rate, features, templates of the file names
    v3.0  meta/tasks.parquet, meta/episodes/*/*.parquet; files hold many episodes
    v2.x  meta/tasks.jsonl, meta/episodes.jsonl; a parquet file and mp4 files an episode

Downloads that are not complete are read as far as they go: `present` says which files are there.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from selfflow.datasets.episodes import Metadata
from selfflow.datasets.spec import UserError

INFO, OURS = "meta/info.json", "meta/selfflow.json"  # ours: what lerobot_writer.py notes
NOTED = "selfflow_metadata"  # column of episodes: a JSON object
POINTER = b"version https://git-lfs"  # what stands for a file that git did not fetch
FIXED = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def need_pyarrow() -> Any:
    """The package pyarrow, with pyarrow.parquet. Raises UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise UserError("LeRobot datasets need pyarrow: pip install 'selfflow[lerobot]'") from e
    return pyarrow


@dataclass(frozen=True)
class LeRobotMeta:
    """Of one dataset. Rows of `table` are its episodes, in order."""

    folder: Path
    info: dict[str, Any]
    tasks: dict[int, str]
    table: Any  # pyarrow.Table
    _columns: dict[str, np.ndarray] = field(default_factory=dict)  # of it, those used

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """What every step holds: {key: {dtype, shape, names}}."""
        return self.info["features"]

    @property
    def fps(self) -> float:
        """Steps a second."""
        return float(self.info["fps"])

    @property
    def cameras(self) -> list[str]:
        """Keys of colour pictures."""
        return [k for k, f in self.features.items() if _is_picture(f) and not _is_depth(f)]

    @property
    def numbers(self) -> list[str]:
        """Keys of numbers, without those that every dataset has."""
        kinds = ("float", "int", "uint", "bool")
        return [
            k
            for k, f in self.features.items()
            if k not in FIXED and str(f.get("dtype")).startswith(kinds)
        ]

    def described(self) -> dict[str, str]:
        """Every key with what it is, for a message."""
        shown = {"task": "text"}
        for key in (*self.cameras, *self.numbers):
            shape = "×".join(map(str, self.features[key].get("shape") or ()))
            shown[key] = (
                f"{'camera' if key in self.cameras else self.features[key]['dtype']} {shape}"
            )
        return shown

    @cached_property
    def lengths(self) -> np.ndarray:
        """Steps of each episode."""
        return self._column("length")

    @cached_property
    def numbers_in_data(self) -> np.ndarray:
        """Each episode's own number, which its rows and file names bear."""
        return self._column("episode_index")

    @cached_property
    def first_rows(self) -> np.ndarray:
        """The row of its parquet file where each episode begins."""
        if self.info["codebase_version"].startswith("v2"):
            return np.zeros(len(self.table), np.int64)
        start = self._column("dataset_from_index")
        _, inverse = np.unique(self._file_numbers("data"), return_inverse=True)
        first = np.full(inverse.max(initial=-1) + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, inverse, start)
        return start - first[inverse]

    def data_file(self, row: int) -> Path:
        """The parquet file of an episode."""
        return self.folder / self._path("data_path", "data", row)

    def video_file(self, row: int, key: str) -> Path:
        """The mp4 file of an episode and camera."""
        return self.folder / self._path("video_path", f"videos/{key}", row, key)

    def here(self, key: str | None = None) -> np.ndarray:
        """Which episodes have their parquet file, or their mp4 file of a camera, (E,) bool."""
        place = self.data_file if key is None else lambda row: self.video_file(row, key)
        columns = "data" if key is None else f"videos/{key}"
        if f"{columns}/chunk_index" not in self._names:
            return np.array([present(place(row)) for row in range(len(self.table))], bool)
        file = self._file_numbers(columns)
        _, rows, inverse = np.unique(file, return_index=True, return_inverse=True)
        return np.array([present(place(int(row))) for row in rows], bool)[inverse]

    def video_start(self, row: int, key: str) -> float:
        """Seconds from the start of that file to the episode's first frame."""
        column = f"videos/{key}/from_timestamp"
        return float(self._column(column)[row]) if column in self._names else 0.0

    def episode(self, row: int) -> Metadata:
        """What is noted of an episode in single values, under our names where there is one."""
        values = self.table.slice(row, 1).to_pylist()[0]
        noted = json.loads(values.pop(NOTED, None) or "{}")
        own = {
            k: v
            for k, v in values.items()
            if isinstance(v, str | int | float) and "/" not in k and not k.startswith("dataset_")
        }
        own["episode"] = own.pop("episode_index")
        own.pop("length", None)
        task = next(iter(values.get("tasks") or ()), None)
        return ({} if task is None else {"task": task}) | own | {"fps": self.fps} | noted

    def _file_numbers(self, columns: str) -> np.ndarray:
        """One number for each file that holds episodes, by episode."""
        chunk, file = (self._column(f"{columns}/{n}_index") for n in ("chunk", "file"))
        return chunk * (file.max(initial=0) + 1) + file

    @cached_property
    def _names(self) -> set[str]:
        return set(self.table.column_names)

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            if name not in self.table.column_names:
                raise UserError(f"{self.folder / 'meta'}: episodes without {name}")
            self._columns[name] = self.table.column(name).to_numpy()
        return self._columns[name]

    def _path(self, template: str, columns: str, row: int, key: str = "") -> str:
        number = int(self.numbers_in_data[row])
        place = {"episode_index": number, "video_key": key}
        place["episode_chunk"] = number // int(self.info.get("chunks_size", 1000))
        if f"{columns}/chunk_index" in self._names:
            place |= {
                name: int(self._column(f"{columns}/{name}")[row])
                for name in ("chunk_index", "file_index")
            }
        try:
            return self.info[template].format(**place)
        except (KeyError, AttributeError, ValueError, IndexError) as e:
            raise UserError(f"{self.folder / INFO}: {template} cannot be filled in ({e})") from e


def read_meta(folder: Path) -> LeRobotMeta:
    """Everything below meta/. Raises UserError naming the file that is missing or wrong."""
    try:
        info = json.loads((folder / INFO).read_text())
        version = str(info["codebase_version"])
        float(info["fps"])
        dict(info["features"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder / INFO}: not a LeRobot dataset's ({type(e).__name__} {e})") from e
    if not version.startswith(("v2", "v3")):
        raise UserError(f"{folder}: LeRobot format {version}; v3.0, v2.1 and v2.0 are read")
    read = _read_v2 if version.startswith("v2") else _read_v3
    tasks, table = read(folder)
    return LeRobotMeta(folder, info, tasks, table)


def present(path: Path) -> bool:
    """Whether a file is there with its content, not only a pointer to it."""
    try:
        size = os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return False
    if size > 1024 or not size:
        return size > 0
    with open(path, "rb") as file:
        return file.read(len(POINTER)) != POINTER


def read_parquet(path: Path, **options: Any) -> Any:
    """A table. Raises UserError if the file is not whole: a writer may not have finalised it."""
    pyarrow = need_pyarrow()
    try:
        return pyarrow.parquet.read_table(path, **options)
    except (OSError, pyarrow.ArrowException) as e:
        raise broken(path, e) from e


def broken(path: Path, error: Exception) -> UserError:
    """The error of a parquet file that cannot be read."""
    return UserError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})")


def _read_v3(folder: Path) -> tuple[dict[int, str], Any]:
    pyarrow = need_pyarrow()
    files = [path for path in sorted(folder.glob("meta/episodes/*/*.parquet")) if present(path)]
    if not files:
        raise UserError(f"{folder}: no meta/episodes/*/*.parquet; fetch all of meta/")
    tables = []
    for path in files:
        try:
            names = pyarrow.parquet.read_schema(path).names
        except (OSError, pyarrow.ArrowException) as e:
            raise broken(path, e) from e
        tables.append(read_parquet(path, columns=[n for n in names if not n.startswith("stats/")]))
    table = pyarrow.concat_tables(tables, promote_options="default").sort_by("episode_index")
    tasks = read_parquet(folder / "meta/tasks.parquet").to_pydict()
    numbers = tasks.pop("task_index")
    texts = next((v for v in tasks.values() if v and isinstance(v[0], str)), [])
    return dict(zip(numbers, texts, strict=True)), table


def _read_v2(folder: Path) -> tuple[dict[int, str], Any]:
    episodes, tasks = (_json_lines(folder / "meta" / f"{n}.jsonl") for n in ("episodes", "tasks"))
    table = need_pyarrow().Table.from_pylist(episodes).sort_by("episode_index")
    return {int(line["task_index"]): str(line["task"]) for line in tasks}, table


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from e


def _is_picture(feature: Mapping[str, Any]) -> bool:
    return feature.get("dtype") in ("video", "image")


def _is_depth(feature: Mapping[str, Any]) -> bool:
    notes = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    return bool(notes.get("is_depth_map") or notes.get("video.is_depth_map"))
