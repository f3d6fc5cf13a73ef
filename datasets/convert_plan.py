"""What a conversion will write: how large, for how long, and what the format has no place for."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from selfflow.datasets.amounts import in_units
from selfflow.datasets.blob import QUALITY, to_jpeg
from selfflow.datasets.cache_writer import Job, content, film, originals
from selfflow.datasets.episodes import EpisodeSource, Measures
from selfflow.datasets.fractal import FRACTAL, SCHEMA
from selfflow.datasets.lerobot_video import VideoFiles
from selfflow.datasets.lerobot_writer import VIDEO_PATH
from selfflow.datasets.rlds import RldsSource
from selfflow.datasets.rlds_writer import written_size
from selfflow.datasets.spec import UserError
from selfflow.datasets.windows import resize

EPISODES, FRAMES = 3, 16  # looked at: episodes evenly spread, steps of each


@dataclass(frozen=True)
class Estimate:
    """Of a whole conversion, from a few frames."""

    size: int  # bytes
    seconds: float  # of one process


def estimate_cache(source: EpisodeSource, job: Job) -> Estimate:
    """`job` without shards: what frames and arrays of some episodes take, times their number."""

    def write(i: int, steps: range) -> int:
        found = content(source, i, job.measures)
        arrays = [*found.arrays.values(), *found.privileged.values()]
        size = sum(array.nbytes for array in arrays) * len(steps) // source.length(i)
        for camera in job.header.cameras:
            for image in film(source, i, steps, camera, job):
                pixels = isinstance(image, np.ndarray)
                size += len(to_jpeg(image)) if pixels and not job.raw else image.nbytes
        return size

    return _extrapolated(source, write, job.skip_corrupt)


def estimate_rlds(source: EpisodeSource) -> Estimate:
    """Of RT-1's schema: one camera, as JPEG."""
    numbers = 4 * sum(int(np.prod(leaf.shape)) for leaf in SCHEMA.values() if leaf.shape[2:] == ())
    size = written_size(source.frames(0, [0])[0])

    def write(i: int, steps: range) -> int:
        source.signals(i)
        data = originals(source, i, steps, source.cameras[0], size)
        if data is None:
            data = [to_jpeg(resize(image, *size)) for image in source.frames(i, steps)]
        return sum(len(one) + numbers for one in data)

    return _extrapolated(source, write)


def estimate_lerobot(
    source: EpisodeSource, cameras: Sequence[str], codec: str, crf: int | None
) -> Estimate:
    """Of mp4 files."""
    rate = Fraction(source.embodiment.control_hz).limit_denominator(1001)

    def write(i: int, steps: range) -> int:
        source.signals(i)
        with tempfile.TemporaryDirectory() as folder:
            for camera in cameras:
                files = VideoFiles(Path(folder), VIDEO_PATH, camera, rate, codec, crf)
                files.begin()
                for image in source.frames(i, steps, camera):
                    files.add(image)
                files.close()
            return sum(p.stat().st_size for p in Path(folder).rglob("*.mp4")) + 100 * len(steps)

    return _extrapolated(source, write)


def form_of_frames(source: EpisodeSource, job: Job) -> str:
    """How a cache will hold the frames, and what the faster way would take."""
    camera, steps = job.header.cameras[0], sum(source.length(i) for i in range(len(source)))
    height, width = job.size or source.frames(0, [0], camera)[0].shape[:2]
    shape = f"{height}×{width}"
    if job.raw:
        return f"raw pixels of {shape}"
    pixels = in_units(height * width * 3 * steps * len(job.header.cameras))
    kept = originals(source, 0, [0], camera, job.size) is not None
    how = "JPEG data as they are" if kept else f"JPEG of quality {QUALITY}"
    return f"{how}, {shape} (frames=raw, faster to read, would take {pixels})"


def left_behind(source: EpisodeSource, form: str, cameras: Sequence[str]) -> list[str]:
    """What of the source the format will not hold, or not exactly, in words."""
    if form == "rlds" and is_rt1(source):
        return []
    measures = ", ".join(source.measures) if isinstance(source, Measures) else ""
    lost = [f"measured arrays ({measures})"] if measures and form != "cache" else []
    others = [name for name in source.cameras if name not in cameras]
    lost += [f"cameras {', '.join(others)}"] if others else []
    if form == "lerobot":
        lost.append("exact pixels: frames become mp4")
    if form == "rlds":
        lost.append(
            "which actions and poses are valid; gripper targets between open and closed; success "
            "where it is not known (RT-1's schema: datasets/fractal.py)"
        )
    return lost


def is_rt1(source: EpisodeSource) -> bool:
    """Whether these are RT-1's own episodes, which write_rlds copies whole."""
    return isinstance(source, RldsSource) and source.spec.numbers == FRACTAL.numbers


def _extrapolated(
    source: EpisodeSource, write: Callable[[int, range], int], skip_corrupt: bool = False
) -> Estimate:
    """`write` makes what a part of an episode will be, and returns its bytes."""
    steps = [source.length(i) for i in range(len(source))]
    seen = size = 0
    began = time.perf_counter()
    for i, part in _samples(steps):
        try:
            size += write(i, part)
            seen += len(part)
        except UserError:
            if not skip_corrupt:
                raise
    factor = sum(steps) / max(seen, 1)
    return Estimate(round(size * factor), (time.perf_counter() - began) * factor)


def _samples(lengths: Sequence[int]) -> Iterator[tuple[int, range]]:
    chosen = np.unique(np.linspace(0, len(lengths) - 1, EPISODES).round().astype(int))
    for i in chosen.tolist():
        yield i, range(min(FRAMES, lengths[i]))
