"""The lines of an episode store's shard: what they say, read from the file only when wanted.

Held in memory are 32 bytes an episode, so that a store of a hundred thousand opens in seconds and
does not fill the memory of a training run.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfflow.datasets.blob import mapped

START, STOP, END, LENGTH = range(4)  # columns: the line in the index, end in the blob, steps


@dataclass
class Index:
    """One shard's index as far as it knows; the blob may be shorter."""

    text: memoryview  # the file
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)  # of episodes, as above
    failures: dict[int, str] = field(default_factory=dict)  # reasons by seed
    measures: dict[str, None] = field(default_factory=dict)  # names of privileged arrays
    skipped: int = 0  # lines that are torn, episodes that were cut

    def keep_within(self, size: int) -> None:
        """Drops and counts the episodes that need a longer blob."""
        kept = [row for row in self.rows if row[END] <= size]
        self.skipped += len(self.rows) - len(kept)
        self.rows = kept


def read_index(path: Path) -> Index:
    """All lines of an index; a missing file has none."""
    index = Index(mapped(path))
    start = 0
    while start < len(index.text):
        stop = _line_end(index.text, start)
        if stop > start:
            _take(index, start, stop)
        start = stop + 1
    return index


def read_line(text: memoryview, row: np.ndarray) -> dict[str, Any]:
    """An episode's line."""
    return json.loads(bytes(text[row[START] : row[STOP]]))


def _take(index: Index, start: int, stop: int) -> None:
    match _parse(bytes(index.text[start:stop])):
        case {"kind": "episode", "end": int(end), "proprio": {"shape": [int(length), _]}} as line:
            index.rows.append((start, stop, end, length))
            index.measures |= dict.fromkeys(line.get("privileged", {}))
        case {"kind": "failure", "seed": int(seed), "reason": str(reason)}:
            index.failures[seed] = reason
        case {"kind": "cut", "blob": int(size)}:
            index.keep_within(size)
        case _:
            index.skipped += 1


def _line_end(text: memoryview, start: int) -> int:
    """Where the line that begins at `start` ends."""
    block = 1 << 14
    for at in range(start, len(text), block):
        found = bytes(text[at : at + block]).find(b"\n")
        if found >= 0:
            return at + found
    return len(text)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # also what undecodable bytes raise
        return None
