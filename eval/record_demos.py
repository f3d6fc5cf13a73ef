"""python eval/record_demos.py task=open_drawer_place episodes=200

Records a scripted expert into an episode store: about 3 s an episode and process in the twin; in
SIMPLER's scenes (backend=simpler) 9 s, on placements that keep away from every evaluation cell. The
store holds native-size images, the expert's action (label) and the executed one (label + noise),
proprioception, privileged state, seed and every random draw. With `checkpoint` a policy drives
first, and what the expert does from there on is recorded (eval/handover.py). Run again, it
continues the store; Ctrl-C or SIGKILL loses at most the episode in progress.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfflow.configs.entry import launch
from selfflow.datasets.spec import SEEDS, UserError, task_named
from selfflow.datasets.store import EpisodeRecord, EpisodeStore, StoreWriter
from selfflow.envs.base import RobotEnv
from selfflow.envs.expert import perturb
from selfflow.envs.simpler_expert import Script, expert_for
from selfflow.envs.tasks import config_with
from selfflow.eval.handover import drive
from selfflow.eval.parts import BACKENDS, noted, twin_options
from selfflow.eval.record_config import RecordConfig, check, header_of, make_driver
from selfflow.eval.video import contact_sheet
from selfflow.eval.workers import run_jobs
from selfflow.policies.base import Policy

Attempt = tuple[bool, bool]  # whether it succeeded, whether it is kept


def record_episode(
    env: RobotEnv, expert: Script, seed: int, config: RecordConfig, driver: Policy | None = None
) -> EpisodeRecord:
    """One attempt; `success` says how it ended. The noise is drawn from the seed too."""
    rng = np.random.default_rng([seed, 1])
    noisy = bool(rng.random() < config.noisy_episodes)
    observation, info = env.reset(seed=seed)
    expert.reset(info["privileged"])
    draws, driven = info["draws"] | {"noisy": float(noisy)}, 0
    if driver:
        steps = int(rng.integers(config.handover[0], config.handover[1] + 1))
        observation, info, driven = drive(env, driver, observation, info, seed, steps)
    begun = env.subtask
    seen, states, labels, executed, terminate = [observation], [info["privileged"]], [], [], []
    left, truncated = config.linger, False
    while not truncated and left > 0:
        label, done = expert.act(info["privileged"])
        if done and not (labels or driven or env.final_subtask):
            # fulfilled before anyone acted: shown, it teaches to say "done" at first sight
            seen[0], begun, done = env.advance_subtask(), begun + 1, False
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
        images={k: [o["images"][k] for o in seen] for k in env.embodiment.cameras},
        proprio=np.stack([o["proprio"] for o in seen]),
        actions=np.stack(labels).astype(np.float32),
        executed=np.stack(executed).astype(np.float32),
        terminate=np.array(terminate),
        instruction=[o["instruction"] for o in seen],
        seed=seed,
        success=bool(info["success"]),
        privileged={k: np.stack([s[k] for s in states]) for k in states[0]},
        draws=draws,
        meta={
            "progress": info["progress"],
            "ik_failed": info["ik_failed"],
            # a subtask began before the last was done
            "forced": env.subtask - begun > sum(terminate),
            "noise": config.noise * noisy,  # of this episode: another run may continue the store
            "noise_turn": config.noise_turn * noisy,
            "noisy_steps": config.noisy_steps * noisy,
        }
        | ({"driven": driven, "driver": config.checkpoint} if driver else {})
        | options_meta(config),
    )


def options_meta(config: RecordConfig) -> dict[str, Any]:
    """The twin's options and the task's for an episode's meta."""
    own = {"task_config": json.dumps(config.task_config)}
    return (noted(twin_options(config)) if config.backend == "mujoco" else {}) | own


def make_recorded(config: RecordConfig) -> RobotEnv:
    """The environment that is recorded. Raises UserError."""
    header = header_of(config)
    options: dict[str, Any] = {"image_size": header.image_size} if header.image_size else {}
    if config.backend == "mujoco":
        options |= twin_options(config)
    task = task_named(config.task)
    env = BACKENDS[config.backend](task, header.placement, **options)
    return env.with_config(config_with(task, config.task_config))


def tell_mixture(config: RecordConfig) -> None:
    """Prints a line where `out` holds episodes with other options of the twin or the task."""
    if not (Path(config.out) / "store.json").exists():
        return
    ours, store = options_meta(config), EpisodeStore(config.out)
    held = [{"task_config": "{}", **store.metadata(i)} for i in range(len(store))]
    other = {f"{k}={m[k]}" for m in held for k, v in ours.items() if k in m and m[k] != v}
    if other:
        print(
            f"{config.out} holds episodes with {', '.join(sorted(other))}; it is continued with "
            "this command's, and every episode's meta says which it had",
            flush=True,
        )


