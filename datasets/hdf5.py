"""HDF5 files as a source of episodes: robomimic's layout and ALOHA's (ACT's).

    robomimic   one file: data/demo_<i> with attribute num_samples, actions, dones, obs/<key>;
                attribute env_args of data: what it was recorded in; mask/<name>: names of demos
    ALOHA       a file per episode in one folder: action, observations/qpos,
                observations/images/<camera>: uint8 (T, H, W, 3), or JPEG data padded with zeros

What the keys mean is said by a `DatasetSpec`, whose keys are paths below the demo or the file:
robomimic_panda.py, aloha.py, or one's own (describe.py). Besides datasets a key may name:

    env_args/<key>         a text of robomimic's env_args, as env_args/env_name
    env_args/output_max    (6) metres and radians that an OSC_POSE action of 1 means
    model_file/<body>      (7) xyz (m) and quaternion wxyz of a body below the world in the demo's
                           MuJoCo model

No file is held open: opening costs a millisecond, and whatever thread or process may read.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from selfflow.datasets.aloha import ALOHA
from selfflow.datasets.describe import needs_spec
from selfflow.datasets.episodes import DatasetSpec, Metadata, Signals, check_camera
from selfflow.datasets.rlds import decode_image
from selfflow.datasets.robomimic_panda import ROBOMIMIC, SCALE, action_scale, body_pose
from selfflow.datasets.spec import UserError

log = logging.getLogger(__name__)

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SUFFIXES = ("*.hdf5", "*.h5")
ENV_ARGS, MODEL = "env_args/", "model_file/"


class Hdf5Source:
    """Demonstrations in HDF5 as an EpisodeSource.

    `spec` None is the robomimic or ALOHA one, by what is in the file. `mask` takes the demos of one
    of robomimic's filter keys. Raises UserError, naming file and key, for what cannot be read; with
    `skip_corrupt` such a file or demo is left out and counted instead.
    """

    def __init__(
        self,
        path: str | Path,
        spec: DatasetSpec | None = None,
        mask: str | None = None,
        skip_corrupt: bool = False,
    ) -> None:
        path = Path(path)
        files = hdf5_files(path)
        if not files:
            raise UserError(f"{path}: no HDF5 file")
        self.name = path.resolve().name
        self._spec = default_spec(files[0]) if spec is None else spec
        self.embodiment = self._spec.embodiment
        self.skipped = 0
        self._episodes: list[tuple[Path, str, int]] = []  # file, group, T
        for file in files:
            self._list(file, mask, skip_corrupt)
        if not self._episodes:
            raise UserError(f"{path}: no episode ({self.skipped} skipped)")
        self.cameras, self.measures = self._look(*self._episodes[0][:2])
        away = [f"{k} ({key})" for k, key in self._spec.cameras.items() if k not in self.cameras]
        if spec is not None and away:
            log.warning("%s: not there, left out: camera %s", self.name, ", ".join(away))
        if self._spec is ALOHA:
            log.warning(
                "%s: joint-space actions are no end-effector deltas: none is valid; "
                "the arrays themselves are measured(i, key) of %s",
                self.name,
                ", ".join(self.measures),
            )

    def __len__(self) -> int:
        return len(self._episodes)

    def length(self, i: int) -> int:
        """Number of steps of episode i."""
        return self._episodes[i][2]

    def frames(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Frames of episode i at these steps; only they are read."""
        path, place, _ = self._episodes[i]
        key = self._spec.cameras[check_camera(camera, self.cameras, self.name)]
        wanted, inverse = np.unique(np.asarray(steps, int), return_inverse=True)
        with _opened(path) as file:
            rows = _dataset(file[place], key, path)[wanted]
        if rows.ndim == 4 and (rows.shape[3] != 3 or rows.dtype != np.uint8):
            kind = f"{rows.shape[1:]} {rows.dtype}"
            raise UserError(f"{path}: frames of {place}/{key} are {kind}, not (H, W, 3) uint8")
        try:
            images = [_image(row) for row in rows]
        except OSError as e:
            raise UserError(f"{path}: a frame of {place}/{key} is damaged ({e})") from e
        return [images[k] for k in inverse]

    def signals(self, i: int) -> Signals:
        """Episode i in the project's convention."""
        path, place, length = self._episodes[i]
        with _opened(path) as file:
            numbers = {
                key: self._numbers(file, place, key, width, path)
                for key, width in self._spec.numbers.items()
            }
            texts = self._texts(file, place, length, path)
        for key, rows in numbers.items():
            if len(rows) != length:
                raise UserError(f"{path}: {place}/{key} has {len(rows)} rows, expected {length}")
        return self._spec.convert(numbers, texts)

    def measured(self, i: int, key: str) -> np.ndarray | None:
        """Any array of episode i that is not pictures, as it is in the file."""
        path, place, length = self._episodes[i]
        with _opened(path) as file:
            if key not in file[place] or not _is_measure(file[place][key], length):
                return None
            return file[place][key][:]

    def metadata(self, i: int) -> Metadata:
        """Its number in the original, the file, and what env_args or the ALOHA file say."""
        path, place, _ = self._episodes[i]
        found: Metadata = {"episode": _number(place if place != "/" else path.stem)}
        with _opened(path) as file:
            env = env_args(file)
            rate = env.get("env_kwargs", {}).get("control_freq")
            found |= {"fps": float(rate)} if rate is not None else {}
            found |= {"task": str(env["env_name"])} if "env_name" in env else {}
            found |= {"sim": bool(file.attrs["sim"])} if "sim" in file.attrs else {}
        return found | {"file": path.name}

    def _list(self, path: Path, mask: str | None, skip_corrupt: bool) -> None:
        """Takes note of a file's episodes."""
        try:
            with _opened(path) as file:
                places = _demos(file, mask, path)
        except UserError as e:
            self._leave_out(e, skip_corrupt)
            return
        for place in places:
            try:
                with _opened(path) as file:
                    self._episodes.append((path, place, self._length(file, place, path)))
            except UserError as e:
                self._leave_out(e, skip_corrupt)

    def _leave_out(self, error: UserError, skip_corrupt: bool) -> None:
        if not skip_corrupt:
            raise error
        self.skipped += 1
        log.warning("left out: %s", error)

    def _length(self, file: Any, place: str, path: Path) -> int:
        """T: rows of the first of the spec's arrays that is there."""
        group = file[place]
        for key in (*self._spec.numbers, *self._spec.cameras.values()):
            if key in group:
                if not (shape := _dataset(group, key, path).shape) or not shape[0]:
                    raise UserError(f"{path}: {place}/{key} is empty, or not by step")
                return shape[0]
        raise UserError(f"{path}: {place} has none of the spec's keys; it has {_keys(group)}")

    def _look(self, path: Path, place: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Cameras and measures of an episode."""
        with _opened(path) as file:
            group = file[place]
            cameras = tuple(k for k, key in self._spec.cameras.items() if key in group)
            if not cameras:
                raise UserError(f"{path}: no camera of the spec in {place}; it has {_keys(group)}")
            length = self._episodes[0][2]
            return cameras, tuple(k for k in _leaves(group) if _is_measure(group[k], length))

    def _numbers(
        self, file: Any, place: str, key: str, width: int, path: Path
    ) -> Float[np.ndarray, "_ _"]:
        """The array under a key, by step; constants are repeated."""
        if key == SCALE or key.startswith(MODEL):
            length = self._length(file, place, path)
            body = key.removeprefix(MODEL)
            row = (
                action_scale(env_args(file), path)
                if key == SCALE
                else body_pose(file[place].attrs.get("model_file"), body, path)
            )
            return np.tile(row, (length, 1))
        array = _dataset(file[place], key, path)
        if array.dtype.kind not in "biuf" or not array.shape:
            raise UserError(f"{path}: {place}/{key} holds no numbers by step")
        values = np.asarray(array[:], np.float64).reshape(len(array), -1)
        if width and values.shape[1] != width:
            raise UserError(
                f"{path}: {place}/{key} has {values.shape[1]} values a step, expected {width}"
            )
        return values

    def _texts(self, file: Any, place: str, length: int, path: Path) -> list[str]:
        """The text of every step: a dataset, or an attribute of demo, data or file."""
        key = self._spec.instruction
        if key is None:
            return [self._spec.text] * length
        if key.startswith(ENV_ARGS) and (name := key.removeprefix(ENV_ARGS)) in (
            env := env_args(file)
        ):
            return [str(env[name])] * length
        if key in file[place]:
            if _dataset(file[place], key, path).dtype.kind not in "OS":
                raise UserError(f"{path}: {place}/{key} holds no text")
            found = np.atleast_1d(file[place][key].asstr()[()]).tolist()
            if len(found) in (1, length):
                return found * (length if len(found) == 1 else 1)
            raise UserError(f"{path}: {place}/{key} has {len(found)} texts, expected {length}")
        for holder in (file[place], file.get("data", file), file):
            if key in holder.attrs:
                return [str(holder.attrs[key])] * length
        raise UserError(
            f"{path}: no text {key!r} in {place}; give instruction= or text= in the spec"
        )


def recognised(path: Path) -> bool:
    """Whether this is an HDF5 file, or a folder with some."""
    return bool(hdf5_files(path))


def hdf5_files(path: Path) -> list[Path]:
    """The HDF5 files that are, or lie in, this path, in the order of the numbers in their names."""
    found = [path] if path.is_file() else [p for s in SUFFIXES for p in path.glob(s)]
    files = []
    for one in found:
        with open(one, "rb") as file:
            if file.read(len(SIGNATURE)) == SIGNATURE:
                files.append(one)
    return sorted(files, key=lambda p: (_number(p.stem), p.name))


def default_spec(path: Path) -> DatasetSpec:
    """What is known of a file by its layout. Raises UserError where that says nothing."""
    with _opened(path) as file:
        if "data" in file and "env_args" in file["data"].attrs:
            return ROBOMIMIC
        if "action" in file and "observations/qpos" in file:
            return ALOHA
        place = _demos(file, None, path)[0]
        found = {k: str(getattr(file[place][k], "shape", "")) for k in _leaves(file[place])}
        raise needs_spec(path, "HDF5 file", found)


def env_args(file: Any) -> dict[str, Any]:
    """robomimic's description of the environment, {} where there is none. Raises UserError."""
    text = file["data"].attrs.get("env_args", "{}") if "data" in file else "{}"
    try:
        return json.loads(text)
    except ValueError as e:
        raise UserError(f"{file.filename}: env_args is not JSON ({e})") from e


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, read only. Raises UserError if it cannot be read."""
    try:
        import h5py
    except ImportError as e:
        raise UserError(f"{path}: HDF5 needs h5py: pip install 'selfflow[hdf5]'") from e
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as e:  # h5py raises each of them for damaged files
        raise UserError(f"{path}: cannot be read ({e})") from e


def _demos(file: Any, mask: str | None, path: Path) -> list[str]:
    """The groups of a file's episodes, in the order of their numbers; "/" in ALOHA's layout."""
    masks = {k: v for k, v in file.get("mask", {}).items()}
    if mask is not None and mask not in masks:
        raise UserError(f"{path}: mask={mask}: choose one of {', '.join(masks) or '(it has none)'}")
    if "data" not in file:
        return ["/"]
    names = list(file["data"]) if mask is None else masks[mask].asstr()[:].tolist()
    return [f"data/{name}" for name in sorted(names, key=_number)]


def _dataset(group: Any, key: str, path: Path) -> Any:
    if not hasattr(found := group.get(key), "dtype"):  # nothing, or a group of others
        raise UserError(f"{path}: no {key} in {group.name}; it has {_keys(group)}")
    return found


def _leaves(group: Any) -> list[str]:
    """Paths of all datasets below a group."""
    import h5py

    found: list[str] = []
    group.visititems(lambda k, v: found.append(k) if isinstance(v, h5py.Dataset) else None)
    return found


def _keys(group: Any) -> str:
    return ", ".join(_leaves(group)[:20]) or "nothing"


def _is_measure(dataset: Any, length: int) -> bool:
    """Whether it holds numbers by step, and no pictures: bytes or pixels are rows of uint8."""
    shape = getattr(dataset, "shape", ())
    if not shape or shape[0] != length or len(shape) > 3:
        return False
    return dataset.dtype.kind in "fib" or (dataset.dtype.kind == "u" and len(shape) == 1)


def _image(row: Any) -> UInt8[np.ndarray, "_ _ 3"]:
    """A frame: pixels, or JPEG data that zeros fill up (a JPEG ends in FF D9)."""
    pixels = np.asarray(row)
    return pixels if pixels.ndim == 3 else decode_image(pixels.tobytes().rstrip(b"\0"))


def _number(name: str) -> int:
    digits = re.findall(r"\d+", name)
    return int(digits[-1]) if digits else 0
