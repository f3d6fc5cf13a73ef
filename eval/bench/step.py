"""python eval/bench/step.py

What the Self-Flow step costs beside the vanilla one: the same model, batch and optimiser, a step of
one, a step of the other, and so on. The bar is 1.35, on the ratio of processor times, which other
work on the machine disturbs less than it does the clock. Any key of worldmodel/train.py may follow:
`python eval/bench/step.py batch=32 model=small threads=1`.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from selfflow.configs.entry import compose, fail
from selfflow.datasets.spec import UserError
from selfflow.worldmodel.batches import Inputs
from selfflow.worldmodel.cost import flops
from selfflow.worldmodel.loop import State, generator
from selfflow.worldmodel.objective import Student, losses
from selfflow.worldmodel.train_config import TrainConfig

BAR = 1.35
WARMUP, ROUNDS = 3, 15
OBJECTIVES = ("vanilla", "self_flow")
Times = dict[str, list[tuple[float, float]]]  # seconds of each step: clock, processor


def main(overrides: list[str]) -> None:
    """Prints the table."""
    base = compose(TrainConfig, "train", overrides)
    torch.set_num_threads(base.threads or torch.get_num_threads())
    inputs = random_inputs(base)
    configs = {name: replace(base, objective=name) for name in OBJECTIVES}
    steps = {name: stepper(config, inputs) for name, config in configs.items()}
    taken: Times = {name: [] for name in OBJECTIVES}
    for i in range(WARMUP + ROUNDS):
        for name in OBJECTIVES if i % 2 else OBJECTIVES[::-1]:
            began = time.perf_counter(), time.process_time()
            steps[name](i)
            if i >= WARMUP:
                ended = time.perf_counter(), time.process_time()
                taken[name].append((ended[0] - began[0], ended[1] - began[1]))
    show(configs, taken)


def random_inputs(config: TrainConfig) -> Inputs:
    """A batch of standard normal tokens, all of them valid."""
    random = torch.Generator().manual_seed(config.seed)
    model = config.transformer
    tokens = {
        m.name: torch.randn(config.batch, m.length, m.channels, generator=random)
        for m in model.modalities
    }
    mask = {m.name: torch.ones(config.batch, m.length, 1) for m in model.targets}
    return Inputs(tokens, {}, mask)


def stepper(config: TrainConfig, inputs: Inputs) -> Callable[[int], None]:
    """A function that trains one step on the batch: forward, backward, AdamW, moving average."""
    torch.manual_seed(config.seed)
    state = State(Student(config.transformer, layers=config.projector_layers), config)

    def step(number: int) -> None:
        random = generator(config.seed, number)
        state.backward(losses(state.model, state.average, inputs, config, random))
        state.update(config.batch)

    return step


def show(configs: dict[str, TrainConfig], taken: Times) -> None:
    """Medians, quartiles, and the median ratio of paired steps beside that of the arithmetic."""
    config = configs["vanilla"]
    print(
        f"one training step: {config.transformer.depth} blocks of width "
        f"{config.transformer.hidden}, batch {config.batch}, {config.precision}, "
        f"{torch.get_num_threads()} threads, median and quartiles of {ROUNDS}"
    )
    table = Table()
    for column in ("objective", "clock, ms", "x", "processor, ms", "x", "FLOPs, x", "bar"):
        table.add_column(column, justify="left" if column == "objective" else "right")
    plain = flops(configs["vanilla"]).training
    for name, pairs in taken.items():
        cells, ratio = [], 0.0
        for kind in range(2):
            low, middle, high = (1e3 * s for s in statistics.quantiles([p[kind] for p in pairs]))
            both = zip(pairs, taken["vanilla"], strict=True)
            ratio = statistics.median(own[kind] / other[kind] for own, other in both)
            cells += [f"{middle:.0f} ({low:.0f} .. {high:.0f})", f"{ratio:.2f}"]
        work = f"{flops(configs[name]).training / plain:.2f}"
        verdict = "met" if ratio <= BAR else "MISSED"
        table.add_row(name, *cells, work, "" if name == "vanilla" else f"{BAR}: {verdict}")
    Console().print(table)


if __name__ == "__main__":
    try:
        if {"-h", "--help"} & {*sys.argv}:
            print((__doc__ or "").strip())
        else:
            main(sys.argv[1:])
    except UserError as e:
        fail(str(e))
