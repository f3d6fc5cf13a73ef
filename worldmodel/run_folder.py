"""A run's folder: who may train in it, what it logs, when it saves, and how it stops.

    out/config.json, log.jsonl, checkpoints/step-000500/ (checkpoint.py), tensorboard/, wandb/

All processes of a run go through the same calls; rank 0 alone holds the lock and writes.
"""

import fcntl
import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from selfflow.worldmodel import checkpoint, parallel, trackers
from selfflow.worldmodel.checkpoint import Weights
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.loop import LoopConfig, State

Amounts = dict[str, list[int]]  # source name -> [episodes, steps]
# keys that may differ when a run goes on: how long, how often, on what, by how many
FREE = {
    *("steps", "minutes", "threads", "save_every", "save_minutes", "save_async", "keep", "out"),
    *("log", "log_every", "peak_flops", "accumulate", "compile", "activation_checkpointing"),
    *("parallel", "shard_dtype", "dry_run", "mfu", "workers"),
    *("select_minutes", "select_episodes", "select_tasks", "select_command", "heldout"),
}
# keys that came after some runs had begun, where those did otherwise than the default now says
BEFORE = {"text_dropout": 0.0}
SATURATED = 0.9  # cosine that is suspicious before EARLY of the run
EARLY = 0.05


def check_run(config: LoopConfig) -> None:
    """Raises RunError if data is not given, there is no such device, the batch does not divide, a
    package is missing, or `out` is not for this run: another process is in it, or it holds a run
    of another config, or something else.

    A run without a checkpoint has nothing to lose: it may begin again with another config.
    """
    if not config.sources:
        raise RunError("data=: name at least one source, e.g. data=[data/demos@0.7,path/to/shard]")
    world = parallel.place(config.parallel, config.device)
    if world.share(config.batch) % config.accumulate:
        raise RunError(
            f"batch={config.batch} does not divide by {world.size} processes times "
            f"accumulate={config.accumulate}"
        )
    trackers.check(config.log)
    out = Path(config.out)
    path, saved = out / "config.json", checkpoint.last(out) is not None
    if (out / "model.safetensors").exists():
        raise RunError(f"out={config.out} is a checkpoint, not a run folder; choose another out")
    if world.main and (out / ".lock").exists():
        with _locked(out):
            pass
    if not path.exists() and not saved:
        return
    try:
        old = checkpoint.read_json(path)
    except checkpoint.CheckpointError as e:
        raise RunError(f"{e}; choose another out") from e
    if "lr" not in old:
        raise RunError(f"{path} is not a training run's; choose another out")
    new = _identity(config)
    # a key that came after the run began counts as what it did
    old = _completed(old, _identity(replace(type(config)(), data=config.data)))
    differ = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    if saved and differ:
        changes = ", ".join(f"{k} (was {old.get(k)}, now {new.get(k)})" for k in differ)
        raise RunError(
            f"out={config.out} holds a run of another config: {changes}; choose another out"
        )


def check_data(path: Path, now: Amounts) -> None:
    """Raises RunError if the checkpoint's run had other amounts of data; old ones do not say."""
    before = checkpoint.load_training_state(path).get("data")
    if not isinstance(before, dict):
        return
    for name in sorted(before.keys() | now.keys()):
        was, has = before.get(name, [0, 0]), now.get(name, [0, 0])
        if was != has:
            raise RunError(
                f"{name} has {has[0]} episodes of {has[1]} steps now, had {was[0]} of {was[1]}: "
                "resume needs the same data; choose another out"
            )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from training in it; the lock ends with ours."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
    except OSError as e:
        raise RunError(f"out={out} cannot be written ({e.strerror}); choose another out") from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise RunError(
                f"out={out}: another process trains in it; wait for it or choose another out"
            ) from e
        yield


