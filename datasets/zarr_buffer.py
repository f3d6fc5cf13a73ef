"""zarr replay buffers as a source of episodes: diffusion policy's layout, which UMI shares.

    data/<key>         (N, ...) all episodes' steps one after the other
    meta/episode_ends  (E,) index after each episode's last step

A folder or a .zarr.zip file, of zarr format 2 or 3. What the keys mean is said by a `DatasetSpec`,
whose keys are paths below data/; buffers hold no text, so `text` of the spec is that of all steps,
or `instruction` names an attribute of the buffer. Frames may be uint8, or floats of 0 .. 255.
"""

import logging
import os
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from selfflow.datasets.describe import needs_spec
from selfflow.datasets.episodes import DatasetSpec, Metadata, Signals, check_camera
from selfflow.datasets.spec import UserError

log = logging.getLogger(__name__)

ENDS = "meta/episode_ends"
OPEN = 16  # buffers
CODEC = "its compression must be installed, as UMI's JPEG XL is by pip install imagecodecs"


class ReplayBuffer:
    """A zarr replay buffer as an EpisodeSource. Raises UserError, naming the key, for what is not
    as the spec says. Each process opens it at its first use; threads share it."""

    def __init__(self, path: str | Path, spec: DatasetSpec | None = None) -> None:
        self.path = Path(path)
        self.name = self.path.resolve().name
        arrays = self._arrays()
        if spec is None:
            sizes = {k: "x".join(map(str, a.shape[1:])) for k, a in arrays.items()}
            found = {k: f"{sizes[k]} {a.dtype}" for k, a in arrays.items()}
            raise needs_spec(path, "zarr replay buffer", found)
        self.embodiment = spec.embodiment
        self.skipped = 0
        self._spec = spec
        ends = self._read(ENDS, slice(None)).astype(np.int64)
        if len(ends) == 0 or (np.diff(ends, prepend=0) <= 0).any():
            raise UserError(f"{path}: {ENDS} does not rise: {ends[:5].tolist()} ...")
        self._starts, self._ends = np.append(0, ends[:-1]), ends
        self.cameras = tuple(k for k, key in spec.cameras.items() if key in arrays)
        if not self.cameras:
            raise UserError(f"{path}: no camera of the spec; data/ has {', '.join(sorted(arrays))}")
        if away := [f"{k} ({key})" for k, key in spec.cameras.items() if key not in arrays]:
            log.warning("%s: not there, left out: camera %s", self.name, ", ".join(away))
        short = sorted(k for k, a in arrays.items() if a.shape[0] < ends[-1])
        if short:
            raise UserError(f"{path}: {ENDS} says {ends[-1]} steps, {', '.join(short)} has fewer")
        self.measures = tuple(sorted(k for k, a in arrays.items() if a.ndim <= 3))

    def __len__(self) -> int:
        return len(self._ends)

    def length(self, i: int) -> int:
        """Number of steps of episode i."""
        return int(self._ends[i] - self._starts[i])

    def frames(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Frames of episode i at these steps; only the chunks that hold them are read."""
        key = self._spec.cameras[check_camera(camera, self.cameras, self.name)]
        wanted, inverse = np.unique(np.asarray(steps, int), return_inverse=True)
        pixels = self._read(f"data/{key}", self._starts[i] + wanted)
        if pixels.ndim != 4 or pixels.shape[3] != 3:
            raise UserError(f"{self.path}: data/{key} has {pixels.shape[1:]} a step, not (H, W, 3)")
        if pixels.dtype != np.uint8:
            pixels = np.rint(pixels).clip(0, 255).astype(np.uint8)
        return [pixels[k] for k in inverse]

    def signals(self, i: int) -> Signals:
        """Episode i in the project's convention."""
        numbers = {k: self._numbers(i, k, width) for k, width in self._spec.numbers.items()}
        return self._spec.convert(numbers, [self._text()] * self.length(i))

    def measured(self, i: int, key: str) -> np.ndarray | None:
        """Any array of episode i that is not pictures, as it is in the buffer."""
        return self._rows(i, key) if key in self.measures else None

    def metadata(self, i: int) -> Metadata:
        """Its number and the buffer."""
        return {"episode": i, "file": self.name}

    def _numbers(self, i: int, key: str, width: int) -> Float[np.ndarray, "_ _"]:
        values = self._rows(i, key).astype(np.float64).reshape(self.length(i), -1)
        if width and values.shape[1] != width:
            raise UserError(
                f"{self.path}: data/{key} has {values.shape[1]} values a step, expected {width}"
            )
        return values

    def _rows(self, i: int, key: str) -> np.ndarray:
        return self._read(f"data/{key}", slice(self._starts[i], self._ends[i]))

    def _text(self) -> str:
        key = self._spec.instruction
        if key is None:
            return self._spec.text
        if key not in self._group().attrs:
            raise UserError(f"{self.path}: no attribute {key!r}; give text= in the spec")
        return str(self._group().attrs[key])

    def _read(self, key: str, rows: slice | np.ndarray) -> np.ndarray:
        """Rows of an array; only the chunks that hold them are read."""
        try:
            array = self._group()[key]
        except KeyError as e:
            have = ", ".join(sorted(self._arrays()))
            raise UserError(f"{self.path}: no {key}; data/ has {have}") from e
        try:
            return np.asarray(array.get_orthogonal_selection((rows,)))
        except (OSError, ValueError, RuntimeError) as e:
            raise UserError(f"{self.path}: {key} is damaged ({e})") from e

    def _arrays(self) -> dict[str, Any]:
        """The arrays of data/ by name."""
        try:
            return dict(self._group()["data"].arrays())
        except KeyError as e:
            raise UserError(f"{self.path}: no group data/") from e
        except ValueError as e:
            raise UserError(f"{self.path}: an array of data/ cannot be read ({e}); {CODEC}") from e

    def _group(self) -> Any:
        try:
            changed = self.path.stat().st_mtime_ns
        except OSError as e:
            raise UserError(f"{self.path}: cannot be read ({e})") from e
        return _opened(self.path, os.getpid(), changed)


def recognised(path: Path) -> bool:
    """Whether this is a replay buffer: a folder, or a zip, with meta/episode_ends."""
    if path.is_dir():
        return (path / ENDS).is_dir()
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.startswith(f"{ENDS}/") for name in archive.namelist())


@lru_cache(OPEN)
def _opened(path: Path, process: int, changed: int) -> Any:
    """The group, opened by this process: a zip's file position must not be shared with another."""
    try:
        import zarr
        from zarr.storage import LocalStore, ZipStore
    except ImportError as e:
        raise UserError(f"{path}: a zarr buffer needs zarr: pip install 'selfflow[zarr]'") from e
    if not recognised(path):
        raise UserError(f"{path}: no replay buffer, there is no {ENDS}")
    store = LocalStore(path, read_only=True) if path.is_dir() else ZipStore(path, mode="r")
    try:
        return zarr.open_group(store, mode="r")
    except (ValueError, KeyError, OSError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from e
