"""python eval/bench/sim.py backend=simpler   (a minute; or backend=mujoco, all its scenes)

What a control step, a reset and the memory of a simulator cost, beside what is asked of them. The
bars hold for two idle cores of a server processor. Actions are small and random; seconds are the
clock's.
"""

import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from rich.console import Console
from rich.table import Table

from selfflow.configs.entry import launch, one_of
from selfflow.datasets.spec import Task, UserError, task_named
from selfflow.envs.base import RobotEnv
from selfflow.eval.parts import tasks_of

SPEED_UP = 1.6
BACKENDS = ("simpler", "mujoco")
SCENES = ("open_drawer_place", "pick_coke_can", "move_near")  # of the twin, a task in each


@dataclass(frozen=True)
class BenchConfig:
    """Every key of configs/bench_sim.yaml, which explains them."""

    backend: str
    task: str
    steps: int
    resets: int


@dataclass(frozen=True)
class Row:
    """Values of one kind, and the bar that their median has to keep to, if any."""

    what: str
    values: list[float]
    unit: str
    bar: float | None = None
    least: bool = False  # the bar is a least value, not a largest

    @property
    def verdict(self) -> str:
        """met, MISSED or nothing, by the median."""
        if self.bar is None:
            return ""
        median = statistics.median(self.values)
        met = median >= self.bar if self.least else median <= self.bar
        return "met" if met else "MISSED"


def check(config: BenchConfig) -> None:
    """Raises UserError for whatever can be wrong before work begins."""
    one_of("backend", config.backend, BACKENDS)
    one_of("task", task_named(config.task).name, tasks_of(config.backend))
    for key in ("steps", "resets"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)}: must be 1 or more")


def main(config: BenchConfig) -> list[Row]:
    """Measures, prints the table and returns its rows."""
    measure = {"simpler": simpler, "mujoco": mujoco}[config.backend]
    load = os.getloadavg()[0]
    rows = measure(task_named(config.task), config)
    console = Console() if Console().is_terminal else Console(width=100)
    console.print(table(rows, f"{config.backend}, {config.task}"))
    console.print(f"{os.cpu_count()} cores, load at the start {load:.1f}")
    return rows


def simpler(task: Task, config: BenchConfig) -> list[Row]:
    """The scene on SAPIEN, its picture SIMPLER's size with a photograph."""
    from selfflow.envs.simpler import make_simpler

    blind = make_simpler(task, "grid", pictures=False)
    blind.reset(seed=0)
    physics = steps(blind, config.steps)
    blind.close()
    env = make_simpler(task, "grid")
    ((height, width),) = env.simulator.image_shapes.values()
    first = clocked(lambda: env.reset(seed=0))
    seen = steps(env, config.steps)
    resets = [clocked(lambda s=seed: env.reset(seed=s)) for seed in range(config.resets)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    env.close()
    return [
        Row("control step, no picture", milli(physics), "ms", 40.0),
        Row(f"control step, {height} x {width}, ibl", milli(seen), "ms", 95.0),
        Row("reset with its picture", resets, "s", 1.2),
        Row("first reset of a process", [first], "s"),
        Row(f"peak memory after {config.resets} resets", [peak], "GB", 1.2),
    ]


def mujoco(task: Task, config: BenchConfig) -> list[Row]:
    """The twin: its three scenes, `task` first, and what a second process adds with that task."""
    names = dict.fromkeys([task.name, *SCENES])
    rows = [row for name in names for row in cost(task_named(name), config)]
    return rows + [speed_up(task, config, pictures) for pictures in (False, True)]


def cost(task: Task, config: BenchConfig) -> list[Row]:
    """One process in one of the twin's scenes."""
    from selfflow.envs.twin import make_mujoco

    built = [clocked(lambda: make_mujoco(task, "grid", pictures=False)) for _ in range(5)]
    blind, env = make_mujoco(task, "grid", pictures=False), make_mujoco(task, "grid")
    resets = [clocked(lambda s=seed: blind.reset(seed=s)) for seed in range(config.resets)]
    physics = steps(blind, config.steps)
    env.reset(seed=0)  # opens the renderer
    shown = [clocked(lambda s=seed: env.reset(seed=s)) for seed in range(config.resets)]
    seen = steps(env, config.steps)
    pictures = [clocked(env.render) for _ in range(config.steps)]
    env.close()
    return [
        Row(f"{task.name}: scene construction", built, "s", 0.3),
        Row("reset", milli(resets), "ms", 30.0),
        Row("reset with its picture", milli(shown), "ms"),
        Row("control step, no picture", milli(physics), "ms", 8.0),
        Row("control step, 128 x 160", milli(seen), "ms", 25.0),
        Row("picture", milli(pictures), "ms"),
    ]


def speed_up(task: Task, config: BenchConfig, pictures: bool) -> Row:
    """Steps a second of a vectorised environment of two processes, to those of one process."""
    from selfflow.envs.twin import make_mujoco

    env = make_mujoco(task, "grid", pictures=pictures)
    env.reset(seed=0)
    alone = statistics.median(steps(env, config.steps))
    env.close()
    together = statistics.median(vector_steps(task, config.steps, pictures))
    what = "with pictures" if pictures else "no pictures"
    return Row(f"speed of 2 processes, {what}", [2 * alone / together], "x", SPEED_UP, least=True)


def steps(env: RobotEnv, count: int) -> list[float]:
    """Seconds of each control step, from a new start where the episode is over."""
    actions = small_actions(count)
    found = []
    for n in range(count):
        if n and n % env.task.max_steps == 0:
            env.reset(seed=n)
        found.append(clocked(lambda a=actions[n]: env.step(a)))
    return found


def vector_steps(task: Task, count: int, pictures: bool) -> list[float]:
    """Seconds of each step of gymnasium's vector environment with two worker processes."""
    from selfflow.envs.twin import make_mujoco

    makers: Any = [lambda: make_mujoco(task, "grid", pictures=pictures)] * 2
    vector = gymnasium.vector.AsyncVectorEnv(makers, context="spawn")
    try:
        vector.reset(seed=[0, 1])
        pairs = [np.stack([action, action]) for action in small_actions(count)]
        return [clocked(lambda a=pair: vector.step(a)) for pair in pairs]
    finally:
        vector.close()


def small_actions(count: int) -> np.ndarray:
    """float32 (count, 7): centimetres and a few degrees in any direction."""
    rng = np.random.default_rng(0)
    high = np.array([0.03] * 3 + [0.1] * 3)
    moves = rng.uniform(-high, high, (count, 6))
    return np.concatenate([moves, np.ones((count, 1))], axis=1).astype(np.float32)


def clocked(work: Callable[[], object]) -> float:
    """Seconds that it took."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def milli(seconds: list[float]) -> list[float]:
    return [1e3 * s for s in seconds]


def table(rows: list[Row], title: str) -> Table:
    """Smallest, median and largest value a row, and whether the median keeps to the bar."""
    out = Table(title=title, title_justify="left")
    for name in ("what", "n", "min", "median", "max", "bar", ""):
        out.add_column(name, justify="left" if name in ("what", "") else "right")
    for row in rows:
        middle = statistics.median(row.values)
        cells = [f"{x:.3g} {row.unit}" for x in (min(row.values), middle, max(row.values))]
        bar = "" if row.bar is None else f"{'≥' if row.least else '≤'} {row.bar:g} {row.unit}"
        out.add_row(row.what, str(len(row.values)), *cells, bar, row.verdict)
    return out


if __name__ == "__main__":
    launch(BenchConfig, main, "bench_sim", check)
