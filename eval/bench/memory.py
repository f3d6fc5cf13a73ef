"""python eval/bench/memory.py

Peak memory of a 675 M training step with activation checkpointing on the CPU, measured (the
process's largest resident size, less what it was before the model), beside what worldmodel/plan.py
says. Takes about 15 GB and some minutes. Any key of worldmodel/train.py may follow: `... model=base
activation_checkpointing=false`.
"""

import ctypes
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from selfflow.configs.entry import compose, fail
from selfflow.datasets.spec import UserError
from selfflow.eval.bench.step import random_inputs
from selfflow.worldmodel.cost import length, parameters
from selfflow.worldmodel.loop import State, generator
from selfflow.worldmodel.objective import Student, losses
from selfflow.worldmodel.plan import Memory, memory
from selfflow.worldmodel.train_config import TrainConfig

DEFAULTS = {"model": "selfflow_675m", "activation_checkpointing": "true", "batch": "2"}
STEPS = 2  # the second one begins with AdamW's moments in place
MARGIN = 1.5e9  # bytes that must be free beside the estimate
MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD, for mallopt


def main(overrides: list[str]) -> None:
    """Prints the table."""
    given = {override.partition("=")[0] for override in overrides}
    defaults = [f"{k}={v}" for k, v in DEFAULTS.items() if k not in given]
    config = compose(TrainConfig, "train", [*defaults, *overrides, "device=cpu", "parallel=none"])
    planned = memory(config, 1, "none", config.activation_checkpointing, device="cpu")
    each = config.batch // config.accumulate
    needed, free = planned.peak(each) + MARGIN, available()
    if needed > free:
        raise UserError(f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} free; a smaller model=")
    if config.threads:
        torch.set_num_threads(config.threads)
    # by default glibc keeps freed blocks of up to 32 MB, which would count as used (6 % at 675 M)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
    before = largest_resident()
    train(config)
    show(config, planned, largest_resident() - before)


def train(config: TrainConfig) -> None:
    """Two steps on random tokens."""
    torch.manual_seed(config.seed)
    state = State(Student(config.transformer, layers=config.projector_layers), config)
    inputs = random_inputs(replace(config, batch=config.batch // config.accumulate))
    for step in range(STEPS):
        for micro in range(config.accumulate):
            random = generator(config.seed, step, micro=micro)
            state.backward(losses(state.model, state.average, inputs, config, random))
        state.update(config.batch)


def largest_resident() -> int:
    """Bytes, since the process began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available() -> float:
    """Bytes that the machine could still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return float(kilobytes) * 1024


def show(config: TrainConfig, planned: Memory, measured: int) -> None:
    """Estimate, measurement, their ratio."""
    each = config.batch // config.accumulate
    count = parameters(config.transformer, config.projector_layers).total
    how = "with" if config.activation_checkpointing else "without"
    table = Table(
        title=f"Peak memory of a training step, {count / 1e6:.0f} M parameters, {each} samples "
        f"of {length(config.transformer)} tokens, {config.precision}, {how} checkpointing",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("GB", justify="right")
    rows = {
        "weights": planned.weights,
        "EMA": planned.average,
        "AdamW": planned.optimiser,
        "gradients (backward pass)": planned.gradients,
        "bf16 copies (forward pass)": planned.copies,
        "activations": each * planned.activations_each,
        "one block's, at a time": each * planned.working_each,
        "estimated peak": planned.peak(each),
        "measured peak": measured,
    }
    for name, size in rows.items():
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_row("measured / estimated", f"{measured / planned.peak(each):.3f}")
    Console().print(table)


if __name__ == "__main__":
    try:
        if {"-h", "--help"} & {*sys.argv}:
            print((__doc__ or "").strip())
        else:
            main(sys.argv[1:])
    except UserError as e:
        fail(str(e))
