"""python eval/real_to_sim.py   (the published SIMPLER scores; or scores=my_scores.json)

How well success in a simulator predicts success on the real robot, over several policies: the mean
maximum rank violation (MMRV, 0 is best) and Pearson's correlation (1 is best), as SIMPLER defines
them (arXiv 2405.05941, section III). A file of scores is {task: {"real": [...], "sim": [...]}}, a
number in [0, 1] a policy, in the same order in both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from selfflow.configs.entry import launch
from selfflow.datasets.spec import UserError

PerPolicy = Sequence[float] | Float[np.ndarray, "policies"]
Scores = Mapping[str, Mapping[str, Sequence[float]]]

# Columns: RT-2-X, RT-1 converged, RT-1 at 15 %, RT-1-X, RT-1 at the beginning, Octo-base.
_GOOGLE = {
    "pick coke can": {
        "real": (0.907, 0.853, 0.920, 0.760, 0.133, 0.293),
        "sim": (0.787, 0.857, 0.710, 0.567, 0.027, 0.170),
    },
    "move near": {
        "real": (0.733, 0.633, 0.583, 0.450, 0.017, 0.350),
        "sim": (0.779, 0.442, 0.354, 0.317, 0.050, 0.042),
    },
    "open drawer": {
        "real": (0.333, 0.815, 0.704, 0.519, 0.0, 0.148),
        "sim": (0.157, 0.601, 0.463, 0.296, 0.0, 0.009),
    },
    "close drawer": {
        "real": (0.630, 0.926, 0.889, 0.741, 0.0, 0.519),
        "sim": (0.343, 0.861, 0.667, 0.891, 0.278, 0.444),
    },
    "place apple": {
        "real": (0.074, 0.185, 0.185, 0.407, 0.0, 0.0),
        "sim": (0.037, 0.065, 0.130, 0.213, 0.0, 0.0),
    },
}
# Columns: RT-1-X, Octo-base, Octo-small.
_WIDOWX = {
    "WidowX spoon on towel": {"real": (0.0, 0.333, 0.417), "sim": (0.0, 0.125, 0.472)},
    "WidowX carrot on plate": {"real": (0.0, 0.25, 0.083), "sim": (0.042, 0.083, 0.097)},
    "WidowX stack cube": {"real": (0.0, 0.0, 0.125), "sim": (0.0, 0.0, 0.042)},
    "WidowX eggplant in basket": {"real": (0.0, 0.25, 0.40), "sim": (0.0, 0.431, 0.569)},
}
# The paper's scores of visual matching: what `scores=null` shows.
PUBLISHED: Scores = _GOOGLE | _WIDOWX


@dataclass(frozen=True)
class RealToSimConfig:
    """Every key of configs/real_to_sim.yaml, which explains them."""

    scores: str | None
    out: str  # of every command; nothing is written


def mmrv(sim: PerPolicy, real: PerPolicy) -> float:
    """Mean over policies i of the largest |real_i - real_j| among the j that the simulator ranks
    against i otherwise than reality does: (sim_i < sim_j) != (real_i < real_j).

    The simulator comes first, as in the signature of SIMPLER's own function, whose docstring has
    the two the other way round. The order matters: what is at stake is measured in real success.
    Raises ValueError unless both hold the same number of finite scores, at least 2.
    """
    simulated, true = _pair(sim, real)
    otherwise = (simulated[:, None] < simulated) != (true[:, None] < true)
    lost = np.abs(true[:, None] - true) * otherwise
    return float(lost.max(axis=1).mean())


def pearson(sim: PerPolicy, real: PerPolicy) -> float:
    """Pearson's correlation, in any order of arguments; nan where one side does not vary.
    Raises ValueError as `mmrv`."""
    x, y = (scores - scores.mean() for scores in _pair(sim, real))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")


def rows(scores: Scores) -> dict[str, tuple[float, float]]:
    """(MMRV, Pearson) by task. Raises ValueError that names the task."""
    found = {}
    for task, pair in scores.items():
        try:
            found[task] = (mmrv(pair["sim"], pair["real"]), pearson(pair["sim"], pair["real"]))
        except ValueError as e:
            raise ValueError(f"{task}: {e}") from e
    return found


def read_scores(path: Path) -> Scores:
    """A file of scores, see the module. Raises UserError with what is wrong in it."""
    try:
        scores = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f"scores={path}: {e.strerror}; give a JSON file") from e
    except ValueError as e:
        raise UserError(f"scores={path}: not JSON ({e})") from e
    form = '{task: {"real": [...], "sim": [...]}} with a number a policy'
    pairs = list(scores.values()) if isinstance(scores, dict) else []
    if not pairs or not all(isinstance(pair, dict) and _numbers(pair) for pair in pairs):
        raise UserError(f"scores={path}: must be {form}")
    sides = ("real", "sim")
    scores = {t: {side: list(map(float, s[side])) for side in sides} for t, s in scores.items()}
    try:
        rows(scores)
    except ValueError as e:
        raise UserError(f"scores={path}: {e}") from e
    return scores


def check(config: RealToSimConfig) -> None:
    """What can be wrong with the file."""
    if config.scores:
        read_scores(Path(config.scores))


def main(config: RealToSimConfig) -> dict[str, tuple[float, float]]:
    """Prints the table and returns its numbers."""
    found = rows(read_scores(Path(config.scores)) if config.scores else PUBLISHED)
    title = f"Simulator against reality: {config.scores or 'SIMPLER as published'}"
    table = Table("task", "MMRV", "Pearson", title=title, title_justify="left")
    for task, (violation, correlation) in found.items():
        table.add_row(task, f"{violation:.3f}", f"{correlation:.3f}")
    Console().print(table)
    return found


def _numbers(pair: dict[str, Any]) -> bool:
    """Whether both sides are lists of numbers."""
    return all(
        isinstance(pair.get(side), list) and all(type(x) in (int, float) for x in pair[side])
        for side in ("real", "sim")
    )


def _pair(sim: PerPolicy, real: PerPolicy) -> tuple[np.ndarray, np.ndarray]:
    simulated, true = np.asarray(sim, np.float64), np.asarray(real, np.float64)
    if simulated.ndim != 1 or simulated.shape != true.shape or len(true) < 2:
        raise ValueError(
            f"as many scores of the simulator as real ones, 2 or more; got {simulated.shape} "
            f"and {true.shape}"
        )
    if not np.all(np.isfinite([simulated, true])):
        raise ValueError("a score is not finite")
    return simulated, true


if __name__ == "__main__":
    launch(RealToSimConfig, main, "real_to_sim", check)
