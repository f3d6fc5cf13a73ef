"""The project's episode store: what demonstrations and rollouts are recorded into.

    FOLDER/store.json         what the episodes are: StoreHeader and the format's version
    FOLDER/000.blob           frames (JPEG, or pixels) and little-endian arrays, only appended to
    FOLDER/000.index.jsonl    one JSON line per episode or failed attempt, only ever appended to

It is also what other data are converted to for training: convert.py.

A line is written after its bytes in the blob are on the disk, so that whatever kills the writer,
every line that parses and whose bytes exist is a whole episode. A torn line is left out and
counted; the next writer ends it and goes on. Several processes may write at once, each its own
shard.

| kind of line | content |
|---|---|
| episode | range in the blob, crc32, places of arrays and frames; seed, success, draws, meta |
| failure | seed (converted: number) and reason of an attempt (episode) that was not kept |
| cut | the blob was found to be this short; episodes above that need more of it are lost |
"""

import fcntl
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from selfflow.datasets import blob as blobs
from selfflow.datasets.episodes import Metadata, Signals, check_camera
from selfflow.datasets.spec import Embodiment, UserError
from selfflow.datasets.store_header import StoreHeader, agree_on_header, read_header
from selfflow.datasets.store_index import END, LENGTH, read_index, read_line

__all__ = ["EpisodeRecord", "EpisodeStore", "StoreHeader", "StoreWriter", "read_header"]

ARRAYS = ("proprio", "actions", "executed", "terminate")  # of a record, by field name
VALID = ("proprio_valid", "action_valid")  # of converted episodes
VALUES = ("seed", "success", "draws", "meta")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode as recorded: N observations and T actions, N = T or T + 1.

    `actions` are the labels (what the expert meant), `executed` what the robot was told (labels
    plus injected noise). With N = T + 1 the last observation has no action. `terminate[t]`, of
    length T or N: at observation t the subtask that `instruction[t]` names is done (a change of
    instruction says so by itself). `privileged` arrays have N rows. `draws` are all random draws by
    name; `meta` is anything that JSON can hold.
    """

    images: dict[str, list[UInt8[np.ndarray, "_ _ 3"]]]
    proprio: Float32[np.ndarray, "N 8"]
    actions: Float32[np.ndarray, "T 7"]
    executed: Float32[np.ndarray, "_ 7"]
    terminate: Bool[np.ndarray, "_"]
    instruction: list[str]
    seed: int
    success: bool
    privileged: dict[str, np.ndarray] = field(default_factory=dict)
    draws: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def check(self, cameras: tuple[str, ...]) -> None:
        """Raises ValueError if lengths disagree or the cameras are not the store's."""
        n, t = len(self.proprio), len(self.actions)
        lengths = {"instruction": len(self.instruction)}
        lengths |= {f"images[{k}]": len(v) for k, v in self.images.items()}
        lengths |= {f"privileged[{k}]": len(v) for k, v in self.privileged.items()}
        wrong = [f"{name} has {k}" for name, k in lengths.items() if k != n]
        if t == 0 or n not in (t, t + 1):
            wrong.append(f"{t} actions")
        if len(self.executed) != t:
            wrong.append(f"executed has {len(self.executed)} for {t} actions")
        if len(self.terminate) not in (t, n):
            wrong.append(f"terminate has {len(self.terminate)}")
        if set(self.images) != set(cameras):
            wrong.append(f"cameras are {sorted(self.images)}, not {sorted(cameras)}")
        if wrong:
            raise ValueError(f"an episode of {n} observations: {'; '.join(wrong)}")


@dataclass(frozen=True)
class Content:
    """All of an episode but its frames, as a store's line and blob hold it.

    `arrays`: those of a record, by field name, with the N rows and the flags of Signals
    (proprio_valid, action_valid) and without `executed` for what was not recorded but converted.
    `values`: what JSON can hold: seed, success, draws, meta; converted: about, its metadata.
    """

    arrays: Mapping[str, np.ndarray]
    instruction: list[str]
    privileged: Mapping[str, np.ndarray] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


