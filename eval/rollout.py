"""One episode, pure: environment, policy and seed in, an Episode out. No files, no printing."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfflow.datasets.spec import TOOL_POSITION, ActionChunk, Observation
from selfflow.envs.base import RobotEnv
from selfflow.eval.phases import Watch
from selfflow.policies.base import Policy
from selfflow.policies.limits import Limiter

Info = dict[str, Any]
Record = Callable[[Observation, Info, int], None]
STEP_LIMIT, TERMINATED, BAD_ACTION = "step limit", "policy terminated", "action not finite"


@dataclass(frozen=True)
class Episode:
    """What one episode came to. Success is read three ways, since published numbers differ by it:

    | reading | true where success holds |
    |---|---|
    | `success` | at the last step (SIMPLER's official rule) |
    | `early_stop` | when the policy is asked for its next chunk, or at the end: what a harness sees that looks once a decision and stops there |
    | `ever` | at any step; `first_success` is its number, from 1 |
    """  # noqa: E501

    seed: int
    success: bool
    early_stop: bool
    ever: bool
    first_success: int | None
    steps: int
    reason: str  # STEP_LIMIT, TERMINATED or BAD_ACTION
    latencies: tuple[float, ...]  # seconds a decision
    subtask_steps: tuple[int, ...]  # after how many steps each further subtask began
    progress: dict[str, float]  # the task's own measures at the end
    clipped: int  # actions out of range
    ik_failed: int  # steps at which the arm held still
    limited: dict[str, int] = field(default_factory=dict)  # Limiter.counts; empty without limits
    # of eval/phases.py, the first failing one's in `nearest`; empty where older runs did not note
    phases: dict[str, int] = field(default_factory=dict)  # step at which each was reached
    nearest: tuple[int, float] | None = None  # step, m


@dataclass
class _Tally:
    """What is noted while an episode runs."""

    info: Info
    watch: Watch
    steps: int = 0
    early_stop: bool = False
    first_success: int | None = None
    latencies: list[float] = field(default_factory=list)
    subtask_steps: list[int] = field(default_factory=list)

    def after_step(self, info: Info) -> None:
        self.steps += 1
        if info["subtask"] != self.info["subtask"]:  # the environment forced it
            self.subtask_steps.append(self.steps)
        self.info = info
        self.watch.see(info["privileged"], bool(info["success"]), self.steps)
        if info["success"] and self.first_success is None:
            self.first_success = self.steps

    def finish(self, seed: int, reason: str, limiter: Limiter | None) -> Episode:
        success = bool(self.info["success"])
        return Episode(
            seed=seed,
            success=success,
            early_stop=self.early_stop or success,
            ever=success or self.first_success is not None,
            first_success=self.first_success,
            steps=self.steps,
            reason=reason,
            latencies=tuple(self.latencies),
            subtask_steps=tuple(self.subtask_steps),
            progress={k: float(v) for k, v in self.info["progress"].items()},
            clipped=int(self.info["clipped"]),
            ik_failed=int(self.info["ik_failed"]),
            limited=dict(limiter.counts) if limiter else {},
            phases=self.watch.reached,
            nearest=self.watch.nearest,
        )


def run_episode(
    env: RobotEnv,
    policy: Policy,
    seed: int,
    record: Record | None = None,
    on_step: Callable[[int, float], None] | None = None,
    limiter: Limiter | None = None,
) -> Episode:
    """Runs the policy from reset to the step limit or until it terminates the last subtask.

    Chunks are executed whole. A chunk's rest is dropped, and the policy asked again, where a
    subtask ends: before action k where `terminate[k]` holds, or after a step at which the
    environment has changed the instruction. `limiter` has the last word on every action.

    `record(observation, info, step)` sees the reset (step 0) and every step; without it pictures
    are drawn only where the policy looks at them. After every step `on_step(step, latency)` is
    given the latest decision's seconds.
    """
    pictures = env.pictures
    env.pictures = pictures and record is not None
    try:
        return _run(env, policy, seed, pictures, record, on_step, limiter)
    finally:
        env.pictures = pictures


def _run(
    env: RobotEnv,
    policy: Policy,
    seed: int,
    pictures: bool,
    record: Record | None,
    on_step: Callable[[int, float], None] | None,
    limiter: Limiter | None,
) -> Episode:
    observation, info = env.reset(seed=seed)
    policy.reset(seed)
    if limiter:
        limiter.reset()
    tally = _Tally(info, Watch(env.task, info["privileged"]))
    if record:
        record(observation, info, 0)
    while True:
        tally.early_stop |= bool(tally.info["success"])
        if pictures != env.pictures:
            observation = env.observe(pictures)
        start = time.perf_counter()
        chunk = policy.act(observation)
        tally.latencies.append(time.perf_counter() - start)
        for action, terminate in actions_of(chunk):
            if terminate and env.final_subtask:
                return tally.finish(seed, TERMINATED, limiter)
            if terminate:
                observation = env.advance_subtask()
                tally.info = tally.info | {"subtask": env.subtask}
                tally.subtask_steps.append(tally.steps)
                break
            if not np.all(np.isfinite(action)):
                return tally.finish(seed, BAD_ACTION, limiter)
            if limiter:
                action = limiter(action, observation["proprio"][TOOL_POSITION])
            instruction = observation["instruction"]
            observation, _, _, truncated, info = env.step(action)
            tally.after_step(info)
            if record:
                record(observation, info, tally.steps)
            if on_step:
                on_step(tally.steps, tally.latencies[-1])
            if truncated:
                return tally.finish(seed, STEP_LIMIT, limiter)
            if observation["instruction"] != instruction:
                break


def actions_of(chunk: ActionChunk) -> list[tuple[np.ndarray, bool]]:
    """Each action, and whether the subtask ends before it. A ValueError for an empty chunk."""
    if len(chunk.actions) == 0:
        raise ValueError("a policy returned an empty chunk")
    ends = chunk.terminate if chunk.terminate is not None else np.zeros(len(chunk.actions), bool)
    return [(action, bool(end)) for action, end in zip(chunk.actions, ends, strict=True)]
