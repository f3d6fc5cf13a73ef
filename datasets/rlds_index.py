"""Where every episode of an RLDS split lies, and how long it is: found once, kept for next time.

Finding them walks through all shards. From MIN_KEPT episodes on what was found is written to
.index-SPLIT.npz in the dataset's folder, or, where that is read-only, under $XDG_CACHE_HOME
(~/.cache); shards are known again by name, size and time of change, others are walked anew.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from rich.console import Console
from rich.progress import track

from selfflow.datasets.blob import mapped
from selfflow.datasets.spec import UserError
from selfflow.datasets.tfrecord import parse_example, scan

MIN_KEPT = 1000  # episodes; finding fewer takes less than half a second
SHARD = re.compile(r"(?P<name>[^.].*)-(?P<split>[^-]+)\.tfrecord(-\d+-of-(?P<count>\d+))?")
Stamp = tuple[str, int, int]  # of a file: name, bytes, time of change in ns


@dataclass(frozen=True)
class Shard:
    """The episodes of one file, and its records that cannot be read, with the reason."""

    rows: Int64[np.ndarray, "N 4"]  # record, start and size of its data in bytes, steps
    problems: dict[int, str]


def shard_files(folder: Path, split: str) -> list[Path]:
    """The shards of the split that are there, in order. Raises UserError if there are none."""
    named = [(path, SHARD.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    files = [path for path, match in named if match and match["split"] == split]
    if not files:
        splits = ", ".join(sorted({match["split"] for _, match in named if match})) or "none"
        raise UserError(f"{folder}: no shard of split {split!r}; found {splits}")
    return files


def missing(files: list[Path]) -> int:
    """Number of shards that the names of these say there are, beside them."""
    match = SHARD.fullmatch(files[0].name)
    return int(match["count"]) - len(files) if match and match["count"] else 0


def read_index(files: list[Path], split: str, key: str, check_crc: bool = False) -> list[Shard]:
    """One entry per file. An episode has as many steps as its record has values under `key`.

    `check_crc` checks the data of every record, once. Progress is shown where that takes long, and
    is kept when interrupted.
    """
    folder, about = files[0].parent, f"{key} {'checked' if check_crc else 'unchecked'}"
    stamps = [_stamp(file) for file in files]
    places = [folder / f".index-{split}.npz", _cache_folder(folder) / f"index-{split}.npz"]
    found: dict[Stamp, Shard] = {}
    for place in places:
        found |= _load(place, {about, f"{key} checked"})
    todo = [(f, s) for f, s in zip(files, stamps, strict=True) if s not in found]
    try:
        console = Console(stderr=True, quiet=len(todo) < 8)
        for file, stamp in track(todo, f"indexing {folder}", console=console, transient=True):
            found[stamp] = index_shard(file, key, check_crc)
    finally:
        kept = {stamp: found[stamp] for stamp in stamps if stamp in found}
        if todo and sum(len(shard.rows) for shard in kept.values()) >= MIN_KEPT:
            _save(places[0 if os.access(folder, os.W_OK) else 1], about, kept)
    return [found[stamp] for stamp in stamps]


def index_shard(file: Path, key: str, check_crc: bool = False) -> Shard:
    """Walks through one file."""
    data = mapped(file)
    ranges, problems = scan(data, check_crc)
    rows = []
    for record, (start, end) in enumerate(ranges):
        if record in problems:
            continue
        try:
            rows.append((record, start, end - start, _count(data[start:end], key)))
        except ValueError as e:
            problems[record] = str(e)
    return Shard(np.array(rows, np.int64).reshape(-1, 4), problems)


def _count(data: memoryview, key: str) -> int:
    steps = len(parse_example(data, (key,)).get(key, ()))
    if not steps:
        raise ValueError(f"no feature {key}; it has {', '.join(sorted(parse_example(data)))}")
    return steps


def _stamp(file: Path) -> Stamp:
    about = file.stat()
    return file.name, about.st_size, about.st_mtime_ns


def _cache_folder(folder: Path) -> Path:
    """Under the user's cache, one for every dataset's folder."""
    path = str(folder.resolve())
    return cache_home() / "rlds" / f"{folder.name}-{hashlib.sha256(path.encode()).hexdigest()[:16]}"


def cache_home() -> Path:
    """selfflow's part of $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfflow"


def _save(place: Path, about: str, shards: Mapping[Stamp, Shard]) -> None:
    """Replaces the file as a whole."""
    lines = {
        "about": about,
        "shards": [[*stamp, len(s.rows), list(s.problems.items())] for stamp, s in shards.items()],
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f"{place.name}.{os.getpid()}")
    with open(draft, "wb") as file:
        np.savez(
            file,
            rows=np.concatenate([shard.rows for shard in shards.values()]),
            lines=np.frombuffer(json.dumps(lines).encode(), np.uint8),
        )
    os.replace(draft, place)


def _load(place: Path, wanted: set[str]) -> dict[Stamp, Shard]:
    """What is known of files there; nothing where the file is absent, damaged or of other steps."""
    try:
        with np.load(place) as arrays:
            rows, lines = arrays["rows"], json.loads(arrays["lines"].tobytes())
        if lines["about"] not in wanted:
            return {}
        ends = np.cumsum([count for *_, count, _ in lines["shards"]])
        return {
            (name, size, time): Shard(rows[end - count : end], dict(problems))
            for (name, size, time, count, problems), end in zip(lines["shards"], ends, strict=True)
        }
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return {}
