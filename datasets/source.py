"""How a path becomes a source of episodes.

Readers: store.py, rlds.py, video.py. What they offer: episodes.py.
"""

from collections.abc import Sequence
from pathlib import Path

from selfflow.datasets.bridge import BRIDGE
from selfflow.datasets.episodes import EpisodeSource, Signals
from selfflow.datasets.fractal import FRACTAL
from selfflow.datasets.rlds import RldsSource, dataset_name, find_dataset
from selfflow.datasets.spec import UserError
from selfflow.datasets.store import EpisodeStore
from selfflow.datasets.video import VideoClip, is_mp4

__all__ = ["EpisodeSource", "Signals", "open_source", "open_sources"]

RLDS_SPECS = {
    "bridge_dataset": BRIDGE,
    "bridge_orig": BRIDGE,
    "fractal20220817_data": FRACTAL,
}
RECOGNISED = (
    "an episode store (a folder with store.json), "
    "an RLDS/TFDS dataset (a folder with features.json and *.tfrecord*), "
    "a video clip (an mp4 file)"
)


def open_source(path: str) -> EpisodeSource:
    """The reader for what lies at `path`, recognised by content.

    Raises UserError if there is nothing, or nothing recognised.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"data={path}: no such path; give {RECOGNISED}")
    if place.is_file():
        if is_mp4(place):
            return VideoClip(place)
    elif (place / "store.json").is_file():
        return EpisodeStore(place)
    else:
        folder = find_dataset(place)
        if folder is not None:
            return _open_rlds(folder)
    raise UserError(f"data={path}: not recognised; give {RECOGNISED}")


def open_sources(specs: Sequence[str]) -> tuple[list[EpisodeSource], list[float]]:
    """Sources and sampling weights of "path" or "path@weight" (weight 1.0 where none is given)."""
    if not specs:
        raise UserError(f"data=[]: no data; give one or more paths, each {RECOGNISED}")
    parts = [_split_weight(spec) for spec in specs]
    return [open_source(path) for path, _ in parts], [weight for _, weight in parts]


def _open_rlds(folder: Path) -> RldsSource:
    name = dataset_name(folder)
    if name not in RLDS_SPECS:
        raise UserError(
            f"{folder}: no reader for RLDS dataset {name!r}; have {', '.join(RLDS_SPECS)}"
        )
    return RldsSource(folder, RLDS_SPECS[name])


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
