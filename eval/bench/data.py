"""python eval/bench/data.py   (some minutes; tfds_python=PYTHON for TFDS beside ours)

What a frame costs from every kind of storage: processor milliseconds, user and system, of this
process and its loading processes together, in random windows of 16 frames through the training
loader; with 0, 1 and 2 workers. All sides take turns in one run, so that other work on the machine
disturbs them alike; the table shows medians. The bars hold without workers, on an idle core.
"""

import io
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfflow.configs.entry import launch
from selfflow.datasets.convert import ConvertConfig, convert
from selfflow.datasets.lerobot_writer import write_lerobot
from selfflow.datasets.loading import prefetch
from selfflow.datasets.rlds_writer import NAME, VERSION
from selfflow.datasets.source import open_source, open_sources
from selfflow.datasets.spec import UserError
from selfflow.datasets.synthetic import write_fractal
from selfflow.datasets.windows import Mixture, WindowSpec

FRAMES, SIZE = 16, 4  # of a window; windows of a batch
FULL, SMALL = (256, 320), (128, 160)
LEAST = 1.0  # s that each side is timed for: children's time comes in steps of 10 ms
START_BAR = 2.0  # s
EACH_SHARD = 2  # episodes, of which the start's dataset has few steps

# Two ways of TFDS: its nested steps one by one, and in blocks of 512 (which is its fast way).
TFDS = """
import json, os, resource, sys, time
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf
import tensorflow_datasets as tfds

tf.config.threading.set_inter_op_parallelism_threads(1)
tf.config.threading.set_intra_op_parallelism_threads(1)
folder, wanted = sys.argv[1], int(sys.argv[2])

def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

def timed(block):
    data = tfds.builder_from_directory(folder).as_dataset(split="train").repeat()
    steps = data.flat_map(lambda e: e["steps"].map(lambda s: s["observation"]["image"]))
    frames, used = 0, None
    for image in (steps.batch(block) if block else steps).as_numpy_iterator():
        if used is None:
            used = cpu()
            continue
        frames += block or 1
        if frames >= wanted:
            return 1000 * (cpu() - used) / frames

def nested():
    used, frames = None, 0
    for episode in tfds.builder_from_directory(folder).as_dataset(split="train").repeat():
        for step in tfds.as_numpy(episode["steps"]):
            used = cpu() if used is None else used
            frames += step["observation"]["image"].shape[-1] == 3
        if frames >= wanted:
            return 1000 * (cpu() - used) / frames

print(json.dumps({"nested steps, in order": nested(), "blocks of 512, in order": timed(512)}))
"""


@dataclass(frozen=True)
class BenchConfig:
    """Every key of configs/bench_data.yaml, which explains them."""

    data: str | None
    episodes: int
    steps: int
    batches: int
    rounds: int
    workers: list[int]
    shards: int
    tfds_python: str | None


@dataclass(frozen=True)
class Side:
    """One kind of storage: an entry of `data`, and the size that the loader hands out."""

    what: str
    data: str
    size: tuple[int, int]
    bar: float | None = None  # ms a frame


def check(config: BenchConfig) -> None:
    """Raises UserError for whatever can be wrong before work begins."""
    for key in ("episodes", "batches", "rounds", "shards"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)}: must be 1 or more")
    if config.steps < 2 or min(config.workers, default=-1) < 0:
        raise UserError("steps is at least 2, and workers are numbers from 0 on, e.g. [0,1,2]")
    if config.tfds_python and not Path(config.tfds_python).is_file():
        raise UserError(f"tfds_python={config.tfds_python}: no such program")


def main(config: BenchConfig) -> dict[str, dict[int, float]]:
    """Measures, prints the tables and returns ms a frame by side and number of workers."""
    console = Console() if Console().is_terminal else Console(width=100)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="selfflow-bench-") as name:
        folder = Path(name)
        rlds = config.data
        if rlds is None:
            shards = min(4, config.episodes)
            rlds = str(write_fractal(folder / "made_up", config.episodes, config.steps, shards))
        sides = prepared(rlds, folder)
        taken: dict[tuple[str, int], list[float]] = {}
        for n in range(config.rounds):
            console.print(f"round {n + 1} of {config.rounds}")
            for side in sides:
                for workers in config.workers:
                    ms = frame_ms(side, workers, config.batches)
                    taken.setdefault((side.what, workers), []).append(ms)
        theirs = tfds_ms(config, rlds)
        first, again = start_seconds(folder / "start", config.shards)
    found = {
        side.what: {n: statistics.median(taken[side.what, n]) for n in config.workers}
        for side in sides
    }
    console.print(table(sides, found, theirs, config.workers))
    if config.tfds_python is None:
        console.print("TFDS: not run; give tfds_python=PYTHON, one that has TensorFlow")
    verdict = "met" if again <= START_BAR else "MISSED"
    console.print(
        f"opening {config.shards} shards: {first:.2f} s the first time, {again:.2f} s with the "
        f"index kept (bar {START_BAR:g} s: {verdict})"
    )
    console.print(f"{os.cpu_count()} cores, load at the start {load:.1f}")
    return found


