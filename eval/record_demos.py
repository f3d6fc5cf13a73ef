"""python eval/record_demos.py task=open_drawer_place episodes=200

Records a scripted expert into an episode store: about 3 s an episode and process in the twin. The
store holds native-size images, the expert's action (label) and the executed one (label + noise),
proprioception, privileged state, seed and every random draw. Run again, it continues the store;
Ctrl-C or SIGKILL loses at most the episode in progress.
"""

import multiprocessing
import queue
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfflow.configs.entry import launch, one_of
from selfflow.datasets.spec import UserError, check_seeds, task_named
from selfflow.datasets.store import EpisodeRecord, EpisodeStore, StoreHeader, StoreWriter
from selfflow.envs.base import RobotEnv
from selfflow.envs.expert import DrawerExpert, perturb
from selfflow.envs.tasks import RULES
from selfflow.eval.parts import BACKENDS, PLACEMENTS
from selfflow.eval.video import contact_sheet


@dataclass(frozen=True)
class RecordConfig:
    """Every key of configs/record.yaml, which explains them."""

    task: str
    backend: str
    placement: str
    episodes: int
    seed: int
    workers: int
    noise: float
    noise_turn: float
    noisy_episodes: float
    noisy_steps: float
    linger: int
    keep_failures: bool
    out: str


def check(config: RecordConfig) -> None:
    """Raises UserError for whatever can be wrong before work begins."""
    task = task_named(config.task)
    if task.name not in RULES:
        raise UserError(f"task={task.name}: not built yet; choose one of {', '.join(RULES)}")
    one_of("backend", config.backend, BACKENDS)
    one_of("placement", config.placement, PLACEMENTS)
    check_seeds(config.seed, config.episodes, "train")
    for key, least in (("episodes", 1), ("workers", 1), ("linger", 0)):
        if getattr(config, key) < least:
            raise UserError(f"{key}={getattr(config, key)}: must be {least} or more")


def record_episode(
    env: RobotEnv, expert: DrawerExpert, seed: int, config: RecordConfig
) -> EpisodeRecord:
    """One attempt; `success` says how it ended. The noise is drawn from the seed too."""
    rng = np.random.default_rng([seed, 1])
    noisy = bool(rng.random() < config.noisy_episodes)
    observation, info = env.reset(seed=seed)
    expert.reset()
    seen, states, labels, executed, terminate = [observation], [info["privileged"]], [], [], []
    left, draws, truncated = config.linger, info["draws"] | {"noisy": float(noisy)}, False
    while not truncated and left > 0:
        label, done = expert.act(info["privileged"])
        label, _ = env.embodiment.clip(label)
        terminate.append(done and not env.final_subtask)
        action = label
        if noisy and rng.random() < config.noisy_steps:
            action = perturb(label, rng, config.noise, config.noise_turn)
            action, _ = env.embodiment.clip(action)
        if terminate[-1]:
            env.advance_subtask()
        observation, _, _, truncated, info = env.step(action)
        labels.append(label)
        executed.append(action)
        seen.append(observation)
        states.append(info["privileged"])
        left -= bool(info["success"])
    return EpisodeRecord(
        images={k: [o["images"][k] for o in seen] for k in seen[0]["images"]},
        proprio=np.stack([o["proprio"] for o in seen]),
        actions=np.stack(labels).astype(np.float32),
        executed=np.stack(executed).astype(np.float32),
        terminate=np.array(terminate),
        instruction=[o["instruction"] for o in seen],
        seed=seed,
        success=bool(info["success"]),
        privileged={k: np.stack([s[k] for s in states]) for k in states[0]},
        draws=draws,
        meta={"progress": info["progress"], "ik_failed": info["ik_failed"]},
    )


def work(config: RecordConfig, worker: int, reports: Any) -> None:
    """One process: attempts seeds seed + worker, + workers, ... until its share is stored."""
    task = task_named(config.task)
    env = BACKENDS[config.backend](task, config.placement)
    header = StoreHeader(task.embodiment, task.name, env.embodiment.cameras, config.backend)
    share = len(range(worker, config.episodes, config.workers))
    with StoreWriter(config.out, f"{worker:03d}", header) as writer:
        seen = EpisodeStore(config.out).seeds()
        mine = range(config.seed + worker, 100_000, config.workers)
        attempts = iter(s for s in mine if s not in seen)
        kept = sum(s in seen for s in mine) - len(
            set(EpisodeStore(config.out).failures) & set(mine)
        )
        while kept < share:
            seed = next(attempts)
            record = record_episode(env, DrawerExpert(task), seed, config)
            if record.success or config.keep_failures:
                writer.append(record)
                kept += 1
            else:
                writer.note_failure(seed, f"no success in {len(record.actions)} steps")
            reports.put((record.success, len(record.actions)))
    env.close()


def main(config: RecordConfig) -> None:
    """Starts the workers and shows their progress."""
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    jobs = [
        context.Process(target=work, args=(config, worker, reports), daemon=True)
        for worker in range(config.workers)
    ]
    before = len(EpisodeStore(config.out)) if (Path(config.out) / "store.json").exists() else 0
    for job in jobs:
        job.start()
    start, results = time.monotonic(), []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(config.task, total=config.episodes, completed=before)
        while any(job.is_alive() for job in jobs) or not reports.empty():
            try:
                results.append(reports.get(timeout=0.5))
            except queue.Empty:
                continue
            good = sum(success for success, _ in results)
            rate = len(results) / (time.monotonic() - start) * 60
            kept = len(results) if config.keep_failures else good
            text = f"{config.task}: {good}/{len(results)} succeed, {rate:.0f} episodes/min"
            progress.update(bar, completed=before + kept, description=text)
    if any(job.exitcode for job in jobs):
        raise RuntimeError(f"a worker failed: exit codes {[job.exitcode for job in jobs]}")
    store = EpisodeStore(config.out)
    sheet = Path(config.out) / "contact_sheet.png"
    first = [store.frames(i, range(0, store.length(i), 16)) for i in range(min(6, len(store)))]
    contact_sheet([frame for row in first for frame in row[:8]], sheet, columns=8, count=48)
    steps = np.mean([store.length(i) for i in range(len(store))])
    print(
        f"{len(store)} episodes of {steps:.0f} steps on average, {len(store.failures)} failed "
        f"attempts not kept, {store.skipped} unreadable; look at {sheet}"
    )


if __name__ == "__main__":
    launch(RecordConfig, main, "record", check=check)
