"""Memory of a GPU and hours of a run, from cost.py and activations.py: a plan, not a measurement.

GB are 1e9 bytes. `mfu` is the share of a GPU's bf16 peak that the executed matrix products reach,
recomputed ones included. Not in the plan: the codec's own memory and time (encode beforehand:
worldmodel/encode.py), reading the data, and what processes exchange.
"""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from selfflow.worldmodel.activations import activation_bytes
from selfflow.worldmodel.cost import flops, length, parameters
from selfflow.worldmodel.train_config import TrainConfig

FULL, HALF = 4, 2  # bytes of a number in fp32 and bf16
MODES = ("none", "ddp", "fsdp")


@dataclass(frozen=True)
class Cluster:
    """What a run is planned on."""

    gpus: int = 8
    gpu_memory: float = 80.0  # GB
    reserve: float = 0.1  # share of it for CUDA, NCCL and fragmentation
    mfu: float = 0.4
    peak: float = 989e12  # bf16 FLOP/s of a GPU; an H100 SXM's

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpu_memory <= 0 or self.peak <= 0:
            raise ValueError("gpus, gpu_memory and peak_flops must be positive")
        if not 0 <= self.reserve < 1 or not 0 < self.mfu <= 1:
            raise ValueError(f"reserve={self.reserve} in 0 .. 1, mfu={self.mfu} above 0, up to 1")

    @property
    def usable(self) -> int:
        """Bytes of one GPU."""
        return int(self.gpu_memory * 1e9 * (1 - self.reserve))


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU; fields ending in `_each` are of a sample of its micro-batch."""

    weights: int
    average: int  # the teacher
    optimiser: int  # AdamW's two moments
    gradients: int
    copies: int  # of the weights in bf16, which autocast keeps until the forward pass is over
    gathered: int  # FSDP: two blocks and the root, gradients of a block, or of all if accumulated
    activations_each: int
    working_each: int  # a block brought back, gradients inside it: a guess, one block each
    early_gradients: bool  # there before the backward pass: buckets of DDP, earlier micro-batches

    @property
    def fixed(self) -> int:
        """Whatever is being done."""
        return self.weights + self.average + self.optimiser + self.gathered

    def peak(self, batch: int) -> int:
        """For a micro-batch: the larger of the backward pass's beginning and end."""
        begin = self.copies + self.early_gradients * self.gradients
        begin += batch * (self.activations_each + self.working_each)
        end = self.gradients + batch * self.working_each
        return self.fixed + max(begin, end)

    def largest(self, usable: int) -> int:
        """The most samples of a micro-batch that fit; 0 if none does."""
        batch = 0
        while self.peak(batch + 1) <= usable and batch < 1 << 16:
            batch += 1
        return batch


@dataclass(frozen=True)
class Speed:
    """Of the whole run."""

    flops: float  # executed in a step, all GPUs
    seconds: float  # a step
    samples: float  # a second, all GPUs
    tokens: float
    hours: float


