"""The moving average of the student's weights: the teacher, and the model that is kept."""

import torch
from torch import nn

from selfflow.worldmodel.parallel import local


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """Decay after `step` updates; warm-up min(decay, (1 + n) / (10 + n)) suits short runs."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def update(average: nn.Module, student: nn.Module, decay: float) -> None:
    """average = decay · average + (1 - decay) · student, for every parameter, in place.

    Of sharded models each process averages its own parts.
    """
    for kept, new in zip(average.parameters(), student.parameters(), strict=True):
        local(kept).lerp_(local(new), 1 - decay)