def fault(record: EpisodeRecord) -> str:
    """Why the attempt is no demonstration; empty where it is one."""
    if not record.success:
        return f"no success in {len(record.actions)} steps"
    if record.meta.get("forced"):  # then what was shown is not what the instruction says
        return "the next subtask was forced before the last was done"
    return ""


def seeds_of(config: RecordConfig, worker: int) -> range:
    """The seeds that a worker may attempt: seed + worker, + workers, ..."""
    return range(config.seed + worker, SEEDS["train"].stop, config.workers)


def shares(config: RecordConfig) -> list[int]:
    """Episodes that each worker has yet to record, in all what `out` lacks of `episodes`.

    A worker's part lies in its own seeds, so that a continued recording attempts what one that was
    never stopped does. Where kept episodes have seeds of another run's `workers` or `seed`, those
    parts would come to more than is lacking, and the last workers record less.
    """
    kept: set[int] = set()
    if (Path(config.out) / "store.json").exists():
        store = EpisodeStore(config.out)
        kept = store.seeds() - set(store.failures)
    counts = []
    for worker in range(config.workers):
        mine = seeds_of(config, worker)
        part = len(range(worker, config.episodes, config.workers))
        counts.append(max(0, part - sum(seed in mine for seed in kept)))
    excess = sum(counts) - max(0, config.episodes - len(kept))
    for worker in reversed(range(config.workers)):
        less = min(counts[worker], excess)
        counts[worker], excess = counts[worker] - less, excess - less
    return counts


def work(config: RecordConfig, worker: int, count: int, report: Callable[[Attempt], None]) -> None:
    """Attempts the worker's seeds in turn until `count` episodes more are stored.

    Raises UserError as the environment's maker does, and when train seeds are used up.
    """
    task, header, driver = task_named(config.task), header_of(config), make_driver(config)
    env = make_recorded(config)
    try:
        with StoreWriter(config.out, f"{worker:03d}", header) as writer:
            seen = EpisodeStore(config.out).seeds()
            attempts = (seed for seed in seeds_of(config, worker) if seed not in seen)
            while count > 0:
                seed = next(attempts, None)
                if seed is None:
                    raise UserError(
                        f"seed={config.seed}: no train seeds are left up to "
                        f"{SEEDS['train'].stop - 1}; choose a lower first seed"
                    )
                record = record_episode(env, expert_for(task), seed, config, driver)
                wrong = fault(record)
                keep = not wrong or config.keep_failures
                if keep:
                    writer.append(record)
                    count -= 1
                else:
                    writer.note_failure(seed, wrong)
                report((not wrong, keep))
    finally:
        env.close()


class Display:
    """A progress bar on a terminal, else a plain line every 10 attempts."""

    def __init__(self, config: RecordConfig, missing: int) -> None:
        self._config, self._start = config, time.monotonic()
        self._kept, self._attempts, self._good = config.episodes - missing, 0, 0
        console = Console()
        self._plain = not console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=self._plain,
        )
        self._bar = self.progress.add_task(config.task, total=config.episodes, completed=self._kept)

    def update(self, attempt: Attempt) -> None:
        """Counts and shows an attempt."""
        success, kept = attempt
        self._attempts, self._good = self._attempts + 1, self._good + success
        self._kept += kept
        rate = self._attempts / (time.monotonic() - self._start) * 60
        text = (
            f"{self._config.task}: {self._good}/{self._attempts} succeed, {rate:.0f} attempts/min"
        )
        self.progress.update(self._bar, completed=self._kept, description=text)
        if self._plain and self._attempts % 10 == 0:
            print(f"{text}, {self._kept}/{self._config.episodes} episodes", flush=True)


def main(config: RecordConfig) -> None:
    """Starts the workers, shows their progress, and says what the store holds."""
    counts = shares(config)
    tell_mixture(config)
    display = Display(config, sum(counts))
    jobs = [(config, worker, count) for worker, count in enumerate(counts) if count]
    try:
        with display.progress:
            run_jobs(work, jobs, display.update)
    except KeyboardInterrupt:
        print(f"stopped; the same command continues {config.out}")
        raise
    store = EpisodeStore(config.out)
    sheet = Path(config.out) / "contact_sheet.png"
    rows = [
        store.frames(i, np.linspace(0, store.length(i) - 1, 8).round().astype(int).tolist())
        for i in range(min(6, len(store)))
    ]
    frames = [frame for row in rows for frame in row]
    contact_sheet(frames, sheet, columns=8, count=len(frames))
    steps = np.mean([store.length(i) for i in range(len(store))])
    print(
        f"{len(store)} episodes of {steps:.0f} steps on average, {len(store.failures)} failed "
        f"attempts not kept, {store.skipped} unreadable; look at {sheet}"
    )


if __name__ == "__main__":
    launch(RecordConfig, main, "record", check=check)
