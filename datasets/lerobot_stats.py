"""The statistics that LeRobot keeps of a dataset: exact of numbers, of pictures by samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from selfflow.datasets.lerobot_meta import need_pyarrow

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def statistics(values: np.ndarray) -> dict[str, list]:
    """min, max, mean, std, count and quantiles over the first axis."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    named = {
        "min": rows.min(axis=0),
        "max": rows.max(axis=0),
        "mean": rows.mean(axis=0),
        "std": rows.std(axis=0),
        **dict(zip(QUANTILES, np.quantile(rows, list(QUANTILES.values()), axis=0), strict=True)),
    }
    return {name: v.tolist() for name, v in named.items()} | {"count": [len(rows)]}


def table_statistics(files: Sequence[Path]) -> dict[str, dict[str, list]]:
    """Those of every column of numbers over all files, one column in memory at a time."""
    parquet = need_pyarrow().parquet
    found = {}
    for key in parquet.read_schema(files[0]).names:
        parts = [_numbers(parquet.read_table(path, columns=[key]).column(key)) for path in files]
        found[key] = statistics(np.concatenate(parts))
    return found


class Pixels:
    """Counts of the 256 levels of each channel, from which all statistics of pictures follow."""

    def __init__(self) -> None:
        self.counts = np.zeros((3, 256), np.int64)
        self.frames = 0

    def add(self, frame: UInt8[np.ndarray, "_ _ 3"]) -> None:
        """Counts one frame, of a large one every second, third, ... pixel."""
        skip = max(1, min(frame.shape[:2]) // 128)
        for channel in range(3):
            seen = frame[::skip, ::skip, channel].ravel()
            self.counts[channel] += np.bincount(seen, minlength=256)
        self.frames += 1

    def merge(self, other: "Pixels") -> None:
        """Adds what another one counted."""
        self.counts += other.counts
        self.frames += other.frames

    def statistics(self) -> dict[str, list]:
        """Of values in 0 .. 1, each (3, 1, 1); the count is of frames."""
        levels = np.arange(256) / 255
        total = self.counts.sum(axis=1)
        mean = self.counts @ levels / total
        square = self.counts @ levels**2 / total
        share = np.cumsum(self.counts, axis=1) / total[:, None]
        named = {
            "min": [levels[np.flatnonzero(c)[0]] for c in self.counts],
            "max": [levels[np.flatnonzero(c)[-1]] for c in self.counts],
            "mean": mean,
            "std": np.sqrt(np.maximum(square - mean**2, 0)),
            **{n: [levels[np.searchsorted(s, q)] for s in share] for n, q in QUANTILES.items()},
        }
        shaped = {name: [[[float(v)]] for v in values] for name, values in named.items()}
        return shaped | {"count": [self.frames]}


def _numbers(column: Any) -> np.ndarray:
    array = column.combine_chunks()
    count = len(array)
    if hasattr(array, "flatten"):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False).reshape(count, -1)
