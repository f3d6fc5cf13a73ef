"""The flow loss on held-out episodes, the same for all objectives: every target token of a window
at one time, as in objective=vanilla, of the moving-average weights, with the same windows, times
and noise for every checkpoint. A run's own training loss depends on how its objective draws times.

B windows, L tokens, C channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.progress import Progress
from torch import Tensor

from selfflow.eval.open_loop import Chosen
from selfflow.eval.world import World
from selfflow.worldmodel import flow

DRAWS = 4  # of time and noise, a window


@dataclass(frozen=True)
class HeldLosses:
    """Mean squared error of the velocity by window, nan where its data say nothing."""

    name: str  # of the checkpoint
    episode: Int[np.ndarray, "B"]
    losses: dict[str, Float[np.ndarray, "B"]]  # by target modality


def held_losses(world: World, chosen: Chosen, progress: Progress) -> HeldLosses:
    """Of the windows of a plan."""
    task = progress.add_task(f"{world.name}: loss", total=len(chosen))
    model, schedule = world.model.config, flow.Schedule("vanilla")
    found: dict[str, list[np.ndarray]] = {m.name: [] for m in model.targets}
    numbers: list[int] = []
    for number, windows, places, episodes in chosen.batches():
        inputs = world.reader.tokens(windows.at(places), world.device)
        generator = torch.Generator().manual_seed(chosen.plan.seed + number)
        draws: dict[str, list[Tensor]] = {m.name: [] for m in model.targets}
        for _ in range(DRAWS):
            noised = flow.draw(inputs.tokens, model, schedule, generator)
            with torch.no_grad():
                velocity = world.model(noised.tokens, noised.tau, noised.group, inputs.valid)
            for name, answer in velocity.items():
                draws[name].append(by_window(answer, noised.velocity[name], inputs.mask[name]))
        for name, values in draws.items():
            found[name].append(torch.stack(values).mean(0).double().cpu().numpy())
        numbers += episodes
        progress.advance(task, len(places))
    losses = {name: np.concatenate(values) for name, values in found.items()}
    return HeldLosses(world.name, np.array(numbers), losses)


def by_window(
    answer: Float[Tensor, "B L C"], truth: Float[Tensor, "B L C"], mask: Float[Tensor, "B L _"]
) -> Float[Tensor, "B"]:
    """flow.flow_loss of each window by itself; nan where the mask (1 or C wide) leaves nothing."""
    weight = mask.expand_as(answer)
    error = (answer.float() - truth.float()).square() * weight
    return error.sum((1, 2)) / weight.sum((1, 2))  # 0 / 0 is nan
