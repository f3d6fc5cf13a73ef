"""Any source as an episode store for training: frames at the model's size, all the rest as it is.

A shard holds a contiguous part of the episodes and is written by one process, episode by episode,
so how far it got is told by what it holds: whatever stops the writing, the next run goes on there.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.queues import SimpleQueue
from typing import Any, Protocol, runtime_checkable

import numpy as np
import simplejpeg
from jaxtyping import UInt8

from selfflow.datasets.episodes import EpisodeSource, Measures
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import EMBODIMENTS, UserError
from selfflow.datasets.store import Content, EpisodeStore, StoreHeader, StoreWriter
from selfflow.datasets.view import View
from selfflow.datasets.windows import resize

SHARD_BYTES = 1 << 30  # of a shard, about
BLOCK = 16  # frames held at once
Size = tuple[int, int] | None  # height, width; None: as they are


@runtime_checkable
class Encoded(Protocol):
    """A source that can give its frames as they are in the file."""

    def encoded(
        self, i: int, steps: Sequence[int], camera: str | None = None
    ) -> list[memoryview] | None: ...


@dataclass(frozen=True)
class Job:
    """What is written where, in words that another process understands."""

    source: str  # an entry of `data`
    folder: str
    header: StoreHeader
    measures: tuple[str, ...]
    size: Size
    raw: bool  # pixels, not JPEG
    skip_corrupt: bool
    shards: tuple[tuple[int, int], ...]  # the first episode, and the one behind the last


def header_of(source: EpisodeSource, cameras: tuple[str, ...], size: Size) -> StoreHeader:
    """The header of a store that holds this source's episodes."""
    robot, origin = source.embodiment, source.source if isinstance(source, View) else source
    if isinstance(origin, EpisodeStore):
        old = origin.header
        values = {name: getattr(old, name) for name in ("task", "backend", "placement")}
        size = size or (old.image_size if origin is source else None)
        photographs = old.photographs
    else:
        values = {"task": source.name, "backend": "converted", "placement": "unknown"}
        photographs = ()
    known = EMBODIMENTS.get(robot.name) == robot
    robots = {"embodiment": robot.name, "robot": None if known else robot}
    return StoreHeader(
        cameras=cameras, image_size=size, photographs=photographs, **values, **robots
    )


def partition(lengths: Sequence[int], size: int, workers: int) -> tuple[tuple[int, int], ...]:
    """Shards of about SHARD_BYTES and of about as many steps each, for these many bytes in all."""
    count = min(len(lengths), max(workers, -(-size // SHARD_BYTES)))
    ends = np.cumsum(lengths)
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count) + 1
    bounds = np.unique([0, *cuts, len(lengths)]).tolist()
    return tuple(pairwise(bounds))


def write_cache(
    job: Job, source: EpisodeSource, workers: int, advance: Callable[[int], None]
) -> None:
    """Writes what is not written yet; `advance` is told of every so many steps done.

    Raises UserError, with what a process said that failed, or that one was killed.
    """
    if workers == 1 or len(job.shards) == 1:
        for number in range(len(job.shards)):
            for steps in write_shard(job, source, number):
                advance(steps)
        return
    context = multiprocessing.get_context("spawn")
    done, errors = context.Value("q", 0), context.SimpleQueue()
    numbers = range(len(job.shards))
    processes = [
        context.Process(target=_work, args=(job, numbers[k::workers], done, errors), daemon=True)
        for k in range(min(workers, len(job.shards)))
    ]
    shown = 0
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            for process in processes:
                process.join(0.1)
            advance(done.value - shown)
            shown = done.value
            _check(processes, errors)
        advance(done.value - shown)
        _check(processes, errors)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()


def write_shard(job: Job, source: EpisodeSource, number: int) -> Iterator[int]:
    """Writes the rest of a shard; yields the steps of every episode, also of those there before."""
    first, stop = job.shards[number]
    with StoreWriter(job.folder, f"{number:05d}", job.header) as writer:
        begun = first + writer.held
        yield sum(source.length(i) for i in range(first, begun))
        for i in range(begun, stop):
            try:
                write_episode(job, source, i, writer)
            except UserError as e:
                if not job.skip_corrupt:
                    raise
                writer.note_failure(i, str(e))
            yield source.length(i)


def write_episode(job: Job, source: EpisodeSource, i: int, writer: StoreWriter) -> None:
    """Appends one episode."""
    images = {c: film(source, i, range(source.length(i)), c, job) for c in job.header.cameras}
    writer.write(images, content(source, i, job.measures), job.raw)


def film(
    source: EpisodeSource, i: int, steps: range, camera: str, job: Job
) -> Iterator[UInt8[np.ndarray, "_ _ 3"] | memoryview]:
    """Frames of an episode as they will be written: JPEG data of the source where it has the size
    that is wanted, else pixels of that size."""
    for first in range(0, len(steps), BLOCK):
        block = steps[first : first + BLOCK]
        data = None if job.raw else originals(source, i, block, camera, job.size)
        if data is not None:
            yield from data
            continue
        for image in source.frames(i, block, camera):
            yield image if job.size is None else resize(image, *job.size)


def originals(
    source: EpisodeSource, i: int, steps: Sequence[int], camera: str, size: Size
) -> list[memoryview] | None:
    """JPEG data of the source itself, of this size; None where it has none."""
    data = source.encoded(i, steps, camera) if isinstance(source, Encoded) else None
    if data is None or not all(_is_jpeg(one, size) for one in data):
        return None
    return data


def content(source: EpisodeSource, i: int, measures: Sequence[str]) -> Content:
    """All of an episode but its frames."""
    measured = {}
    if isinstance(source, Measures):
        found = {key: source.measured(i, key) for key in measures}
        measured = {key: array for key, array in found.items() if array is not None}
    if isinstance(source, EpisodeStore):
        known = source.content(i)
        return Content(known.arrays, known.instruction, measured, known.values)
    signals, about = source.signals(i), source.metadata(i)
    names = ("proprio", "proprio_valid", "actions", "action_valid", "terminate")
    values: dict[str, Any] = {key: about.get(key) for key in ("seed", "success")}
    values |= {"draws": {}, "meta": {}, "about": about}
    arrays = {name: getattr(signals, name) for name in names}
    return Content(arrays, signals.instruction, measured, values)


def _is_jpeg(data: memoryview, size: Size) -> bool:
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    return size is None or (height, width) == size


def _work(job: Job, numbers: Sequence[int], done: Any, errors: "SimpleQueue[str]") -> None:
    """A process's part; ends with its parent, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    try:
        ((source,), _) = open_sources([job.source])
        for number in numbers:
            for steps in write_shard(job, source, number):
                with done.get_lock():
                    done.value += steps
    except UserError as e:
        errors.put(str(e))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _leave_with(parent: Any) -> None:
    parent.join()
    os._exit(1)  # what is half written has no line in the index, and is written anew


def _check(processes: Sequence[Any], errors: "SimpleQueue[str]") -> None:
    """Raises UserError if a process failed."""
    if not errors.empty():
        raise UserError(errors.get())
    failed = [p.exitcode for p in processes if p.exitcode]
    if failed:
        raise UserError(
            f"a process ended with status {failed[0]} (above: why; -9: killed, memory may be "
            "short: fewer workers); the same command goes on"
        )