def memory(
    config: TrainConfig, gpus: int, mode: str, checkpointing: bool, device: str = "cuda"
) -> Memory:
    """What lies on one of so many GPUs. mode: none, ddp, fsdp."""
    if mode not in MODES:
        raise ValueError(f"mode={mode}: choose one of {', '.join(MODES)}")
    count = parameters(config.transformer, config.projector_layers)
    kept = activation_bytes(config, device)
    share = gpus if mode == "fsdp" else 1
    whole = -(-count.total * FULL // share)
    cell = HALF if mode == "fsdp" and config.shard_dtype == "bfloat16" else FULL
    root = count.total - count.blocks
    gathered = 0
    if mode == "fsdp":
        gathered = count.largest_block * (3 * cell + FULL) + root * FULL
        # until the last micro-batch nothing is averaged, so gradients lie there whole
        gathered += count.total * FULL if config.accumulate > 1 else 0
    copied = config.precision == "bf16" and cell == FULL
    return Memory(
        weights=whole,
        average=whole,
        optimiser=2 * whole,
        gradients=whole,
        copies=count.linear * HALF if copied else 0,
        gathered=gathered,
        activations_each=kept.total(checkpointing),
        working_each=kept.largest * (2 if checkpointing else 1),
        early_gradients=mode == "ddp" or config.accumulate > 1,
    )


def speed(config: TrainConfig, cluster: Cluster, checkpointing: bool) -> Speed:
    """Of the config's batch and steps."""
    cost = flops(config)
    work = config.batch * (cost.training + (cost.blocks if checkpointing else 0))
    seconds = work / (cluster.gpus * cluster.mfu * cluster.peak)
    samples = config.batch / seconds
    tokens = samples * length(config.transformer)
    return Speed(float(work), seconds, samples, tokens, config.steps * seconds / 3600)


def mode_of(config: TrainConfig, gpus: int) -> str:
    """The config's `parallel`, with auto and a single GPU resolved."""
    if gpus == 1:
        return "none"
    return "ddp" if config.parallel == "auto" else config.parallel


def report(config: TrainConfig, cluster: Cluster, console: Console | None = None) -> None:
    """Prints the tables, then the plan of this config in plain lines."""
    console = console or Console()
    for table in (_cost(config), _activations(config), _memory(config, cluster)):
        console.print(table)
    for line in summary(config, cluster):
        print(line)


def summary(config: TrainConfig, cluster: Cluster) -> list[str]:
    """The plan of this config, a line each; all of it is estimated."""
    mode, checkpointing = mode_of(config, cluster.gpus), config.activation_checkpointing
    each = -(-config.batch // (cluster.gpus * config.accumulate))
    lies = memory(config, cluster.gpus, mode, checkpointing)
    runs, fits = speed(config, cluster, checkpointing), lies.largest(cluster.usable)
    names = ", ".join(f"{m.name} {m.length}" for m in config.transformer.modalities)
    return [
        f"plan (estimated): {mode}, GPUs {cluster.gpus}, batch {config.batch}, "
        f"activation_checkpointing={str(checkpointing).lower()}",
        f"tokens per sample: {length(config.transformer)} ({names})",
        f"memory per GPU: {_gb(lies.peak(each))} GB at {each} a time, of "
        f"{_gb(cluster.usable)} usable; {fits} fit",
        f"FLOPs per step: {runs.flops:.3e}",
        f"at {cluster.mfu:.0%} of {cluster.peak:.3g} FLOP/s: {runs.seconds:.3g} s per step, "
        f"{runs.samples:.1f} samples/s, {runs.tokens:,.0f} tokens/s",
        f"{config.steps} steps: {runs.hours:.1f} hours, {runs.hours * cluster.gpus:,.0f} GPU-hours",
    ]


def _gb(size: int) -> str:
    digits = 2 if size < 1e9 else 1 if size < 100e9 else 0
    return f"{size / 1e9:.{digits}f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _cost(config: TrainConfig) -> Table:
    count, cost = parameters(config.transformer, config.projector_layers), flops(config)
    table = _table("Parameters, and FLOPs of one sample", "part", "parameters", "FLOPs", "a token")
    tokens = length(config.transformer)

    def row(name: str, parameters: int | None, value: int | None = None) -> None:
        figures = ("", "") if value is None else (f"{value:.3e}", f"{value / tokens:.3e}")
        table.add_row(name, "" if parameters is None else f"{parameters:,}", *figures)

    row("blocks and what they share", count.blocks, cost.blocks)
    for name, own in count.modalities.items():
        row(f"{name}: its own layers", own)
    row("time, labels, final modulation", count.rest)
    row("backbone, forward", count.backbone, cost.forward)
    row("projector, forward", count.projector, cost.projector)
    row("forward and backward", count.total, 3 * (cost.forward + cost.projector))
    row(f"teacher, forward to block {config.blocks[1]}", None, cost.teacher)
    row("a training step", None, cost.training)
    row("... with activation checkpointing", None, cost.training + cost.blocks)
    return table


def _activations(config: TrainConfig) -> Table:
    kept = activation_bytes(config)
    table = _table("Activations of one sample kept for the backward pass, MB", "of", "MB")
    for name, size in (kept.blocks | kept.ends).items():
        table.add_row(name, f"{size / 1e6:,.1f}")
    table.add_row("the batch: clean, noised, velocity", f"{kept.batch / 1e6:,.1f}")
    table.add_row("all", f"{kept.total(False) / 1e6:,.1f}")
    table.add_row("with checkpointing: blocks' inputs", f"{kept.inputs / 1e6:,.1f}")
    table.add_row("with checkpointing: all", f"{kept.total(True) / 1e6:,.1f}")
    table.add_row("with checkpointing: one block at a time", f"{kept.largest / 1e6:,.1f}")
    return table


def _memory(config: TrainConfig, cluster: Cluster) -> Table:
    each = -(-config.batch // (cluster.gpus * config.accumulate))
    title = f"Memory of one of {cluster.gpus} GPUs, GB ({_gb(cluster.usable)} usable)"
    table = _table(title, "", *MODES)
    made = {
        checkpointing: [memory(config, cluster.gpus, mode, checkpointing) for mode in MODES]
        for checkpointing in (False, True)
    }

    def row(name: str, sizes: list[int]) -> None:
        table.add_row(name, *(_gb(size) for size in sizes))

    row("weights, fp32", [m.weights for m in made[False]])
    row("EMA, fp32", [m.average for m in made[False]])
    row("AdamW's moments, fp32", [m.optimiser for m in made[False]])
    row("gradients, fp32", [m.gradients for m in made[False]])
    row("bf16 copies of weights", [m.copies for m in made[False]])
    row("gathered at a time", [m.gathered for m in made[False]])
    for checkpointing, plans in made.items():
        table.add_section()
        how = "checkpointing" if checkpointing else "no checkpointing"
        row(f"{how}: a sample", [m.activations_each + m.working_each for m in plans])
        row(f"{how}: peak with {each} samples", [m.peak(each) for m in plans])
        fits = [str(m.largest(cluster.usable)) for m in plans]
        table.add_row(f"{how}: samples that fit", *fits)
    return table