class StoreWriter:
    """Appends episodes to one shard of a store, creating the folder if need be.

    Opening continues a shard that another writer left in whatever state. `header` may be left out
    for an existing store. Raises UserError if the folder holds episodes of another kind or another
    process is writing the shard.
    """

    def __init__(
        self, folder: str | Path, shard: str = "000", header: StoreHeader | None = None
    ) -> None:
        if not re.fullmatch(r"[\w-]+", shard):
            raise ValueError(f"shard={shard!r}: letters, digits, - and _ only")
        self.folder = Path(folder)
        self.header = agree_on_header(self.folder, header)
        blob, index = _shard_files(self.folder, shard)
        mode = os.O_RDWR | os.O_APPEND | os.O_CREAT
        self._index = os.open(index, mode, 0o644)
        try:
            fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._index)
            raise UserError(
                f"{index}: another process is writing this shard; choose another shard name"
            ) from None
        self._blob = os.open(blob, mode, 0o644)
        self.held = self._look_back(index)  # episodes and failures that the shard holds

    def append(self, record: EpisodeRecord) -> None:
        """Writes one episode; it is on the disk when this returns."""
        record.check(self.header.cameras)
        values = {name: getattr(record, name) for name in VALUES}
        arrays = {name: getattr(record, name) for name in ARRAYS}
        content = Content(arrays, record.instruction, record.privileged, values)
        self.write(record.images, content)

    def write(
        self,
        images: Mapping[str, Iterable[Any]],
        content: Content,
        raw: bool = False,
    ) -> None:
        """Writes one episode; `images` gives the frames of every camera, one by one.

        uint8 (H, W, 3) are written as JPEG or, `raw`, as pixels; JPEG data (bytes) is kept as it
        is. Nothing stays if it fails.
        """
        blobs.to_json(content.values)  # raises before anything is written
        with blobs.appending(self._blob) as blob:
            film = blob.raw if raw else blob.jpegs
            line = {
                "kind": "episode",
                **content.values,
                "instruction": blobs.run_lengths(content.instruction),
                "images": {camera: film(frames) for camera, frames in images.items()},
                **{name: blob.array(array) for name, array in content.arrays.items()},
                "privileged": {k: blob.array(v) for k, v in content.privileged.items()},
            }
        place = {"start": blob.start, "end": blob.end, "crc32": blob.crc32}
        self._append_line(blobs.to_json(line | place))

    def note_failure(self, seed: int, reason: str) -> None:
        """Notes an attempt that was not kept, so that a resumed recording does not repeat it."""
        self._append_line(blobs.to_json({"kind": "failure", "seed": int(seed), "reason": reason}))

    def close(self) -> None:
        """Ends writing and frees the shard for another writer."""
        for handle in (self._blob, self._index):
            if handle >= 0:
                os.close(handle)
        self._blob = self._index = -1

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append_line(self, text: str) -> None:
        size = os.fstat(self._index).st_size
        torn = size > 0 and os.pread(self._index, 1, size - 1) != b"\n"
        blobs.write_all(self._index, ("\n" * torn + text + "\n").encode())
        os.fsync(self._index)

    def _look_back(self, path: Path) -> int:
        """How much is there. If the blob lost its end, says so in the index before new bytes take
        that place."""
        size, index = os.fstat(self._blob).st_size, read_index(path)
        if any(row[END] > size for row in index.rows):
            self._append_line(blobs.to_json({"kind": "cut", "blob": size}))
            index.keep_within(size)
        return len(index.rows) + len(index.failures)


