"""Writing the latents of latents.py: episode by episode, in any order, by one process at a time."""

import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxtyping import Float
from torch import Tensor

from selfflow.worldmodel.checkpoint import write_json
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.latents import FORMAT, HEADER, Header, Shard, read_header, shards


class LatentWriter:
    """Fills a store; an existing one is continued, and may get more sources and episodes.

    Raises RunError if the folder holds latents of another kind or of other data, or another
    process is writing it.
    """

    def __init__(
        self, folder: str | Path, header: Header, sources: Sequence[tuple[str, Sequence[int]]]
    ) -> None:
        self.folder, self.header = Path(folder).expanduser(), header
        names = [name for name, _ in sources]
        if len(set(names)) < len(names):
            raise RunError(f"data: two sources have one name ({', '.join(names)}); rename a folder")
        before = self._existing()
        for name, steps in sources:
            known = before[name].steps if name in before else []
            common = min(len(known), len(steps))
            if known[:common] != list(steps[:common]):
                raise RunError(
                    f"out={folder}: {name} had other episodes when it was encoded; choose another"
                )
        self._lock = self._open()
        for name, steps in sources:
            number = before[name].number if name in before else len(before)
            known = before[name].steps if name in before else []
            longest = max(list(steps), known, key=len)
            write_json(self.folder / f"{number:03d}.json", {"name": name, "steps": longest})
            before[name] = Shard(self.folder, number, name, longest, header)
        self.shards: dict[str, Shard] = {name: before[name] for name in names}
        for shard in self.shards.values():
            if shard.done and not shard.whole(end := next(reversed(shard.done))):
                del shard.done[end]
        self._wanted = [(name, i) for name, steps in sources for i in range(len(steps))]

    def pending(self) -> list[tuple[str, int]]:
        """(source, episode) of what is not encoded yet."""
        return [(name, i) for name, i in self._wanted if i not in self.shards[name].done]

    def write(self, name: str, episode: int, blocks: Iterable[Float[Tensor, "_ L C"]]) -> None:
        """Writes an episode's rows, given in order; they are on the disk when this returns."""
        shard, crc, count = self.shards[name], 0, 0
        handle = os.open(shard.file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            at = shard.starts[episode] * self.header.row_bytes
            for block in blocks:
                if block.shape[1:] != self.header.row:
                    raise ValueError(f"rows of {block.shape[1:]}, not {self.header.row}")
                data = block.cpu().numpy().astype("<f2").tobytes()
                at += _write(handle, memoryview(data), at)
                crc, count = zlib.crc32(data, crc), count + len(block)
            if count != self.header.rows(shard.steps[episode]):
                raise ValueError(f"{count} rows for {shard.steps[episode]} steps")
            os.fsync(handle)
        finally:
            os.close(handle)
        _append(shard.log, json.dumps([episode, crc]))
        shard.done[episode] = crc

    def close(self) -> None:
        """Frees the folder for another writer."""
        self._lock.close()

    def __enter__(self) -> "LatentWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _existing(self) -> dict[str, Shard]:
        if not (self.folder / HEADER).exists():
            return {}
        found, own = read_header(self.folder).identity(), self.header.identity()
        wrong = [f"{k} is {found[k]} there and {own[k]} here" for k in own if found[k] != own[k]]
        if wrong:
            raise RunError(
                f"out={self.folder} holds other latents: {', '.join(wrong)}; choose another out"
            )
        return {shard.name: shard for shard in shards(self.folder, self.header)}

    def _open(self) -> Any:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as e:
            raise RunError(f"out={self.folder} cannot be written ({e.strerror})") from e
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            lock.close()
            raise RunError(f"out={self.folder}: another process writes it; wait for it") from e
        if not (self.folder / HEADER).exists():
            values = {"format": FORMAT, "selfflow": version("selfflow")} | asdict(self.header)
            write_json(self.folder / HEADER, values)
        return lock


def _append(path: Path, text: str) -> None:
    """One more line, on the disk when this returns; ends a torn one first."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = size > 0 and file.read(1) != b"\n"
        file.write(b"\n" * torn + text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _write(handle: int, data: memoryview, at: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], at + done)
    return done
