"""Runs an ablation's jobs, `processes` at once; whatever ends a sitting, the same command goes on.

out/.lock            one sitting at a time; a job that a killed sitting left holds it too
out/logs/JOB.log     what each command said
out/minutes.json     how long each job has taken in all sittings
out/begun.json       the arguments that each job was begun with
"""

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from selfflow.datasets.spec import UserError
from selfflow.eval.ablation_config import AblationConfig
from selfflow.eval.ablation_plan import Job
from selfflow.eval.ablation_records import harvest, identity, read_records, write_records
from selfflow.eval.results import write_json
from selfflow.worldmodel.checkpoint import folder

STOP_SECONDS = 60.0  # between asking a job to end and ending it; a checkpoint is written in between
LOOK_SECONDS = 0.2  # between two looks whether a job has ended, or is to
Runner = Callable[[Job, Path, IO, Callable[[], bool]], int | None]
SPENT = threading.Lock()  # of minutes.json


def run_jobs(config: AblationConfig, jobs: list[Job], runner: Runner | None = None) -> bool:
    """Runs what has no record yet and adds it; whether all is done. Raises UserError where a job
    fails, KeyboardInterrupt where the user stops it: both stop the jobs beside it."""
    out, path = Path(config.out), Path(config.records)
    end = time.monotonic() + 60 * config.minutes if config.minutes else math.inf
    halt = threading.Event()  # set: jobs at work are to stop

    def over() -> bool:
        return halt.is_set() or time.monotonic() >= end

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        terminable(),
        locked(out, over) as lock,
        Progress(*columns, TimeElapsedColumn(), disable=not Console().is_terminal) as progress,
        ThreadPoolExecutor(config.processes) as pool,
    ):
        if lock is None:
            return False
        records = read_records(path)  # under the lock: another sitting may have added some
        left = [job for job in jobs if job.name not in records]
        bar = progress.add_task("ablation", total=len(jobs), completed=len(jobs) - len(left))
        running: dict[Future[int | None], Job] = {}
        try:
            while left or running:
                ready = [job for job in left if records.keys() >= set(job.needs)]
                for job in ready[: config.processes - len(running)]:
                    left.remove(job)
                    progress.update(bar, description=job.name)
                    progress.console.print(f"{time.strftime('%H:%M')} {job.name}", highlight=False)
                    note_begun(config, job)
                    running[pool.submit(one, config, job, lock, over, runner or run_process)] = job
                assert running, f"{left[0].name} waits for what is not planned"
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    if not finished(config, job, future.result()):
                        left.clear()  # the sitting has ended: no more is begun
                        continue
                    minutes = _read(out / "minutes.json").get(job.name, 0.0)
                    thin(job)
                    records[job.name] = harvest(config, job, minutes)
                    write_records(path, records)
                    progress.advance(bar)
        finally:
            halt.set()  # stops what is still at work: there is something only after an error
    return all(job.name in records for job in jobs)


def one(
    config: AblationConfig, job: Job, lock: IO, over: Callable[[], bool], runner: Runner
) -> int | None:
    """Runs a job to its end, 0 or another status; None where it has been stopped before."""
    if job.steps and _trained(job):  # a kill came between its end and its record
        return 0
    if over():
        return None
    began, log = time.monotonic(), log_of(config, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        return runner(job, log, lock, over)
    finally:
        with SPENT:
            spent = _read(Path(config.out, "minutes.json"))
            spent[job.name] = spent.get(job.name, 0.0) + (time.monotonic() - began) / 60
            write_json(Path(config.out, "minutes.json"), spent)


def finished(config: AblationConfig, job: Job, status: int | None) -> bool:
    """Whether it is done; not where it was stopped. Raises UserError where it failed."""
    if status is None:
        return False
    if status or (job.steps and not _trained(job)):
        log = log_of(config, job)
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise UserError(
            f"{job.name} failed with status {status}: {said[-1] if said else 'it said nothing'}; "
            f"see {log}"
        )
    return True


def log_of(config: AblationConfig, job: Job) -> Path:
    """What its command said."""
    return Path(config.out, "logs", f"{job.name.replace('/', '-')}.log")


def note_begun(config: AblationConfig, job: Job) -> None:
    """Notes the job's arguments. Raises UserError where its folder is there, begun with others: the
    commands themselves let a run go on with other steps, and a finished one is not asked again."""
    path = Path(config.out, "begun.json")
    begun, now = _read(path), identity(config, job)
    was = begun.get(job.name, now)
    if was != now and job.out.exists():
        other = ", ".join(sorted(set(was) ^ set(now)))
        raise UserError(
            f"{job.out} was begun otherwise ({other[:300]}); delete it, choose another out, or the "
            "config that it had"
        )
    write_json(path, begun | {job.name: now})


def run_process(job: Job, log: Path, lock: IO, over: Callable[[], bool]) -> int | None:
    """The job's command; None where it was time to stop before its end, and it was asked to."""
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, *job.command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which ends that one
            pass_fds=[lock.fileno()],  # so that it holds the lock if this process is killed
        )
    try:
        while process.poll() is None:
            if over():
                return None
            time.sleep(LOOK_SECONDS)
        return process.returncode
    finally:
        stop(process)


def stop(process: subprocess.Popen) -> None:
    """It and its own processes: asked first, ended if that does not help."""
    if process.poll() is not None:
        return
    # a training saves a checkpoint; not SIGINT, which a command in the background may ignore
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def thin(job: Job) -> None:
    """Deletes a finished training's other checkpoints, and what only going on with it needs."""
    if not job.steps:
        return
    wanted = {folder(job.out, step).name for step in job.steps}
    for path in (job.out / "checkpoints").iterdir():
        if path.name not in wanted:
            shutil.rmtree(path)
        elif (path / "train").is_dir():
            shutil.rmtree(path / "train")


def _trained(job: Job) -> bool:
    return all((folder(job.out, step) / "model.safetensors").is_file() for step in job.steps)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends a sitting as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def locked(out: Path, over: Callable[[], bool]) -> Iterator[IO | None]:
    """The folder for this sitting alone: waits for a job that a killed one left at work; None
    where the sitting ends first."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    print(f"{out}: another sitting, or a job that one left, is at work; waiting")
                told = True
            if over():
                yield None
                return
            time.sleep(1.0)
        yield file


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
