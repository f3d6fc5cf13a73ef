"""Open-loop error by phase: a policy's chunks against what a demonstration did, step by step.

The policy is shown the demonstration's own observations and predicts a whole chunk every K steps,
so that every action is predicted once. What follows a change of instruction within a chunk is left
out: it was planned for another one. T steps, K actions of a chunk, N actions in all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from rich.progress import Progress

from selfflow.datasets.episodes import EpisodeSource, Measures
from selfflow.datasets.spec import (
    GRIPPER,
    OPENING,
    POSITION,
    ROTATION,
    Observation,
    Task,
    UserError,
)
from selfflow.eval.bootstrap import mean, resamples
from selfflow.eval.phases import END, Watch, phases_of
from selfflow.eval.world_tables import Section
from selfflow.policies.base import Policy

ACTED = "after all phases"  # a demonstration ends in success
WHAT = ("position (m)", "rotation (rad)", "opening")


@dataclass(frozen=True)
class Errors:
    """|predicted - recorded| of N actions; `still` that of no motion, the gripper kept."""

    episode: Int[np.ndarray, "N"]
    phase: list[str]  # the first that was not passed yet
    predicted: Float[np.ndarray, "N 3"]  # as WHAT
    still: Float[np.ndarray, "N 3"]


def episodes_of(source: EpisodeSource, task: Task, count: int) -> range:
    """The last episodes, `count` at most. Raises UserError for data of another task, or without
    the simulator's state."""
    if len(source) == 0:
        raise UserError(f"data: {source.name} holds no episodes")
    first = max(0, len(source) - count)
    recorded = source.metadata(first).get("task", task.name)
    if recorded != task.name:
        raise UserError(
            f"data: {source.name} holds {recorded}, the rollout is of {task.name}; give that"
        )
    states(source, first)
    return range(first, len(source))


def states(source: EpisodeSource, i: int) -> list[dict[str, np.ndarray]]:
    """The simulator's state at every step. Raises UserError where the data do not hold it."""
    keys = source.measures if isinstance(source, Measures) else ()
    found = {key: source.measured(i, key) for key in keys} if isinstance(source, Measures) else {}
    held = {key: values for key, values in found.items() if values is not None}
    if "tool" not in held:
        raise UserError(
            f"data: {source.name} does not hold the simulator's state; give what "
            "eval/record_demos.py recorded, or leave data=[]"
        )
    return [{k: v[t] for k, v in held.items()} for t in range(source.length(i))]


def phase_by_step(task: Task, seen: Sequence[dict[str, np.ndarray]]) -> list[str]:
    """At each step the first phase that was not passed yet."""
    watch, names = Watch(task, seen[0]), []
    for step, state in enumerate(seen):
        watch.see(state, False, step)
        names.append(ACTED if watch.next == END else watch.next)
    return names


def open_loop(
    policy: Policy,
    chunk: int,
    parts: Sequence[tuple[EpisodeSource, range]],
    task: Task,
    progress: Progress,
) -> Errors:
    """Of a policy that executes `chunk` actions a decision, on these episodes."""
    bar = progress.add_task("open loop", total=sum(len(episodes) for _, episodes in parts))
    rows: list[tuple[int, str, np.ndarray, np.ndarray]] = []
    number = 0
    for source, episodes in parts:
        for i in episodes:
            names = phase_by_step(task, states(source, i))
            for t, predicted, real, opening in _chunks(policy, chunk, source, i):
                rest = np.zeros_like(real)
                rest[:, GRIPPER] = opening
                pairs = zip(_sizes(predicted - real), _sizes(rest - real), strict=True)
                rows += [(number, names[t + k], *pair) for k, pair in enumerate(pairs)]
            number += 1
            progress.advance(bar)
    numbers, phases, predicted, still = zip(*rows, strict=True)
    return Errors(np.array(numbers), list(phases), np.stack(predicted), np.stack(still))


def _chunks(
    policy: Policy, chunk: int, source: EpisodeSource, i: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, float]]:
    """(step, predicted, recorded (k, 7), measured opening) of every chunk of an episode."""
    signals, camera = source.signals(i), source.cameras[0]
    policy.reset(i)
    for t in range(0, len(signals.actions), chunk):
        told = signals.instruction[t]
        ahead = range(t, min(t + chunk, len(signals.actions)))
        usable = (signals.action_valid[s] and signals.instruction[s] == told for s in ahead)
        last = next((s for s, use in zip(ahead, usable, strict=True) if not use), ahead.stop)
        observation: Observation = {
            "images": {camera: source.frames(i, [t])[0]},
            "proprio": signals.proprio[t],
            "instruction": told,
        }
        predicted = policy.act(observation).actions[: last - t]
        if last > t:
            yield t, predicted, signals.actions[t:last], float(signals.proprio[t, OPENING])


def _sizes(change: Float[np.ndarray, "k 7"]) -> Float[np.ndarray, "k 3"]:
    return np.stack(
        [
            np.linalg.norm(change[:, POSITION], axis=1),
            np.linalg.norm(change[:, ROTATION], axis=1),
            np.abs(change[:, GRIPPER]),
        ],
        1,
    )


def section(errors: Errors, task: Task, count: int, seed: int) -> Section:
    """Means by phase with 95 % intervals over episodes; beside them those of no motion."""
    weights = resamples(int(errors.episode.max()) + 1, count, seed)
    columns = [f"{what}{of}" for what in WHAT for of in ("", ", no motion")]
    names = [*(p.name for p in phases_of(task)), ACTED]
    rows = []
    for name in [name for name in names if name in errors.phase]:
        own = np.array([phase == name for phase in errors.phase])
        cells = [
            mean(values[own, j], errors.episode[own], weights)
            for j in range(len(WHAT))
            for values in (errors.predicted, errors.still)
        ]
        rows.append((f"until {name}" if name != ACTED else name, [*cells]))
    return Section("open_loop", "Open-loop error by phase", columns, rows, digits=4)
