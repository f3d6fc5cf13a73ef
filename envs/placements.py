"""What the files of the Google robot's tasks share: ranges, cells of a grid, room beside them."""

from dataclasses import fields
from typing import Any

import numpy as np

from selfflow.datasets.spec import UserError

Privileged = dict[str, np.ndarray]  # keys and shapes: envs.base.Simulator
Range = tuple[float, float]  # low, high, drawn uniformly

KEEP_AWAY = 0.015  # m at least between a drawn start and those that SIMPLER evaluates
ATTEMPTS = 10_000  # draws until one fits; with our own ranges some ten are enough


def cell_number(cells: int, rng: np.random.Generator, seed: int | None) -> int:
    """Which cell of a grid the seed starts in; any without a seed."""
    return int(rng.integers(cells)) if seed is None else seed % cells


def check_ranges(config: Any) -> None:
    """Raises UserError for a range of a config's whose low end is above its high one."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is Range and value[0] > value[1]:
            raise UserError(f"{field.name}={value}: must be (low, high)")


def no_room(config: Any) -> UserError:
    """For a config whose ranges leave no place that keeps away from the evaluation's."""
    return UserError(
        f"no start fits in {ATTEMPTS} draws: widen the ranges or lessen keep_away of {config}"
    )
