"""Batches ahead of the training loop: loaded in a thread, or in processes of their own.

`workers=0` decodes in this process, in one thread, which suits few frames a sample. With N workers
step n is loaded by process n % N, which decodes and shrinks, so that only what the model sees goes
through the pipe. Either way the batches are the same and in order, and an error comes where its
batch would have come.

A worker (load_worker.py) is a plain Python process: it reads lines of JSON, what to open and then
places, and writes for each a line of JSON and the arrays' bytes. It ends when its input does, so it
never outlives a killed run.
"""

import fcntl
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields
from itertools import count, islice
from typing import IO, Any

import numpy as np

from selfflow.datasets.episodes import EpisodeSource
from selfflow.datasets.spec import UserError
from selfflow.datasets.windows import Batch, Mixture, Place

AHEAD = 2  # batches a worker is asked for before the first is taken
PIPE_BYTES = 2**20
END_SECONDS = 10


def prefetch(
    mixture: Mixture,
    steps: Iterable[int],
    size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    data: Sequence[str] = (),
) -> Generator[Batch, None, None]:
    """Batches of these training steps, in order; coming ones load while one is in use.

    Workers open `data` anew, the entries that the mixture's sources were opened from. An error
    while loading is raised where its batch would have come.
    """
    asked = (mixture.places(step, size, rank, world) for step in steps)
    with ThreadPoolExecutor(1, "prefetch") as pool:  # ends last: what it waits for still comes
        if not workers:
            yield from _ahead(pool, mixture.load, asked)
            return
        with ExitStack() as stack:
            started = [stack.enter_context(Worker(mixture, data)) for _ in range(workers)]
            yield from _ahead(pool, Worker.take, _asked(started, asked))


def _ahead(pool: ThreadPoolExecutor, load: Any, wanted: Iterable[Any]) -> Iterator[Batch]:
    """load(what) of all that is wanted, in order, each while the one before is in use."""
    coming = None
    for what in wanted:
        ready, coming = coming, pool.submit(load, what)
        if ready is not None:
            yield ready.result()
    if coming is not None:
        yield coming.result()


def _asked(workers: list["Worker"], wanted: Iterator[list[Place]]) -> Iterator["Worker"]:
    """The worker to take the next batch from, after asking for AHEAD batches of each."""
    waiting: deque[Worker] = deque()
    for turn in count():
        for places in islice(wanted, 1 if turn else AHEAD * len(workers)):
            worker = workers[(turn + len(waiting)) % len(workers)]
            worker.ask(places)
            waiting.append(worker)
        if not waiting:
            return
        yield waiting.popleft()


class Worker:
    """A process that loads batches; a context that ends with it."""

    def __init__(self, mixture: Mixture, data: Sequence[str]) -> None:
        command = [sys.executable, "-P", "-m", "selfflow.datasets.load_worker"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the run, which then ends this one
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        with suppress(OSError):  # a user may have 64 MB of such pipes: some stay small
            fcntl.fcntl(self._from, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.pid = self._process.pid
        about = {"data": list(data), "amounts": amounts(mixture.sources)}
        self._write(about | {"spec": asdict(mixture.spec), "seed": mixture.seed})

    def ask(self, places: Sequence[Place]) -> None:
        """Asks for the batch at these places."""
        self._write(places)

    def take(self) -> Batch:
        """The batch asked for first. Raises the worker's UserError, or RuntimeError if it ended."""
        found = receive(self._from)
        if found is None:
            raise RuntimeError(
                f"a loading process ended with status {self._process.wait()}; what went wrong "
                "stands above; workers=0 loads in this process"
            )
        return found

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._from.close()
        with suppress(BrokenPipeError):  # of one that has ended
            self._to.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self, value: Any) -> None:
        with suppress(BrokenPipeError):  # it has ended; `take` says so in its turn
            self._to.write(json.dumps(value).encode() + b"\n")
            self._to.flush()


def amounts(sources: Sequence[EpisodeSource]) -> list[list[Any]]:
    """Name, episodes and steps of every source, by which a worker knows that it has the same."""
    return [[s.name, len(s), sum(s.length(i) for i in range(len(s)))] for s in sources]


def send(file: IO[bytes], batch: Batch) -> None:
    """Writes a batch: a line that says what follows, then the bytes of its arrays."""
    values = {f.name: getattr(batch, f.name) for f in fields(Batch)}
    arrays = [array for value in values.values() for array in _arrays(value)]
    file.write(json.dumps({k: _described(v) for k, v in values.items()}).encode() + b"\n")
    for array in arrays:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    file.flush()


def send_error(file: IO[bytes], error: UserError) -> None:
    """Writes an error in a batch's place."""
    file.write(json.dumps({"error": str(error)}).encode() + b"\n")
    file.flush()


def receive(file: IO[bytes]) -> Batch | None:
    """Reads what `send` wrote; None at the end. Raises UserError where one was sent."""
    line = file.readline()
    if not line.endswith(b"\n"):
        return None
    values = json.loads(line)
    if "error" in values:
        raise UserError(values["error"])
    made: dict[str, Any] = {name: _filled(value) for name, value in values.items()}
    made["ids"] = [tuple(place) for place in made["ids"]]
    for array in (array for value in made.values() for array in _arrays(value)):
        rest = array.reshape(-1).view(np.uint8).data
        while rest:
            got = file.readinto(rest)  # type: ignore[attr-defined]
            if not got:
                return None
            rest = rest[got:]
    return Batch(**made)


def _arrays(value: Any) -> list[np.ndarray]:
    values = value.values() if isinstance(value, dict) else [value]
    return [v for v in values if isinstance(v, np.ndarray)]


def _described(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "shape": value.shape}
    if isinstance(value, dict):
        return {"by_key": {k: _described(v) for k, v in value.items()}}
    return value


def _filled(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "by_key" in value:
        return {k: _filled(v) for k, v in value["by_key"].items()}
    return np.empty(value["shape"], value["dtype"])
