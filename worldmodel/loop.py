"""What every training script needs around its loop: the state, one update, the run folder.

A script stays a plain loop: get a batch, compute a loss, `State.update`, `Run.log`, `Run.save`.
Nothing random is kept between steps (`generator(seed, step)`), so the step number is the whole
random state and a resumed run repeats an uninterrupted one to the bit.
"""

import copy
import fcntl
import hashlib
import json
import math
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from selfflow.worldmodel import checkpoint, ema
from selfflow.worldmodel.checkpoint import RunError, Training

SKIP_LIMIT = 10  # non-finite steps in a row before a run stops
TELL_SECONDS = 30.0  # between plain lines where there is no terminal for a progress bar
Amounts = dict[str, list[int]]  # source name -> [episodes, steps]
# keys that may differ when a run goes on: how long, how often, how many threads
FREE = {"steps", "minutes", "threads", "save_every", "save_minutes", "log_every", "keep", "out"}


@dataclass(frozen=True)
class LoopConfig:
    """What pretraining and fine-tuning have in common."""

    data: Any = field(default_factory=list)  # path or path@weight, or a list of them
    out: str = "outputs/run"  # run folder; the same command goes on where it stopped
    steps: int = 5000  # length of the run and of the learning-rate schedule
    minutes: float = 0.0  # stop earlier, after so many minutes of this sitting; 0: never
    batch: int = 64  # samples a step
    lr: float = 3e-4
    warmup: int = 200  # steps
    schedule: str = "cosine"  # after warm-up: cosine to a tenth, or constant
    weight_decay: float = 0.0
    clip: float = 1.0  # gradient norm
    ema: float = 0.9999
    ema_warmup: bool = True  # min(ema, (1 + n) / (10 + n))
    precision: str = "bf16"  # autocast, or fp32
    device: str = "auto"  # cpu, cuda, cuda:N, or auto: cuda where there is one
    threads: int = 0  # of torch; 0: as many as torch likes
    seed: int = 0
    save_every: int = 500  # steps
    save_minutes: float = 10.0
    keep: int = 2  # checkpoints
    log_every: int = 1  # steps
    export: str = "float32"  # dtype of model.safetensors, or float16

    def __post_init__(self) -> None:
        _choose("schedule", self.schedule, ("cosine", "constant"))
        _choose("precision", self.precision, ("bf16", "fp32"))
        _choose("export", self.export, tuple(checkpoint.DTYPES))
        if min(self.steps, self.batch, self.save_every, self.keep, self.log_every) < 1:
            raise ValueError("steps, batch, save_every, keep and log_every are at least 1")
        for name in ("seed", "threads", "minutes", "save_minutes", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device={self.device}: choose one of auto, cpu, cuda, cuda:N")
        if not (self.lr > 0 and self.clip > 0 and self.warmup >= 0 and 0 <= self.ema < 1):
            raise ValueError("lr and clip must be positive, warmup >= 0, ema in 0 .. 1")

    @property
    def sources(self) -> list[str]:
        """`data` as a list of strings."""
        return [self.data] if isinstance(self.data, str) else [str(item) for item in self.data]

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that makes step + 1; depends on nothing else."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value}: choose one of {', '.join(choices)}")


