"""Runs the seeds of a rollout, here or spread over processes, and reports as it goes."""

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfflow.datasets.spec import Observation, UserError
from selfflow.envs.base import RobotEnv
from selfflow.eval.parts import RolloutConfig, make_env, make_policy
from selfflow.eval.rollout import Episode, Info, run_episode
from selfflow.eval.video import Film, captioned, contact_sheet, thumbnail
from selfflow.policies.base import Policy


@dataclass(frozen=True)
class Ready:
    """A worker's environment and policy stand."""


@dataclass(frozen=True)
class Stepped:
    """An episode has come to this step; `latency` is its latest decision's, in seconds."""

    seed: int
    step: int
    latency: float


Message = Ready | Stepped | Episode | UserError
Report = Callable[[Message], None]


def run_seeds(config: RolloutConfig, seeds: Sequence[int], folder: Path, report: Report) -> None:
    """Runs every seed; films go to `folder`, which is created once an environment stands.

    Raises UserError as the makers do, RuntimeError where a worker process has died.
    """
    workers = min(config.workers, len(seeds))
    if workers == 1:
        _run(config, seeds, folder, report)
        return
    context = multiprocessing.get_context("spawn")  # a forked renderer or torch may hang
    messages = context.Queue()
    processes = [
        context.Process(
            target=_work, args=(config, list(seeds[i::workers]), folder, messages), daemon=True
        )
        for i in range(workers)
    ]
    with _one_thread():
        for process in processes:
            process.start()
    try:
        for message in _until_all_ended(processes, messages):
            if isinstance(message, UserError):
                raise message
            report(message)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _work(config: RolloutConfig, seeds: Sequence[int], folder: Path, messages) -> None:
    """A worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends us
    try:
        _run(config, seeds, folder, messages.put)
    except UserError as e:
        messages.put(e)


def _run(config: RolloutConfig, seeds: Sequence[int], folder: Path, report: Report) -> None:
    env = make_env(config)
    try:
        policy = make_policy(config, env)
        folder.mkdir(parents=True, exist_ok=True)
        report(Ready())
        for seed in seeds:
            report(_episode(config, env, policy, seed, folder, report))
    finally:
        env.close()


def _episode(
    config: RolloutConfig, env: RobotEnv, policy: Policy, seed: int, folder: Path, report: Report
) -> Episode:
    """One episode, filmed if it is among the first `videos`."""

    def on_step(step: int, latency: float) -> None:
        report(Stepped(seed, step, latency))

    number = seed - config.seed
    if number >= config.videos:
        return run_episode(env, policy, seed, on_step=on_step)
    frames: list[np.ndarray] = []  # of the first episode, for its contact sheet
    camera = env.embodiment.cameras[0]
    with ExitStack() as stack:
        film = stack.enter_context(Film(folder / f"episode_{seed}.mp4", env.embodiment.control_hz))

        def record(observation: Observation, info: Info, step: int) -> None:
            image = observation["images"][camera]
            frame = captioned(image, observation["instruction"], step, info["success"])
            film.add(frame)
            if number == 0:
                frames.append(thumbnail(frame))

        episode = run_episode(env, policy, seed, record, on_step)
    if frames:
        contact_sheet(frames, folder / f"episode_{seed}.png")
    return episode


def _until_all_ended(processes: list, messages) -> Iterator[Message]:
    """Messages until every process has ended and the queue is empty."""
    while True:
        ended = [not process.is_alive() for process in processes]  # before the queue is looked at
        try:
            yield messages.get(timeout=0.2)
        except queue.Empty:
            died = [p.exitcode for p in processes if p.exitcode]
            if died:
                raise RuntimeError(f"a rollout worker died with exit code {died[0]}") from None
            if all(ended):
                return


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started inside compute on one thread each."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
