"""Checksums of the files of a folder, so that damage is found and named."""

import json
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import track

from selfflow.datasets.spec import UserError
from selfflow.datasets.store import EpisodeStore
from selfflow.datasets.store_header import HEADER

NAME = "checksums.json"
BLOCK = 1 << 22
SHOWN = 10  # damages named


def write_checksums(folder: Path) -> None:
    """Notes size and crc32 of every file below `folder` in its checksums.json."""
    names = [str(path.relative_to(folder)) for path in _files(folder)]
    noted = {name: _of(folder / name) for name in _shown(names, "checksums")}
    part = folder / f".{NAME}"
    part.write_text(json.dumps(noted, indent=1) + "\n")
    os.replace(part, folder / NAME)


def verify(folder: Path) -> int:
    """Checks all files that checksums.json names, or the episodes of a store without one.

    Returns how many bytes are right. Raises UserError naming the files, and in a store the
    episodes, that are not.
    """
    size, wrong = _compare(folder)
    if (folder / HEADER).exists() and (wrong or not size):
        wrong += _damaged_episodes(folder)
        size = size or size_of(folder)
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(f"{folder}: damaged: {'; '.join(wrong[:SHOWN])}{more}; convert it again")
    if not size:
        raise UserError(f"{folder}: no {NAME}; convert.py writes one")
    return size


def size_of(folder: Path) -> int:
    """Bytes in all files below a folder."""
    return sum(path.stat().st_size for path in _files(folder))


def _compare(folder: Path) -> tuple[int, list[str]]:
    path = folder / NAME
    if not path.exists():
        return 0, []
    try:
        noted = {name: (int(n["bytes"]), int(n["crc32"])) for name, n in _read(path).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: cannot be read ({e!r})") from e
    size, wrong = 0, []
    for name in _shown(sorted(noted), "verifying"):
        expected, crc = noted[name]
        if not (folder / name).exists():
            wrong.append(f"{name} is missing")
            continue
        found = _of(folder / name)
        if found["bytes"] != expected:
            wrong.append(f"{name} has {found['bytes']} bytes, not {expected}")
        elif found["crc32"] != crc:
            wrong.append(f"{name} has another checksum")
        size += expected
    return size, wrong


def _damaged_episodes(folder: Path) -> list[str]:
    """What is wrong in a store, by shard."""
    store = EpisodeStore(folder)
    episodes: dict[str, list[int]] = defaultdict(list)
    for i in range(len(store)):
        if not store.intact(i):
            episodes[store.shard(i)].append(i)
    wrong = [f"{name}: episodes {', '.join(map(str, e[:20]))}" for name, e in episodes.items()]
    return wrong + ([f"{store.skipped} records that are torn or cut"] if store.skipped else [])


def _shown(names: list[str], what: str) -> Iterable[str]:
    """The names, with a bar on a terminal."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(names, what, console=console, transient=True, disable=hidden)


def _files(folder: Path) -> list[Path]:
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("."))
    return [path for path in paths if path != folder / NAME]


def _of(path: Path) -> dict[str, int]:
    crc = 0
    with path.open("rb") as file:
        while data := file.read(BLOCK):
            crc = zlib.crc32(data, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def _read(path: Path) -> dict:
    return json.loads(path.read_text())