def generator(seed: int, step: int, stream: str = "noise") -> torch.Generator:
    """The random numbers of one step, the same whenever it is run."""
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def device_of(config: LoopConfig) -> torch.device:
    """The device to train on. Raises RunError if this machine has none such."""
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "auto":
        return torch.device("cuda" if have else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and (device.index or 0) >= have:
        raise RunError(f"device={config.device}: torch finds {have} CUDA devices; device=cpu works")
    return device


def start(config: LoopConfig) -> torch.device:
    """Threads, initialisation seed, device. Raises RunError if there is no such device."""
    device = device_of(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    return device


Model = TypeVar("Model", bound=nn.Module)


class State(Generic[Model]):
    """Everything that training changes."""

    def __init__(self, student: Model, config: LoopConfig) -> None:
        self.student, self.config = student, config
        self.average = copy.deepcopy(student).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            student.parameters(), config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.step = self.samples = self.skipped = self.skipped_in_row = 0

    def update(self, loss: Tensor, size: int, ids: Any = None) -> float:
        """One optimiser step and one of the moving average; returns the gradient norm.

        Where loss or gradient is not finite the weights stay, and the step is counted as skipped.
        Raises RunError with the batch's ids after SKIP_LIMIT in a row.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = list(self.student.parameters())
        norm = float(nn.utils.clip_grad_norm_(parameters, self.config.clip))
        if math.isfinite(norm) and math.isfinite(float(loss.detach())):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr_at(self.step)
            self.optimizer.step()
            decay = ema.decay_at(self.step, self.config.ema, self.config.ema_warmup)
            ema.update(self.average, self.student, decay)
            self.skipped_in_row = 0
        else:
            self.skipped += 1
            self.skipped_in_row += 1
            if self.skipped_in_row >= SKIP_LIMIT:
                raise RunError(
                    f"step {self.step}: {SKIP_LIMIT} non-finite losses in a row; last batch: {ids}"
                )
        self.step += 1
        self.samples += size
        return norm

    def training(self) -> Training:
        """For a checkpoint."""
        counters = {name: getattr(self, name) for name in checkpoint.COUNTERS}
        return Training(
            self.average.state_dict(),
            self.student.state_dict(),
            checkpoint.optimizer_tensors(self.optimizer, self.student),
            counters | {"seed": self.config.seed},
        )

    def restore(self, path: Path) -> None:
        """Inverse of `training`. Raises CheckpointError if it is damaged or of another model."""
        kept = checkpoint.load_training(path)
        checkpoint.fill(self.average, kept.average, str(path))
        checkpoint.fill(self.student, kept.student, str(path))
        with checkpoint.parts_of(path):
            checkpoint.fill_optimizer(self.optimizer, self.student, kept.optimizer)
        for name in checkpoint.COUNTERS:
            setattr(self, name, kept.state[name])


def check_run(config: LoopConfig) -> None:
    """Raises RunError if data is not given, there is no such device, or `out` is not for this run:
    another process is in it, or it holds a run of another config, or something else.

    A run without a checkpoint has nothing to lose: it may begin again with another config.
    """
    if not config.sources:
        raise RunError("data=: name at least one source, e.g. data=[data/demos@0.7,path/to/shard]")
    device_of(config)
    out = Path(config.out)
    path, saved = out / "config.json", checkpoint.last(out) is not None
    if (out / "model.safetensors").exists():
        raise RunError(f"out={config.out} is a checkpoint, not a run folder; choose another out")
    if (out / ".lock").exists():
        with _locked(out):
            pass
    if not path.exists() and not saved:
        return
    try:
        old, new = checkpoint.read_json(path), _identity(config)
    except checkpoint.CheckpointError as e:
        raise RunError(f"{e}; choose another out") from e
    if "lr" not in old:
        raise RunError(f"{path} is not a training run's; choose another out")
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
def open_run(config: LoopConfig, state: State, title: str, data: Amounts) -> Iterator["Run"]:
    """A new or resumed run, its folder locked until the block is left. Nothing is written before.

    Raises RunError if another process has the folder, or `data` is not what a resumed run had.
    """
    with _locked(Path(config.out)):
        yield Run(config, state, title, data)


def _identity(config: LoopConfig) -> dict[str, Any]:
    values = asdict(config) | {"data": config.sources}
    return json.loads(json.dumps({k: v for k, v in values.items() if k not in FREE}))


class Run:
    """A run folder while a process works in it: progress bar, log, checkpoints, stop signals.

    Made by `open_run`.
    """

    def __init__(self, config: LoopConfig, state: State, title: str, data: Amounts) -> None:
        self.config, self.state, self.title, self.data = config, state, title, data
        self.path = Path(config.out)
        self.resumed = checkpoint.last(self.path)
        if self.resumed:
            check_data(self.resumed, data)
            state.restore(self.resumed)
        checkpoint.write_json(self.path / "config.json", _identity(config))
        (self.path / "checkpoints").mkdir(exist_ok=True)
        checkpoint.prune(self.path, config.keep)
        self._cut_log()
        self.interrupted = False
        self._saved_at = self._told_at = self._started = time.monotonic()
        self._saved_step = state.step if self.resumed else -1
        self._rate = 0.0

    def batches(self, source: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(step, batch) until the run is over; measures the wait for data."""
        iterator = iter(source)
        before = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        try:
            with (
                (self.path / "log.jsonl").open("a") as self._log,
                Progress(*columns, TimeRemainingColumn()) as self._bar,
            ):
                self._task = self._bar.add_task(
                    self.title, total=self.config.steps, completed=self.state.step
                )
                while self.state.step < self.config.steps and not self._over():
                    self._asked = time.monotonic()
                    batch = next(iterator)
                    self._got = time.monotonic()
                    yield self.state.step, batch
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def log(self, size: int, **values: Tensor | float) -> None:
        """After an update: the log's line, the progress bar."""
        now, step = time.monotonic(), self.state.step
        rate = size / (now - self._asked)
        self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        row = {"step": step} | {k: float(torch.as_tensor(v).detach()) for k, v in values.items()}
        row |= {
            "lr": self.config.lr_at(step - 1),
            "skipped": self.state.skipped,
            "samples_per_s": round(rate, 2),
            "data_wait_s": round(self._got - self._asked, 4),
        }
        if step % self.config.log_every == 0:
            self._log.write(json.dumps(row) + "\n")
            self._log.flush()
        shown = " ".join(f"{k} {values[k]:.3f}" for k in ("loss", "cosine") if k in values)
        shown = f"{shown} {self._rate:.0f} samples/s"
        self._bar.update(self._task, completed=step, description=f"{self.title} {shown}")
        if not self._bar.console.is_terminal and now - self._told_at >= TELL_SECONDS:
            print(f"{self.title} step {step} of {self.config.steps}, {shown}", flush=True)
            self._told_at = now

    def due(self) -> bool:
        """Whether a checkpoint should be saved now."""
        waited = (time.monotonic() - self._saved_at) / 60
        return self.state.step % self.config.save_every == 0 or waited > self.config.save_minutes

    def save(self, config: dict[str, Any], statistics: dict[str, Any]) -> None:
        """Saves a checkpoint of the present step unless there is one."""
        if self._saved_step == self.state.step:
            return
        training = self.state.training()
        minutes = (time.monotonic() - self._started) / 60
        training.state.update(minutes_this_sitting=round(minutes, 2), data=self.data)
        provenance = config.get("provenance", {}) | {"step": self.state.step}
        checkpoint.save(
            self.path,
            training.average,
            config | {"provenance": provenance},
            statistics,
            training,
            self.config.export,
            self.config.keep,
        )
        self._saved_at, self._saved_step = time.monotonic(), self.state.step

    def finish(self) -> None:
        """Says where things lie; raises KeyboardInterrupt if the run was stopped by a signal."""
        skipped = f", {self.state.skipped} skipped" if self.state.skipped else ""
        print(
            f"step {self.state.step} of {self.config.steps}, {self.state.samples} samples{skipped}"
        )
        print(f"checkpoint: {checkpoint.last(self.path)}\nlog: {self.path / 'log.jsonl'}")
        if self.interrupted:
            raise KeyboardInterrupt

    def _over(self) -> bool:
        minutes = (time.monotonic() - self._started) / 60
        return self.interrupted or bool(self.config.minutes and minutes > self.config.minutes)

    def _interrupt(self, number: int, frame: Any) -> None:
        self.interrupted = True
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def _cut_log(self) -> None:
        """Drops lines after the checkpoint's step, so that every step is logged once."""
        path = self.path / "log.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            if not line.endswith("}") or json.loads(line)["step"] > self.state.step:
                break
            kept.append(line + "\n")
        draft = path.with_suffix(".tmp")
        draft.write_text("".join(kept))
        os.replace(draft, path)