class EpisodeStore:
    """Reads a store as an EpisodeSource; episodes in the order of shard names, then of recording.

    It shows what was recorded when it was opened. `skipped` counts records that are torn or whose
    bytes are not all there; `failures` maps the seeds of failed attempts to their reasons.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self.header = read_header(self.folder)
        self.embodiment: Embodiment = self.header.is_of
        self.cameras = self.header.cameras
        self.photographs = self.header.photographs
        self.skipped = 0
        self.failures: dict[int, str] = {}
        self._shards: list[tuple[memoryview, memoryview]] = []  # blob, index
        self._names: list[str] = []
        rows, measures = [], {}
        for index in sorted(self.folder.glob("*.index.jsonl")):
            rows += self._open_shard(index, measures)
        self.measures = tuple(measures)
        self._rows = np.array(rows, np.int64).reshape(-1, 5)  # of store_index.py, and the shard

    def __len__(self) -> int:
        return len(self._rows)

    def length(self, i: int) -> int:
        """Number of observations of episode i."""
        return int(self._rows[i, LENGTH])

    def frames(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Frames of episode i at these steps, as they are stored; raw ones are read-only."""
        blob, line = self._episode(i)
        camera = check_camera(camera, self.cameras, str(self.folder))
        try:
            return blobs.read_frames(blob, line["images"][camera], steps)
        except ValueError as e:
            raise UserError(f"{self.folder}: a frame of episode {i} cannot be decoded ({e})") from e

    def encoded(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[memoryview] | None:
        """The same frames as JPEG data; None where they are raw."""
        blob, line = self._episode(i)
        place = line["images"][check_camera(camera, self.cameras, str(self.folder))]
        return blobs.read_encoded(blob, place, steps) if blobs.are_jpegs(place) else None

    def signals(self, i: int) -> Signals:
        """Label actions, proprioception, flags and instructions of episode i."""
        content = self.content(i)
        arrays = content.arrays
        n, t = len(arrays["proprio"]), len(arrays["actions"])
        last = len(arrays["terminate"]) - 1
        return Signals(
            proprio=arrays["proprio"],
            proprio_valid=arrays.get("proprio_valid", np.ones(n, bool)),
            actions=np.concatenate([arrays["actions"], np.zeros((n - t, 7), np.float32)]),
            action_valid=arrays.get("action_valid", np.arange(n) < t),
            terminate=arrays["terminate"][np.minimum(np.arange(n), last)],
            instruction=content.instruction,
        )

    def metadata(self, i: int) -> Metadata:
        """What the data said that it was converted from; of a recording seed, success, task, rate,
        and what the recorder noted in single values."""
        line = self._episode(i)[1]
        if "about" in line:
            return line["about"]
        noted = {k: v for k, v in line["meta"].items() if isinstance(v, str | int | float)}
        known = {"seed": line["seed"], "success": line["success"], "task": self.header.task}
        return noted | known | {"fps": self.embodiment.control_hz}

    def measured(self, i: int, key: str) -> np.ndarray | None:
        """What was measured as `key` in episode i by step (T, ...), None where nothing was."""
        blob, line = self._episode(i)
        where = line["privileged"].get(key)
        return None if where is None else blobs.read_array(blob, where)

    def content(self, i: int) -> Content:
        """All of episode i but its frames and measurements."""
        blob, line = self._episode(i)
        return Content(
            {k: blobs.read_array(blob, line[k]) for k in (*ARRAYS, *VALID) if k in line},
            blobs.from_run_lengths(line["instruction"]),
            values={k: line[k] for k in (*VALUES, "about") if k in line},
        )

    def record(self, i: int) -> EpisodeRecord:
        """Everything of episode i. Raises UserError if its bytes are not those written, or if it
        was not recorded but converted from other data."""
        blob, line = self._episode(i)
        if not self.intact(i):
            raise UserError(f"{self.folder}: episode {i} (seed {line['seed']}) is damaged on disk")
        if "executed" not in line:
            raise UserError(f"{self.folder}: episode {i} was not recorded here, but converted")
        content, steps = self.content(i), range(self.length(i))
        return EpisodeRecord(
            images={c: self.frames(i, steps, c) for c in self.cameras},
            **{name: content.arrays[name] for name in ARRAYS},
            instruction=content.instruction,
            privileged={k: blobs.read_array(blob, v) for k, v in line["privileged"].items()},
            **content.values,
        )

    def intact(self, i: int) -> bool:
        """Whether the bytes of episode i are those that were written."""
        blob, line = self._episode(i)
        return blobs.checksum(blob[line["start"] : line["end"]]) == line["crc32"]

    def shard(self, i: int) -> str:
        """The name of the file that episode i is in."""
        return f"{self._names[self._rows[i, -1]]}.blob"

    def seeds(self) -> set[int]:
        """Seeds already attempted: recorded episodes and noted failures."""
        known = {self._episode(i)[1]["seed"] for i in range(len(self))}
        return (known | set(self.failures)) - {None}

    def _episode(self, i: int) -> tuple[memoryview, dict[str, Any]]:
        """The blob that episode i is in, and its line."""
        blob, text = self._shards[self._rows[i, -1]]
        return blob, read_line(text, self._rows[i])

    def _open_shard(self, index_file: Path, measures: dict[str, None]) -> list[tuple[int, ...]]:
        name = index_file.name.removesuffix(".index.jsonl")
        # The index first: what it lists is then in the blob, even while another process writes.
        index = read_index(index_file)
        blob = blobs.mapped(_shard_files(self.folder, name)[0])
        index.keep_within(len(blob))
        if index.skipped:
            log.warning("%s: left out %d torn or incomplete record(s)", index_file, index.skipped)
        self.skipped += index.skipped
        self.failures |= index.failures
        measures |= index.measures
        self._shards.append((blob, index.text))
        self._names.append(name)
        return [(*row, len(self._shards) - 1) for row in index.rows]


def _shard_files(folder: Path, shard: str) -> tuple[Path, Path]:
    return folder / f"{shard}.blob", folder / f"{shard}.index.jsonl"
