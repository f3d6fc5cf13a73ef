"""The project's episode store: what demonstrations and rollouts are recorded into.

    FOLDER/store.json         what the episodes are: StoreHeader and the format's version
    FOLDER/000.blob           JPEG frames and little-endian arrays, only ever appended to
    FOLDER/000.index.jsonl    one JSON line per episode or failed attempt, only ever appended to

A line is written after its bytes in the blob are on the disk, so that whatever kills the writer,
every line that parses and whose bytes exist is a whole episode. A torn line is left out and
counted; the next writer ends it and goes on. Several processes may write at once, each its own
shard.

| kind of line | content |
|---|---|
| episode | its range in the blob and crc32, the place of each array, seed, success, draws, meta |
| failure | seed and reason of an attempt that was not kept |
| cut | the blob was found to be this short; episodes above that need more of it are lost |
"""

import fcntl
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from selfflow.datasets import blob as blobs
from selfflow.datasets.episodes import Metadata, Signals, check_camera
from selfflow.datasets.spec import EMBODIMENTS, Embodiment, UserError

VERSION = 1
ARRAYS = ("proprio", "actions", "executed", "terminate")  # of a record, by field name
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreHeader:
    """What all episodes of a store have in common."""

    embodiment: str
    task: str
    cameras: tuple[str, ...]  # the first is the one that is read by default
    backend: str
    placement: str = "mild"  # how start states were drawn
    image_size: tuple[int, int] | None = None  # (height, width) of all frames; None: not noted
    photographs: tuple[str, ...] = ()  # seen in the pictures: who is scored on them has seen them


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
        self.header = _agree_on_header(self.folder, header)
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
        self._void_lost_episodes(index)

    def append(self, record: EpisodeRecord) -> None:
        """Writes one episode; it is on the disk when this returns."""
        record.check(self.header.cameras)
        start = os.fstat(self._blob).st_size
        pack = blobs.Packer(start)
        line = {
            "kind": "episode",
            "seed": int(record.seed),
            "success": bool(record.success),
            "instruction": blobs.run_lengths(record.instruction),
            "images": {k: pack.jpegs(v) for k, v in record.images.items()},
            **{name: pack.array(getattr(record, name)) for name in ARRAYS},
            "privileged": {k: pack.array(v) for k, v in record.privileged.items()},
            "draws": record.draws,
            "meta": record.meta,
        }
        data = pack.data()
        text = blobs.to_json(
            line | {"start": start, "end": start + len(data), "crc32": blobs.checksum(data)}
        )
        blobs.write_all(self._blob, data)
        self._append_line(text)

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

    def _void_lost_episodes(self, index: Path) -> None:
        """If the blob lost its end, says so in the index before new bytes take that place."""
        size = os.fstat(self._blob).st_size
        if any(line["end"] > size for line in _read_index(index).episodes):
            self._append_line(blobs.to_json({"kind": "cut", "blob": size}))