def prepared(rlds: str, folder: Path) -> list[Side]:
    """The same episodes in every kind of storage."""
    source = open_source(rlds)
    film = folder / "lerobot"
    write_lerobot(source, film)
    small = {frames: str(folder / frames) for frames in ("jpeg", "raw")}
    for frames, place in small.items():
        with redirect_stdout(io.StringIO()):  # its plan and progress
            convert(ConvertConfig(place, rlds, frames=frames, size=list(SMALL)))
    return [
        Side("TFRecord 256 x 320", rlds, FULL, 0.55),
        Side("TFRecord, shrunk to 128 x 160", rlds, SMALL),
        Side("JPEG blob 128 x 160", small["jpeg"], SMALL, 0.2),
        Side("mapped pixels 128 x 160", small["raw"], SMALL, 0.03),
        Side("LeRobot mp4 256 x 320", str(film), FULL),
    ]


def frame_ms(side: Side, workers: int, batches: int) -> float:
    """Processor milliseconds a frame, between one batch and another of an endless run."""
    sources, weights = open_sources([side.data])
    mixture = Mixture(sources, weights, WindowSpec(tuple(range(FRAMES)), 8, *side.size), seed=0)
    coming = prefetch(mixture, count(), SIZE, workers=workers, data=[side.data])
    for _ in range(2 + 2 * workers):  # files are open, and every worker is at work
        next(coming)
    done, until = 0, time.perf_counter() + LEAST
    with spent() as used:
        while done < batches or time.perf_counter() < until:
            next(coming)
            done += 1
    coming.close()
    return 1000 * used[0] / (done * SIZE * FRAMES)


@contextmanager
def spent() -> Iterator[list[float]]:
    """Appends the processor seconds of this process and its children when it ends."""
    used: list[float] = []
    began = processor_seconds()
    yield used
    used.append(processor_seconds() - began)


def processor_seconds() -> float:
    """User and system time of this process and of the children that live."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    total, tick = own.ru_utime + own.ru_stime, os.sysconf("SC_CLK_TCK")
    for pid in children():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick
    return total


def children() -> list[int]:
    """Processes that this one has started and that live."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if int(place.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(place.parent.name))
    return found


def start_seconds(folder: Path, shards: int) -> tuple[float, float]:
    """Seconds to open a dataset of so many shards, without its index and with it.

    The shards are one file under many names: what is timed is finding and knowing them.
    """
    place = write_fractal(folder / "one", EACH_SHARD, 10, 1)
    many = folder / NAME / VERSION
    many.mkdir(parents=True)
    for path in place.iterdir():
        if "tfrecord" not in path.name:
            (many / path.name).write_bytes(path.read_bytes())
            continue
        stem = path.name.split(".tfrecord")[0]
        for n in range(shards):
            os.link(path, many / f"{stem}.tfrecord-{n:05d}-of-{shards:05d}")
    times = []
    for _ in range(2):
        began = time.perf_counter()
        source = open_source(str(many))
        times.append(time.perf_counter() - began)
        if len(source) != EACH_SHARD * shards:
            raise AssertionError(f"{len(source)} episodes in {shards} shards")
    return times[0], times[1]


def tfds_ms(config: BenchConfig, rlds: str) -> dict[str, float]:
    """What the other interpreter measures of TFDS; nothing without one."""
    if config.tfds_python is None:
        return {}
    frames = config.batches * SIZE * FRAMES
    command = [config.tfds_python, "-c", TFDS, rlds, str(frames)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"tfds_python={config.tfds_python}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(
    sides: list[Side],
    found: dict[str, dict[int, float]],
    theirs: dict[str, float],
    workers: list[int],
) -> Table:
    """A row a side."""
    out = Table(title="processor ms a frame, windows of 16 frames", title_justify="left")
    out.add_column("storage")
    for n in workers:
        out.add_column(f"{n} worker{'s' * (n != 1)}", justify="right")
    for name in ("bar", ""):
        out.add_column(name)
    for side in sides:
        cells: list[Any] = [f"{found[side.what][n]:.3f}" for n in workers]
        alone = found[side.what].get(0)
        verdict = bar = ""
        if side.bar is not None:
            bar = f"≤ {side.bar:g}"
            verdict = "" if alone is None else "met" if alone <= side.bar else "MISSED"
        out.add_row(side.what, *cells, bar, verdict)
    for what, ms in theirs.items():
        out.add_row(f"TFDS 256 x 320, {what}", f"{ms:.3f}", *[""] * (len(workers) - 1), "", "")
    return out


if __name__ == "__main__":
    launch(BenchConfig, main, "bench_data", check)
