"""python eval/bench/step.py

What the Self-Flow step costs beside the vanilla one: the same model, batch and optimiser, a step of
one, a step of the other, and so on. The bar is 1.35. Any key of worldmodel/train.py may follow:
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


def main(overrides: list[str]) -> None:
    """Prints the table."""
    base = compose(TrainConfig, "train", overrides)
    torch.set_num_threads(base.threads or torch.get_num_threads())
    inputs = random_inputs(base)
    configs = {name: replace(base, objective=name) for name in OBJECTIVES}
    steps = {name: stepper(config, inputs) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    for i in range(WARMUP + ROUNDS):
        for name in OBJECTIVES if i % 2 else OBJECTIVES[::-1]:
            began = time.perf_counter()
            steps[name](i)
            if i >= WARMUP:
                seconds[name].append(time.perf_counter() - began)
    show(configs, seconds)


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


def show(configs: dict[str, TrainConfig], seconds: dict[str, list[float]]) -> None:
    """Medians, quartiles, the ratio of paired steps, and the ratio of the arithmetic."""
    config = configs[OBJECTIVES[0]]
    title = (
        f"One training step, {config.transformer.depth} blocks of width {config.transformer.hidden}"
        f", batch {config.batch}, {config.precision}, {torch.get_num_threads()} threads, "
        f"median of {ROUNDS}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("objective", "ms", "quartiles", "x vanilla", "FLOPs x vanilla", "bar"):
        table.add_column(column, justify="left" if column == "objective" else "right")
    plain = flops(configs["vanilla"]).training
    for name, taken in seconds.items():
        low, middle, high = (1e3 * s for s in statistics.quantiles(taken, n=4))
        ratio = statistics.median(a / b for a, b in zip(taken, seconds["vanilla"], strict=True))
        work = flops(configs[name]).training / plain
        own = name == "vanilla"
        table.add_row(
            name, f"{middle:.0f}", f"{low:.0f} .. {high:.0f}", f"{ratio:.2f}", f"{work:.2f}",
            "" if own else f"<= {BAR}: {'met' if ratio <= BAR else 'MISSED'}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as e:
        fail(str(e))