class EpisodeStore:
    """Reads a store as an EpisodeSource; episodes in the order of shard names, then of recording.

    It shows what was recorded when it was opened. `skipped` counts records that are torn or whose
    bytes are not all there; `failures` maps the seeds of failed attempts to their reasons.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self.header = read_header(self.folder)
        self.embodiment: Embodiment = EMBODIMENTS[self.header.embodiment]
        self.cameras = self.header.cameras
        self.skipped = 0
        self.failures: dict[int, str] = {}
        self._episodes: list[tuple[memoryview, dict[str, Any]]] = []
        for index in sorted(self.folder.glob("*.index.jsonl")):
            self._open_shard(index)
        keys = dict.fromkeys(key for _, line in self._episodes for key in line["privileged"])
        self.measures = tuple(keys)

    def __len__(self) -> int:
        return len(self._episodes)

    def length(self, i: int) -> int:
        """Number of observations of episode i."""
        return self._episodes[i][1]["proprio"]["shape"][0]

    def frames(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Frames of episode i at these steps, at the size they were recorded."""
        blob, line = self._episodes[i]
        camera = check_camera(camera, self.header.cameras, str(self.folder))
        return blobs.read_jpegs(blob, line["images"][camera], steps)

    def signals(self, i: int) -> Signals:
        """Label actions, proprioception, flags and instructions of episode i."""
        blob, line = self._episodes[i]
        proprio, actions, terminate = (
            blobs.read_array(blob, line[name]) for name in ("proprio", "actions", "terminate")
        )
        n, t = len(proprio), len(actions)
        return Signals(
            proprio=proprio,
            proprio_valid=np.ones(n, bool),
            actions=np.concatenate([actions, np.zeros((n - t, 7), np.float32)]),
            action_valid=np.arange(n) < t,
            terminate=terminate[np.minimum(np.arange(n), len(terminate) - 1)],
            instruction=blobs.from_run_lengths(line["instruction"]),
        )

    def metadata(self, i: int) -> Metadata:
        """Seed, success, task, rate, and what the recorder noted in single values."""
        line = self._episodes[i][1]
        noted = {k: v for k, v in line["meta"].items() if isinstance(v, str | int | float)}
        known = {"seed": line["seed"], "success": line["success"], "task": self.header.task}
        return noted | known | {"fps": self.embodiment.control_hz}

    def measured(self, i: int, key: str) -> np.ndarray | None:
        """The simulator's own `key` of episode i by step (T, ...), None where it has none."""
        blob, line = self._episodes[i]
        where = line["privileged"].get(key)
        return None if where is None else blobs.read_array(blob, where)

    def record(self, i: int) -> EpisodeRecord:
        """Everything of episode i. Raises UserError if its bytes are not those written."""
        blob, line = self._episodes[i]
        if blobs.checksum(blob[line["start"] : line["end"]]) != line["crc32"]:
            raise UserError(f"{self.folder}: episode {i} (seed {line['seed']}) is damaged on disk")
        steps = range(self.length(i))
        return EpisodeRecord(
            images={c: self.frames(i, steps, c) for c in self.header.cameras},
            **{name: blobs.read_array(blob, line[name]) for name in ARRAYS},
            instruction=blobs.from_run_lengths(line["instruction"]),
            privileged={k: blobs.read_array(blob, v) for k, v in line["privileged"].items()},
            **{name: line[name] for name in ("seed", "success", "draws", "meta")},
        )

    def seeds(self) -> set[int]:
        """Seeds already attempted: recorded episodes and noted failures."""
        return {line["seed"] for _, line in self._episodes} | set(self.failures)

    def _open_shard(self, index_file: Path) -> None:
        name = index_file.name.removesuffix(".index.jsonl")
        # The index first: what it lists is then in the blob, even while another process writes.
        index = _read_index(index_file)
        blob = blobs.mapped(_shard_files(self.folder, name)[0])
        whole = [line for line in index.episodes if line["end"] <= len(blob)]
        self._episodes += [(blob, line) for line in whole]
        self.failures |= index.failures
        skipped = index.skipped + len(index.episodes) - len(whole)
        if skipped:
            log.warning("%s: left out %d torn or incomplete record(s)", index_file, skipped)
        self.skipped += skipped


def read_header(folder: Path) -> StoreHeader:
    """The store's header. Raises UserError if there is none, or none that this version reads."""
    try:
        values = json.loads((folder / "store.json").read_text())
        version = values.pop("version")
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        header = StoreHeader(**(values | lists))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{folder}: not an episode store, store.json cannot be read ({e})") from e
    if version != VERSION:
        raise UserError(f"{folder}: store format {version}, this selfflow reads format {VERSION}")
    return header


@dataclass(frozen=True)
class _Index:
    episodes: list[dict[str, Any]]  # as far as the index knows; the blob may be shorter
    failures: dict[int, str]
    skipped: int


def _read_index(path: Path) -> _Index:
    lines, skipped = blobs.read_lines(path)
    episodes, failures = [], {}
    for line in lines:
        match line:
            case {"kind": "episode", "end": int()}:
                episodes.append(line)
            case {"kind": "failure", "seed": int(seed), "reason": str(reason)}:
                failures[seed] = reason
            case {"kind": "cut", "blob": int(size)}:
                kept = [e for e in episodes if e["end"] <= size]
                skipped, episodes = skipped + len(episodes) - len(kept), kept
            case _:
                skipped += 1
    return _Index(episodes, failures, skipped)


def _shard_files(folder: Path, shard: str) -> tuple[Path, Path]:
    return folder / f"{shard}.blob", folder / f"{shard}.index.jsonl"


def _agree_on_header(folder: Path, header: StoreHeader | None) -> StoreHeader:
    """Writes the header into a new store, or checks that an existing one is of the same kind."""
    if header is None or (folder / "store.json").exists():
        found = read_header(folder)
        if header is not None and found != header:
            raise UserError(
                f"{folder} holds {asdict(found)}, not {asdict(header)}; choose another folder"
            )
        return found
    if header.embodiment not in EMBODIMENTS:
        raise UserError(f"embodiment={header.embodiment}: choose one of {', '.join(EMBODIMENTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".store.json.{os.getpid()}"
    partial.write_text(json.dumps({"version": VERSION} | asdict(header), indent=2) + "\n")
    os.replace(partial, folder / "store.json")
    return header