@contextmanager
def open_run(
    config: LoopConfig,
    state: State,
    title: str,
    data: Amounts,
    flops_per_step: float | None = None,
) -> Iterator["Run"]:
    """A new or resumed run, its folder locked until the block is left. Nothing is written before.

    `flops_per_step` are the model's, of a whole step over all processes, for MFU. Raises RunError
    if another process has the folder, or `data` is not what a resumed run had.
    """
    with (
        _locked(Path(config.out)) if state.world.main else nullcontext(),
        ThreadPoolExecutor(1, "save") as thread,
    ):
        yield Run(config, state, title, data, flops_per_step, thread)


def _identity(config: LoopConfig) -> dict[str, Any]:
    values = asdict(config) | {"data": config.sources}
    return json.loads(json.dumps({k: v for k, v in values.items() if k not in FREE}))


def _completed(old: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """`old` without what may differ, and with what was done before of what it does not have."""
    filled = default | {k: v for k, v in BEFORE.items() if k in default}
    filled |= {k: v for k, v in old.items() if k not in FREE}
    for key, value in filled.items():
        if isinstance(value, dict) and isinstance(default.get(key), dict):
            filled[key] = default[key] | value
    return filled


class Run:
    """A run folder while processes work in it: log, checkpoints, stop signals.

    Made by `open_run`.
    """

    def __init__(
        self,
        config: LoopConfig,
        state: State,
        title: str,
        data: Amounts,
        flops_per_step: float | None,
        thread: ThreadPoolExecutor,
    ) -> None:
        self.config, self.state, self.title, self.data = config, state, title, data
        self.path, self.world = Path(config.out), state.world
        self._flops, self._peak = flops_per_step, _peak(config, state.world)
        found = checkpoint.last(self.path)
        step = self.world.first(checkpoint.step_of(found) if found else -1)
        self.resumed = checkpoint.folder(self.path, step) if step >= 0 else None
        if self.resumed:
            check_data(self.resumed, data)
            state.restore(self.resumed)
        if self.world.main:
            checkpoint.write_json(self.path / "config.json", _identity(config))
            (self.path / "checkpoints").mkdir(exist_ok=True)
            checkpoint.prune(self.path, config.keep)
        self.interrupted = self._queue_again = self._late = False
        self._saved_at = self._started = time.monotonic()
        self._saved_step = state.step if self.resumed else -1
        self._thread, self._saving = thread, None
        self._trackers: list[trackers.Tracker] = []
        self._warned = False

    def batches(self, source: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(step, batch) until the run is over; measures the wait for data."""
        iterator = iter(source)
        stops = [signal.SIGINT, signal.SIGTERM]
        if callable(signal.getsignal(signal.SIGUSR2)):
            stops.append(signal.SIGUSR2)
        before = {number: signal.signal(number, self._interrupt) for number in stops}
        try:
            if self.world.main:
                self._trackers = self._open_trackers()
            while self.state.step < self.config.steps and not self._over():
                self._asked = time.monotonic()
                batch = next(iterator)
                self._got = time.monotonic()
                yield self.state.step, batch
        finally:
            for tracker in self._trackers:
                tracker.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def log(self, size: int, tokens: int | None = None, **values: Any) -> None:
        """After an update that took `size` samples and `tokens` tokens over all processes."""
        if not self.world.main:
            return
        seconds, step = time.monotonic() - self._asked, self.state.step
        row: dict[str, Any] = {k: float(torch.as_tensor(v).detach()) for k, v in values.items()}
        row |= {
            "lr": self.config.lr_at(step - 1),
            "skipped": self.state.skipped,
            "samples_per_s": round(size / seconds, 2),
            "data_wait_s": round(self._got - self._asked, 4),
        }
        if tokens is not None:
            row["tokens_per_s"] = round(tokens / seconds, 1)
        if self._flops and self._peak:
            row["mfu"] = round(self._flops / seconds / self._peak / self.world.size, 4)
        if not self._warned and row.get("cosine", 0.0) > SATURATED and self._early(step):
            self._warned = True
            row["warning"] = (
                f"cosine {row['cosine']:.2f} at step {step}, before {EARLY:.0%} of the run: the "
                "student's features already predict the teacher's, so that distillation teaches "
                "little more; third parties met it without a gain (docs/self_flow.md)"
            )
        for tracker in self._trackers:
            always = isinstance(tracker, trackers.Console) or "warning" in row
            if always or step % self.config.log_every == 0:
                tracker.track(row, step)

    def due(self) -> bool:
        """Whether a checkpoint should be saved now; the same on all processes."""
        return self.state.step % self.config.save_every == 0 or self._late

    def save(
        self,
        config: dict[str, Any],
        statistics: dict[str, Any],
        usable: Callable[[Weights], Weights] | None = None,
    ) -> None:
        """Saves a checkpoint of the present step unless there is one; `usable` makes the weights
        that a user loads of the moving average, where they are others."""
        if self._saved_step == self.state.step:
            return
        self._wait()  # for the one before, so that one at most is under way
        training = self.state.training()
        minutes = (time.monotonic() - self._started) / 60
        training.state.update(minutes_this_sitting=round(minutes, 2), data=self.data)
        provenance = config.get("provenance", {}) | {"step": self.state.step}
        model = parallel.gather(training.average, keep=self.world.main)
        model = usable(model) if usable else model
        if self.config.save_async and self.world.device.type == "cpu":
            model = parallel.snapshot(model)  # else they are the tensors that training changes
        arguments = (
            *(self.path, model, config | {"provenance": provenance}, statistics),
            *(self._copied(training), self.config.export, self.config.keep, self.world),
        )
        if self.config.save_async:
            self._saving = self._thread.submit(checkpoint.save, *arguments)
        else:
            checkpoint.save(*arguments)
        self._saved_at, self._saved_step, self._late = time.monotonic(), self.state.step, False

    def finish(self) -> None:
        """Says where things lie; raises KeyboardInterrupt if the run was stopped by a signal.

        Where submitit says by SIGUSR2 that a SLURM job's time is over, its own handler comes after
        the save: it queues the job again.
        """
        self._wait()
        skipped = f", {self.state.skipped} skipped" if self.state.skipped else ""
        print(
            f"step {self.state.step} of {self.config.steps}, {self.state.samples} samples{skipped}"
        )
        print(f"checkpoint: {checkpoint.last(self.path)}\nlog: {self.path / 'log.jsonl'}")
        if self._queue_again:
            signal.raise_signal(signal.SIGUSR2)
        elif self.interrupted:
            raise KeyboardInterrupt

    def _copied(self, training: checkpoint.Training) -> checkpoint.Training:
        """What a thread can write while the next steps change the originals."""
        needed = self.world.main or parallel.has_shards(training.student)
        if not (self.config.save_async and needed):
            return training
        return checkpoint.Training(
            parallel.snapshot(training.average),
            parallel.snapshot(training.student),
            parallel.snapshot(training.optimizer),
            training.state,
        )

    def _wait(self) -> None:
        """For a checkpoint that is being written; raises what went wrong."""
        saving: Future | None = self._saving
        self._saving = None
        if saving is not None:
            saving.result()

    def _over(self) -> bool:
        """Whether to stop; agreed on by all processes, as is whether to save after this step."""
        now = time.monotonic()
        out_of_time = 0 < self.config.minutes < (now - self._started) / 60
        late = (now - self._saved_at) / 60 > self.config.save_minutes
        self.interrupted, self._queue_again, out_of_time, self._late = self.world.any(
            self.interrupted, self._queue_again, out_of_time, late
        )
        return self.interrupted or out_of_time

    def _interrupt(self, number: int, frame: Any) -> None:
        self.interrupted = True
        self._queue_again |= number == signal.SIGUSR2
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def _early(self, step: int) -> bool:
        return step < EARLY * self.config.steps

    def _open_trackers(self) -> list[trackers.Tracker]:
        config, step = self.config, self.state.step
        found = trackers.open_trackers(config.log, self.path, _identity(config), step)
        return [*found, trackers.Console(self.title, config.steps, step)]


def _peak(config: LoopConfig, world: parallel.World) -> float | None:
    """FLOP/s of one device, if known."""
    if config.peak_flops:
        return config.peak_flops
    if world.device.type != "cuda":
        return None
    return trackers.peak_flops(torch.cuda.get_device_name(world.device))
