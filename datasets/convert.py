"""python datasets/convert.py source=my_data::my_robot.yaml out=data/my_cache size=[128,160]

Any source of episodes as another format: the training cache (an episode store), LeRobot or RLDS.
First it says how large the result will be, for how long it will work, and what the format has no
place for. The folder appears when it is whole, with checksums. Stop a cache or RLDS as you like:
the same command goes on; LeRobot begins anew. Every key is explained in configs/convert.yaml.

    python datasets/convert.py out=data/my_cache verify=true      # are the files as written?
"""

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfflow.configs.entry import launch, one_of
from selfflow.datasets.amounts import in_time, in_units
from selfflow.datasets.cache_writer import Job, Size, header_of, partition, write_cache
from selfflow.datasets.checksums import size_of, verify, write_checksums
from selfflow.datasets.convert_plan import (
    Estimate,
    estimate_cache,
    estimate_lerobot,
    estimate_rlds,
    form_of_frames,
    left_behind,
)
from selfflow.datasets.episodes import EpisodeSource, Measures, check_camera
from selfflow.datasets.lerobot_video import CODECS
from selfflow.datasets.lerobot_writer import write_lerobot
from selfflow.datasets.rlds_writer import write_rlds
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import UserError
from selfflow.datasets.store import EpisodeStore
from selfflow.datasets.view import View

FORMATS = ("cache", "lerobot", "rlds")
PLAN = "plan.json"  # of a folder in the making
CACHE_ONLY = {"frames": "jpeg", "size": None, "measures": None, "workers": 1, "skip_corrupt": False}


@dataclass(frozen=True)
class ConvertConfig:
    """Keys are explained in configs/convert.yaml."""

    out: str
    source: str | None = None
    format: str = "cache"
    frames: str = "jpeg"
    size: Any = None
    cameras: Any = None
    measures: Any = None
    codec: str = "h264"
    crf: int | None = None
    workers: int = 1
    skip_corrupt: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        if self.format == "latents":
            raise ValueError(
                "format=latents: convert to a cache, then python worldmodel/encode.py "
                "data=[CACHE] out=LATENTS"
            )
        one_of("format", self.format, FORMATS)
        one_of("frames", self.frames, ("jpeg", "raw"))
        one_of("codec", self.codec, CODECS)
        if self.workers < 1:
            raise ValueError(f"workers={self.workers}: give at least 1")
        self.pixels()
        for key, value in CACHE_ONLY.items():
            if self.format != "cache" and getattr(self, key) != value:
                raise ValueError(f"{key}={getattr(self, key)}: is for format=cache only")

    def pixels(self) -> Size:
        """`size` as (height, width)."""
        if self.size is None:
            return None
        whole = isinstance(self.size, list | tuple) and all(
            isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in self.size
        )
        if not whole or len(self.size) != 2:
            raise ValueError(f"size={self.size}: give [height, width], or null")
        return self.size[0], self.size[1]


def check(config: ConvertConfig) -> None:
    """Raises UserError for what can be known before anything is read or written."""
    there = Path(config.out).expanduser().exists()
    if there and not config.verify:
        raise UserError(f"out={config.out}: exists; give a new folder, or verify=true to check it")
    if config.source is None and not there:
        raise UserError("source=... is required")


def main(config: ConvertConfig) -> None:
    """Converts, or verifies what is there."""
    out = Path(config.out).expanduser()
    if not out.exists():
        convert(config)
    if config.verify:
        print(f"verified: {in_units(verify(out))} in {out} are as they were written")


def convert(config: ConvertConfig) -> Path:
    """Writes `out`, which must not be there, after saying what it will be; returns its path."""
    check(config)
    ((source,), _) = open_sources([str(config.source)])
    if len(source) == 0:
        raise UserError(f"source={config.source}: no episode ({source.skipped} left out)")
    cameras = _cameras(config, source)
    job = _job(config, source, cameras)
    out = Path(config.out).expanduser()
    estimate = _estimate(config, source, job)
    _announce(config, source, job, estimate)
    _check_space(out, estimate)
    with _draft(out, _plan(config, source, job, estimate)) as (draft, plan):
        place = draft / "data"
        if config.format == "cache":
            shards = tuple((first, stop) for first, stop in plan["shards"])
            _write_cache(replace(job, folder=str(place), shards=shards), source, config.workers)
        elif config.format == "lerobot":
            shutil.rmtree(place, ignore_errors=True)
            write_lerobot(source, place, config.codec, config.crf, cameras)
        else:
            _write_rlds(source, cameras[0], place)
        write_checksums(place)
        os.replace(place, out)
    _report(config, out)
    return out


def _report(config: ConvertConfig, out: Path) -> None:
    """Says where it lies and what it is for."""
    if config.format == "cache":
        store = EpisodeStore(out)
        for i, reason in store.failures.items():
            print(f"left out: episode {i}: {reason}")
        print(f"episodes: {len(store)} written, {len(store.failures)} left out")
    print(f"wrote {in_units(size_of(out))}: {out}; train with data=[{out}]")


def _job(config: ConvertConfig, source: EpisodeSource, cameras: tuple[str, ...]) -> Job:
    """Of a cache, without folder and shards."""
    have = source.measures if isinstance(source, Measures) else ()
    wanted = have if config.measures is None else tuple(map(str, config.measures))
    for key in wanted:
        one_of("measures", key, have)
    return Job(
        source=str(config.source),
        folder="",
        header=header_of(source, cameras, config.pixels()),
        measures=tuple(wanted),
        size=config.pixels(),
        raw=config.frames == "raw",
        skip_corrupt=config.skip_corrupt,
        shards=(),
    )


