"""Work spread over processes, and the seeds of a rollout run so; both report as they go."""

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfflow.datasets.spec import Observation, UserError
from selfflow.envs.base import RobotEnv
from selfflow.eval.beside import Beside
from selfflow.eval.parts import RolloutConfig, make_env, make_policy
from selfflow.eval.rollout import Episode, Info, run_episode
from selfflow.eval.video import Film, captioned, contact_sheet, thumbnail
from selfflow.policies.base import Imagines, Policy
from selfflow.policies.limits import Limiter, Limits


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
    spread = [(config, list(seeds[i::workers]), folder) for i in range(workers)]
    run_jobs(_run, spread, report)


def run_jobs(
    work: Callable[..., None], jobs: Sequence[tuple], report: Callable[[Any], None]
) -> None:
    """Calls work(*job, report) for each job: a single one here, several in a process each.

    What the processes report is reported here, and their UserError is raised here; `work` and jobs
    must pickle. However this ends, the processes have ended. Raises RuntimeError if one has died.
    """
    if len(jobs) <= 1:
        for job in jobs:
            work(*job, report)
        return
    context = multiprocessing.get_context("spawn")  # a forked renderer or torch may hang
    messages = context.Queue()  # before SIGINT is blocked: it may start a process that unblocks it
    processes = [
        context.Process(target=_worker, args=(work, job, messages), daemon=True) for job in jobs
    ]
    try:
        with _for_workers():
            for process in processes:
                process.start()
        for message in _until_all_ended(processes, messages):
            if isinstance(message, UserError):
                raise message
            report(message)
    finally:
        for process in processes:
            if process.pid is not None:  # it was started
                process.terminate()
                process.join()


def _worker(work: Callable[..., None], job: tuple, messages) -> None:
    """A worker process."""
    parent = multiprocessing.parent_process()

    def report(message: Any) -> None:
        if parent and not parent.is_alive():  # killed; nobody reads what we would report
            messages.cancel_join_thread()
            raise SystemExit(1)
        messages.put(message)

    try:
        work(*job, report)
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
    """One episode, filmed if it is among the first `videos` and there are pictures."""

    def on_step(step: int, latency: float) -> None:
        report(Stepped(seed, step, latency))

    number = seed - config.seed
    filmed = number < config.videos and config.pictures
    limiter = Limiter(config.limits) if config.limits != Limits() else None
    if isinstance(policy, Imagines):
        policy.imagine = filmed
    if not filmed:
        return run_episode(env, policy, seed, on_step=on_step, limiter=limiter)
    beside = Beside(policy) if isinstance(policy, Imagines) else None
    frames: list[np.ndarray] = []  # of the first episode, for its contact sheet
    camera = env.embodiment.cameras[0]
    with ExitStack() as stack:
        film = stack.enter_context(Film(folder / f"episode_{seed}.mp4", env.embodiment.control_hz))

        def record(observation: Observation, info: Info, step: int) -> None:
            image = observation["images"][camera]
            told = observation["instruction"]
            if beside:
                image, told = beside(image, step), f"{told}   (real | imagined)"
            frame = captioned(image, told, step, info["success"])
            film.add(frame)
            if number == 0:
                frames.append(thumbnail(frame))

        episode = run_episode(env, policy, seed, record, on_step, limiter)
    if frames:
        contact_sheet(frames, folder / f"episode_{seed}.png")
    return episode


def _until_all_ended(processes: list, messages) -> Iterator[Any]:
    """Messages until every process has ended and the queue is empty."""
    while True:
        ended = all(not process.is_alive() for process in processes)  # before the queue is read
        died = [process.exitcode for process in processes if process.exitcode]
        try:
            yield messages.get(timeout=0 if died else 0.2)
        except queue.Empty:
            if died:
                raise RuntimeError(f"a worker process died with exit code {died[0]}") from None
            if ended:
                return


@contextmanager
def _for_workers() -> Iterator[None]:
    """Processes started inside compute on one thread each, and never see Ctrl-C, not even while
    they start: the terminal sends it to the parent too, which ends them."""
    before = os.environ.get("OMP_NUM_THREADS")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
