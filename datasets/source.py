"""How an entry of `data` becomes a source of episodes.

    path                         recognised by content, not by name
    path::my_robot.yaml          one's own data, described in YAML (describe.py)
    path::bridge_reached         Bridge, moving by what was reached (bridge.py)
    path@0.5                     its weight in a mixture
    path::my_robot.yaml@0.5      both
    hf://owner/name              a dataset of the Hugging Face hub (hub.py)
    path?split:val?skip_corrupt  options of the format (with_options)
    path?camera:wrist            another camera than the first, or a part of the pictures (view.py)
    gs://bucket/name?shards:8    RLDS elsewhere (remote.py)

What a source offers: episodes.py. A format is one file: store.py, rlds.py, lerobot.py, hdf5.py,
zarr_buffer.py, clips.py, video.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfflow.datasets import clips, hdf5, lerobot, zarr_buffer
from selfflow.datasets.bridge import BRIDGE, BRIDGE_REACHED
from selfflow.datasets.describe import load_spec, needs_spec
from selfflow.datasets.episodes import DatasetSpec, EpisodeSource, Signals
from selfflow.datasets.fractal import FRACTAL
from selfflow.datasets.hub import PREFIX, download
from selfflow.datasets.remote import fetch, is_url
from selfflow.datasets.rlds import RldsSource, dataset_name, find_dataset
from selfflow.datasets.rlds_schema import read_schema
from selfflow.datasets.rlds_writer import written_spec
from selfflow.datasets.spec import UserError
from selfflow.datasets.store import EpisodeStore
from selfflow.datasets.video import VideoClip, is_mp4
from selfflow.datasets.view import View

__all__ = ["EpisodeSource", "Signals", "open_source", "open_sources"]

RLDS_SPECS = {
    "bridge_dataset": BRIDGE,
    "bridge_orig": BRIDGE,
    "fractal20220817_data": FRACTAL,
}
CHOICES = {"bridge_reached": BRIDGE_REACHED}  # specs in code that only path::name asks for
RECOGNISED = (
    "an episode store (a folder with store.json), "
    "an RLDS/TFDS dataset (a folder with features.json and *.tfrecord*), "
    "a LeRobot dataset (a folder with meta/info.json), "
    "HDF5 (a file or a folder of *.hdf5 or *.h5), "
    "a zarr replay buffer (a folder or *.zarr.zip with meta/episode_ends), "
    "annotated clips (a folder with annotation/ and videos/), "
    "a video clip (an mp4 file)"
)


def open_source(path: str, spec: DatasetSpec | None = None) -> EpisodeSource:
    """The reader for what lies at `path`, recognised by content.

    `spec` None is what `path` says after ::, else what is known of the data. Raises UserError if
    there is nothing, nothing recognised, or data that nobody described: that names what is in them.
    """
    if spec is None:
        path, spec = _split_spec(path)
    bare, options = with_options(path)
    seen = {key: options.pop(key) for key in ("camera", "crop") if key in options}
    if bare.startswith(PREFIX):
        source: EpisodeSource = _open(download(bare), path, spec, options)
    elif is_url(bare):
        wanted = {key: options[key] for key in ("split", "shards") if key in options}
        source = _open_rlds(fetch(bare, **wanted), spec, options)
    else:
        place = Path(bare).expanduser()
        if not place.exists():
            raise UserError(f"data={path}: no such path; give {RECOGNISED}")
        source = _open(place, path, spec, options)
    return View(source, **seen) if seen else source


def open_sources(specs: Sequence[str]) -> tuple[list[EpisodeSource], list[float]]:
    """Sources and sampling weights of entries of `data`; the weight is 1.0 where none is given."""
    if not specs:
        raise UserError(f"data=[]: no data; give one or more paths, each {RECOGNISED}")
    parts = [_split_weight(spec) for spec in specs]
    return [open_source(path) for path, _ in parts], [weight for _, weight in parts]


def _open(
    place: Path, path: str, spec: DatasetSpec | None, options: dict[str, Any]
) -> EpisodeSource:
    if place.is_dir() and (folder := find_dataset(place)) is not None:
        return _open_rlds(folder, spec, options)
    if place.is_dir() and clips.recognised(place):
        return clips.ClipFolder(place, spec, **_options(path, options, skip_corrupt="skip_corrupt"))
    if hdf5.recognised(place):
        names = {"split": "mask", "skip_corrupt": "skip_corrupt"}  # robomimic's filter keys
        return hdf5.Hdf5Source(place, spec, **_options(path, options, **names))
    _options(path, options)
    if (place / "store.json").is_file():
        if spec is not None:
            raise UserError(f"data={path}: an episode store says itself what it holds; no spec")
        return EpisodeStore(place)
    if lerobot.recognised(place):
        return lerobot.LeRobotSource(place, spec)
    if zarr_buffer.recognised(place):
        return zarr_buffer.ReplayBuffer(place, spec)
    if place.is_file() and is_mp4(place):
        if spec is None:
            return VideoClip(place)
        return VideoClip(place, spec.embodiment, spec.text or None)
    raise UserError(f"data={path}: not recognised; give {RECOGNISED}")


def with_options(path: str) -> tuple[str, dict[str, Any]]:
    """A path and the options behind it: path?split:val?shards:8?check_crc?skip_corrupt.

    RLDS has them all (RldsSource), others have some. Raises UserError for what is none of them.
    """
    if Path(path).expanduser().exists():  # its name may hold a ?
        return path, {}
    place, *texts = path.split("?")
    options: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition(":")
        if text in ("check_crc", "skip_corrupt"):
            options[text] = True
        elif name in ("split", "camera", "crop") and value:
            options[name] = value
        elif name == "shards" and value.isdecimal() and int(value) > 0:
            options[name] = int(value)
        else:
            choices = "split:NAME, shards:N, camera:NAME, crop:L-T-R-B, check_crc, skip_corrupt"
            raise UserError(f"data={path}: no option {text!r}; there are {choices}")
    return place.rstrip("/"), options


def _options(path: str, options: dict[str, Any], **names: str) -> dict[str, Any]:
    """The options after ? as a reader's arguments. Raises UserError for one it does not have."""
    if wrong := sorted(options.keys() - names.keys()):
        have = ", ".join(names) or "none"
        raise UserError(f"data={path}: no option {wrong[0]} for this format; there are: {have}")
    return {names[key]: value for key, value in options.items()}


def _open_rlds(folder: Path, spec: DatasetSpec | None, options: dict[str, Any]) -> RldsSource:
    """By the spec given, else what we wrote into it, else the one of the dataset's name."""
    spec = spec or written_spec(folder) or RLDS_SPECS.get(dataset_name(folder))
    if spec is None:
        found = {key: str(leaf) for key, leaf in read_schema(folder).items()}
        raise needs_spec(folder, f"RLDS dataset {dataset_name(folder)!r}", found)
    return RldsSource(folder, spec, **options)


def _split_spec(path: str) -> tuple[str, DatasetSpec | None]:
    place, mark, name = path.rpartition("::")
    if not mark or Path(path).expanduser().exists():  # a path may hold :: of its own
        return path, None
    return place, CHOICES[name] if name in CHOICES else load_spec(name)


def _split_weight(spec: str) -> tuple[str, float]:
    path, at, text = spec.rpartition("@")
    if not at or Path(spec).expanduser().exists():  # a path may hold an @ of its own
        return spec, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = float("nan")
    if not (0 < weight < float("inf")):
        raise UserError(f"data={spec}: the weight after @ is {text!r}; give a number above 0")
    return path, weight