def _cameras(config: ConvertConfig, source: EpisodeSource) -> tuple[str, ...]:
    """Those asked for; of RLDS the first of them."""
    given = [config.cameras] if isinstance(config.cameras, str) else config.cameras
    names = tuple(source.cameras if given is None else map(str, given))
    for name in names:
        check_camera(name, source.cameras, source.name)
    if not names:
        raise UserError(f"cameras=[]: {source.name} has {', '.join(source.cameras)}")
    if config.format == "rlds":
        if given is not None and len(names) > 1:
            raise UserError(f"cameras={list(names)}: RT-1's schema has one camera; give one")
        return names[:1]
    return names


def _estimate(config: ConvertConfig, source: EpisodeSource, job: Job) -> Estimate:
    if config.format == "cache":
        return estimate_cache(source, job)
    if config.format == "lerobot":
        return estimate_lerobot(source, job.header.cameras, config.codec, config.crf)
    return estimate_rlds(source)


def _announce(config: ConvertConfig, source: EpisodeSource, job: Job, estimate: Estimate) -> None:
    """Prints what will be done."""
    steps = sum(source.length(i) for i in range(len(source)))
    robot, cameras = source.embodiment, job.header.cameras
    print(
        f"from {source.name}: {robot.name} at {robot.control_hz:g} Hz, {len(source)} episodes, "
        f"{steps} steps, cameras {', '.join(source.cameras)}; {source.skipped} records left out"
    )
    what = {"lerobot": "LeRobotDataset v3.0", "rlds": "RLDS in RT-1's schema"}
    form = what.get(config.format) or f"cache, {form_of_frames(source, job)}"
    print(f"to {config.out}: {form}; cameras {', '.join(cameras)}")
    seconds = estimate.seconds / (config.workers if config.format == "cache" else 1)
    print(
        f"about {in_units(estimate.size)} and {in_time(seconds)} with {config.workers} "
        f"process{'es' * (config.workers > 1)}, by a few frames; "
        f"{in_units(_free(Path(config.out).expanduser()))} are free"
    )
    for lost in left_behind(source, config.format, cameras):
        print(f"not carried: {lost}")
    if config.format == "cache":
        print(f"latents of it, if wanted: python worldmodel/encode.py data=[{config.out}]")


def _free(out: Path) -> int:
    """Bytes that `out` may have: what is free, and what a run that was stopped has of it."""
    parent = next(path for path in out.absolute().parents if path.exists())
    return shutil.disk_usage(parent).free + size_of(_draft_of(out))


def _check_space(out: Path, estimate: Estimate) -> None:
    """Raises UserError if it will not fit."""
    if estimate.size > _free(out):
        raise UserError(
            f"out={out}: about {in_units(estimate.size)} are wanted, {in_units(_free(out))} are "
            "free; give another out, a smaller size, or frames=jpeg"
        )


def _draft_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.part")


def _plan(
    config: ConvertConfig, source: EpisodeSource, job: Job, estimate: Estimate
) -> dict[str, Any]:
    """What the work is, to go on with no other, and how it is divided."""
    lengths = [source.length(i) for i in range(len(source))]
    keys = ("format", "frames", "codec", "crf", "skip_corrupt")
    same = {key: getattr(config, key) for key in keys}
    same |= {"source": source.name, "episodes": len(lengths), "steps": sum(lengths)}
    same |= {"size": job.size, "cameras": job.header.cameras, "measures": job.measures}
    same |= {"signals_by_the_spec": _fingerprint(source)}  # it may be corrected in between
    shards = partition(lengths, estimate.size, config.workers)
    return json.loads(json.dumps({"same": same, "shards": shards}))


def _fingerprint(source: EpisodeSource) -> str:
    """Of the signals of the middle episode; empty where they cannot be read."""
    try:
        signals = source.signals(len(source) // 2)
    except UserError:  # with skip_corrupt that episode is left out
        return ""
    parts = (signals.proprio, signals.actions, signals.terminate)
    return f"{zlib.crc32(b''.join(part.tobytes() for part in parts)):08x}"


def _write_rlds(source: EpisodeSource, camera: str, place: Path) -> None:
    if any(place.glob("*/[!.]*/features.json")):  # whole, but a run was stopped before its end
        return
    one = source if camera == source.cameras[0] else View(source, camera)
    for what, count in write_rlds(one, place).notes.items():
        print(f"note: {what}: {count}")


def _write_cache(job: Job, source: EpisodeSource, workers: int) -> None:
    columns = (TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        total = sum(source.length(i) for i in range(len(source)))
        task = bar.add_task("steps", total=total)
        write_cache(job, source, workers, lambda steps: bar.advance(task, steps))


@contextmanager
def _draft(out: Path, plan: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A hidden folder beside `out` to work in, and the plan that it was begun with; it goes when
    the work is done. Raises UserError if another process works there or it was begun otherwise."""
    draft = _draft_of(out)
    draft.mkdir(parents=True, exist_ok=True)
    with open(draft / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{draft}: another process is writing it") from None
        if (draft / PLAN).exists():
            begun = json.loads((draft / PLAN).read_text())
            if begun["same"] != plan["same"]:
                wrong = [k for k, v in plan["same"].items() if begun["same"].get(k) != v]
                listed = ", ".join(f"{k}={begun['same'].get(k)}" for k in wrong)
                raise UserError(f"{draft}: was begun with {listed}; go on so, or delete it")
            print("going on where it was stopped")
            plan = begun
        part = draft / f".{PLAN}"
        part.write_text(json.dumps(plan))
        os.replace(part, draft / PLAN)
        finished = False
        try:
            yield draft, plan
            finished = True
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on with {draft}")
            raise
        finally:
            if finished or plan["same"]["format"] == "lerobot":  # which begins anew
                shutil.rmtree(draft)


if __name__ == "__main__":
    launch(ConvertConfig, main, "convert", check=check)
