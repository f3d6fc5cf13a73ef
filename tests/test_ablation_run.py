"""Sittings of the ablation: jobs in order and at once, stopped, gone on with, failed."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError
from selfflow.eval import ablation_run
from selfflow.eval.ablation_config import AblationConfig
from selfflow.eval.ablation_plan import PRETRAIN, ROLLOUT, Job, chosen
from selfflow.eval.ablation_records import identity, read_records
from selfflow.worldmodel.checkpoint import folder


@pytest.fixture
def config(tmp_path: Path) -> AblationConfig:
    places = [f"{k}={tmp_path}/{k}" for k in ("out", "records")]
    return compose(
        AblationConfig, "ablation", [*places, f"document={tmp_path}/ablation.md", "processes=1"]
    )


@pytest.fixture(autouse=True)
def _nothing_to_harvest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake job leaves no results: its record says what it was asked."""

    def record(config: AblationConfig, job: Job, minutes: float) -> dict[str, Any]:
        return {"job": job.name, "kind": job.kind, "arguments": identity(config, job)}

    monkeypatch.setattr(ablation_run, "harvest", record)


def saved(job: Job, step: int) -> None:
    path = folder(job.out, step)
    (path / "train").mkdir(parents=True)
    (path / "model.safetensors").touch()


def trains(job: Job, log: Path, lock: IO, over: Callable[[], bool]) -> int | None:
    """A runner that leaves what the job would, and says so."""
    log.write_text("done")
    for step in job.steps:
        saved(job, step)
        saved(job, step + 1)  # of an interruption
    return 0


def test_sittings_go_on_where_the_last_one_stopped(config: AblationConfig) -> None:
    jobs, ran = chosen(replace(config, only=["vanilla"], seeds=[0])), []

    def interrupted(job: Job, *rest: Any) -> int | None:
        ran.append(job.kind)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return None if len(ran) == 5 else trains(job, *rest)

    path = Path(config.records)
    with pytest.raises(KeyboardInterrupt):
        ablation_run.run_jobs(config, jobs, interrupted)
    assert len(read_records(path)) == 2
    assert not ablation_run.run_jobs(config, jobs, interrupted)  # out of time
    assert ran == ["pretrain", "curve", "video", "video", "finetune"]
    assert ablation_run.run_jobs(config, jobs, trains)
    records = read_records(path)
    assert list(records) == [job.name for job in jobs]
    # only what is looked at is left of a training
    left = sorted((jobs[0].out / "checkpoints").iterdir())
    assert [p.name for p in left] == [f"step-{step:06d}" for step in jobs[0].steps]
    assert not (left[0] / "train").exists()
    assert ablation_run.run_jobs(config, jobs, interrupted)  # nothing is run again
    assert len(ran) == 5


def test_jobs_at_once_wait_for_what_they_read(config: AblationConfig) -> None:
    config, most, at_work, begun = replace(config, processes=3), 0, set(), []
    jobs = chosen(replace(config, only=["repa", "scratch"], seeds=[0, 1]))
    both, guard = threading.Barrier(3, timeout=20), threading.Lock()

    def shared(job: Job, *rest: Any) -> int | None:
        nonlocal most
        with guard:
            done = read_records(Path(config.records)).keys()
            assert set(job.needs) <= done, job.name
            begun.append(job.name)
            at_work.add(job.name)
            most = max(most, len(at_work))
        if len(begun) <= 3:
            both.wait()  # the first three do run side by side
        trains(job, *rest)
        with guard:
            at_work.remove(job.name)
        return 0

    assert ablation_run.run_jobs(config, jobs, shared)
    assert sorted(begun) == sorted(job.name for job in jobs)
    assert most == 3
    teacher, repa = "main/vanilla/0/pretrain", "main/repa/0/pretrain"
    assert begun.index(teacher) < begun.index(repa)
    assert all(job.needs for job in jobs if job.kind == ROLLOUT)


def test_a_failure_stops_the_job_beside_it(config: AblationConfig) -> None:
    stopped = threading.Event()

    def fails(job: Job, log: Path, lock: IO, over: Callable[[], bool]) -> int | None:
        if "vanilla/1" in job.name:
            log.write_text("no arm")
            return 1
        end = time.monotonic() + 20
        while not over() and time.monotonic() < end:
            time.sleep(0.01)
        if over():
            stopped.set()
        return None

    jobs = chosen(replace(config, only=["vanilla"]))
    with pytest.raises(UserError, match="vanilla/1/pretrain failed with status 1: no arm"):
        ablation_run.run_jobs(replace(config, processes=2), jobs, fails)
    assert stopped.is_set()
    assert not read_records(Path(config.records))


def test_a_training_whose_record_was_lost_to_a_kill_is_not_run_again(
    config: AblationConfig,
) -> None:
    job = chosen(config)[0]
    for step in job.steps:
        saved(job, step)
    never: Any = lambda *rest: pytest.fail("it was run")  # noqa: E731
    assert ablation_run.run_jobs(config, [job], never)


def test_a_job_is_not_gone_on_with_by_other_arguments(config: AblationConfig) -> None:
    job = chosen(config)[0]
    Path(config.out).mkdir()
    ablation_run.note_begun(config, job)
    other = replace(job, arguments=(*job.arguments, "lr=1"))
    ablation_run.note_begun(config, other)  # nothing was made yet
    for step in job.steps:
        saved(job, step)
    ablation_run.note_begun(config, other)
    with pytest.raises(UserError, match=r"begun otherwise \(lr=1\); delete it"):
        ablation_run.run_jobs(config, [job], trains)
    assert not read_records(Path(config.records))


def test_a_job_that_fails_is_one_line(config: AblationConfig) -> None:
    def fails(job: Job, log: Path, lock: IO, over: Callable[[], bool]) -> int:
        log.write_text("step 3\nthe arm is not plugged in\n\n")
        return 2

    with pytest.raises(UserError, match="status 2: the arm is not plugged in; see"):
        ablation_run.run_jobs(config, chosen(config), fails)


def test_a_sitting_ends_in_time_and_stops_its_job(config: AblationConfig, tmp_path: Path) -> None:
    script = "import time; print('on', flush=True); time.sleep(60)"

    class Sleeper(Job):
        @property
        def command(self) -> list[str]:
            return ["-c", script]

    job = Sleeper("main/vanilla/0/pretrain", PRETRAIN, tmp_path / "job", ())
    assert not ablation_run.run_jobs(replace(config, minutes=0.02), [job])
    spent = json.loads(Path(config.out, "minutes.json").read_text())
    assert 0 < spent[job.name] < 0.5


def test_a_sitting_waits_for_a_job_that_a_killed_one_left(
    config: AblationConfig, capsys: pytest.CaptureFixture
) -> None:
    never: Any = lambda *rest: pytest.fail("it was run")  # noqa: E731
    with ablation_run.locked(Path(config.out), lambda: False) as held:
        assert held is not None
        assert not ablation_run.run_jobs(replace(config, minutes=0.001), chosen(config), never)
    assert "is at work; waiting" in capsys.readouterr().out
