"""What every training script needs for a step: its config, its random numbers, the state.

A script stays a plain loop: get a batch, compute losses, `State.backward` for each micro-batch,
`State.update`, `Run.log`, `Run.save`. Nothing random is kept between steps (`generator`), so the
step number is the whole random state and a resumed run repeats an uninterrupted one to the bit.
"""

import copy
import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from selfflow.worldmodel import checkpoint, ema, parallel, trackers
from selfflow.worldmodel.checkpoint import Training
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.parallel import ALONE, World

SKIP_LIMIT = 10  # non-finite steps in a row before a run stops
SHARD_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoopConfig:
    """What pretraining and fine-tuning have in common."""

    data: Any = field(default_factory=list)  # path or path@weight, or a list of them
    statistics: str | None = None  # file of datasets/stats.py; None: of the data, in one pass
    out: str = "outputs/run"  # run folder; the same command goes on where it stopped
    steps: int = 5000  # length of the run and of the learning-rate schedule
    minutes: float = 0.0  # stop earlier, after so many minutes of this sitting; 0: never
    batch: int = 64  # samples a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches a step
    lr: float = 3e-4
    warmup: int = 200  # steps
    schedule: str = "cosine"  # after warm-up: cosine to a tenth, or constant
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of AdamW
    clip: float = 1.0  # gradient norm
    ema: float = 0.9999
    ema_warmup: bool = True  # min(ema, (1 + n) / (10 + n))
    precision: str = "bf16"  # autocast, or fp32
    compile: bool = False  # torch.compile of every block
    activation_checkpointing: bool = False  # blocks are computed again in the backward pass
    parallel: str = "auto"  # none, ddp, fsdp, or auto: ddp where there are several processes
    shard_dtype: str = "float32"  # fsdp: in which blocks are gathered, or bfloat16
    device: str = "auto"  # cpu, cuda, cuda:N, or auto: cuda where there is one
    threads: int = 0  # of torch; 0: as many as torch likes
    seed: int = 0
    workers: int = 0  # processes that load data; 0: a thread of this one
    save_every: int = 500  # steps
    save_minutes: float = 10.0
    keep: int = 2  # checkpoints
    save_async: bool = False  # write checkpoints while training goes on
    log: list[str] = field(default_factory=list)  # besides log.jsonl: tensorboard, wandb
    log_every: int = 1  # steps
    peak_flops: float = 0.0  # of one device, for MFU; 0: by its name, where known
    export: str = "float32"  # dtype of model.safetensors, or float16

    def __post_init__(self) -> None:
        _choose("schedule", self.schedule, ("cosine", "constant"))
        _choose("precision", self.precision, ("bf16", "fp32"))
        _choose("export", self.export, tuple(checkpoint.DTYPES))
        _choose("parallel", self.parallel, parallel.MODES)
        _choose("shard_dtype", self.shard_dtype, tuple(SHARD_DTYPES))
        for name in self.log:
            _choose("log", name, trackers.NAMES)
        for name in ("steps", "batch", "accumulate", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        amounts = ("minutes", "save_minutes", "weight_decay", "peak_flops")
        for name in ("seed", "threads", "workers", *amounts):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.batch % self.accumulate:
            raise ValueError(f"batch={self.batch} does not divide by accumulate={self.accumulate}")
        if self.shard_dtype != "float32" and self.precision == "fp32":
            raise ValueError(f"shard_dtype={self.shard_dtype} needs precision=bf16")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: two numbers in 0 .. 1")
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


def generator(seed: int, step: int, rank: int = 0, micro: int = 0) -> torch.Generator:
    """The random numbers of one process's micro-batch, the same whenever it is run."""
    stream = f"noise/{rank}/{micro}" if rank or micro else "noise"
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@contextmanager
def start(config: LoopConfig) -> Iterator[World]:
    """Threads, initialisation seed, device, and the other processes of the run.

    Raises RunError if there is no such device, or `parallel` does not suit how it was started.
    """
    world = parallel.place(config.parallel, config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with parallel.join(world) as joined:
        yield joined


Model = TypeVar("Model", bound=nn.Module)


class State(Generic[Model]):
    """Everything that training changes.

    `student` holds the weights; `model` is how the loop calls it, as a whole, so that DDP and FSDP
    see the call. `average` is the teacher.
    """

    model: nn.Module

    def __init__(self, student: Model, config: LoopConfig, world: World = ALONE) -> None:
        self.student, self.config, self.world = student, config, world
        student.to(self.world.device)
        self.average = copy.deepcopy(student).requires_grad_(False).eval()
        _checkpoint_activations(student, config.activation_checkpointing)
        for module in (student, self.average):
            if config.compile:
                for block in parallel.blocks(module):
                    block.compile()  # in place: names of parameters stay
            if self.world.mode == "fsdp":
                parallel.shard(module, self.world, SHARD_DTYPES[config.shard_dtype])
        self.model = parallel.wrap(student, self.world)
        self.optimizer = torch.optim.AdamW(
            student.parameters(),
            config.lr,
            (config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step = self.samples = self.skipped = self.skipped_in_row = 0
        self._begin()

    def _begin(self) -> None:
        """No gradients, no values, the next micro-batch is the first."""
        self.optimizer.zero_grad(set_to_none=True)
        self._micro, self._sums = 0, {}
        parallel.exchange_gradients(self.model, self.config.accumulate == 1)

    def backward(self, values: dict[str, Tensor]) -> None:
        """One micro-batch: adds the gradients of its part of `loss`; all values go to the log.

        A step's loss is the mean of its micro-batches' and processes' losses, so it is the loss of
        the whole batch to the rounding, except where a term is a mean over valid tokens only: then
        micro-batches count alike, however many valid tokens each has.
        """
        (values["loss"] / self.config.accumulate).backward()
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._micro += 1
        parallel.exchange_gradients(self.model, self._micro >= self.config.accumulate - 1)

    def update(self, size: int, ids: Any = None) -> dict[str, float]:
        """One optimiser step and one of the moving average, after all `backward`.

        Returns the values averaged over micro-batches and processes, and `grad_norm` before
        clipping. Where loss or gradient is not finite on any process the weights stay, and the
        step is counted as skipped. Raises RunError with the batch's ids after SKIP_LIMIT in a row.
        """
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip)
        values = {k: float(v) / self._micro for k, v in self._sums.items()}
        values = self.world.mean(values | {"grad_norm": float(parallel.whole(norm))})
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
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
        self._begin()
        self.step += 1
        self.samples += size
        return values

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
        """Inverse of `training`, whatever number of processes saved it. Raises CheckpointError if
        it is damaged or of another model."""
        if checkpoint.is_sharded(path):
            from selfflow.worldmodel import sharded

            state = checkpoint.load_training_state(path)
            sharded.load(path / checkpoint.SHARDS, self.average, self.student, self.optimizer)
        else:
            kept = checkpoint.load_training(path)
            state = kept.state
            checkpoint.fill(self.average, kept.average, str(path))
            checkpoint.fill(self.student, kept.student, str(path))
            with checkpoint.parts_of(path):
                checkpoint.fill_optimizer(self.optimizer, self.student, kept.optimizer)
        for name in checkpoint.COUNTERS:
            setattr(self, name, state[name])


def _checkpoint_activations(model: nn.Module, wanted: bool) -> None:
    """Tells the modules that have the attribute."""
    found = [m for m in model.modules() if hasattr(m, "activation_checkpointing")]
    for module in found:
        module.activation_checkpointing = wanted  # type: ignore[assignment]
    if wanted and not found:
        raise RunError(f"activation_checkpointing: {type(model).__name__} has none; leave it false")
