"""Recording demonstrations: what an episode holds, and that a killed recording is continued."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import UserError, task_named
from selfflow.datasets.store import EpisodeRecord, EpisodeStore, StoreWriter
from selfflow.envs.expert import DrawerExpert
from selfflow.envs.fake import make_fake
from selfflow.envs.twin import make_mujoco
from selfflow.eval import record_demos
from selfflow.eval.record_config import RecordConfig, check, header_of
from selfflow.eval.record_demos import fault, main, record_episode, shares, work

SCRIPT = Path(__file__).parents[1] / "eval" / "record_demos.py"


def config(**keys) -> RecordConfig:
    overrides = [f"{k}={v}" for k, v in {"task": "close_top_drawer", "linger": 1, **keys}.items()]
    return compose(RecordConfig, "record", overrides)


@pytest.fixture(scope="module")
def twin():
    task = task_named("close_top_drawer")
    env = make_mujoco(task, image_size=(16, 16))
    yield env, DrawerExpert(task)
    env.close()


def test_label_is_the_experts_and_executed_carries_the_noise(twin):
    env, expert = twin
    record = record_episode(env, expert, 7, config(noisy_episodes=1.0, noisy_steps=1.0))
    assert record.success
    assert len(record.proprio) == len(record.actions) + 1
    assert len(record.images["overhead_camera"]) == len(record.proprio)
    difference = record.executed - record.actions
    assert 0.01 < difference[:, :3].std() < 0.04
    np.testing.assert_array_equal(difference[:, 6], 0)
    assert set(record.privileged) >= {"drawers", "tool", "base"}
    assert record.draws["noisy"] == 1.0
    assert record.draws["robot_x"] == pytest.approx(record.privileged["base"][0, 0])


def test_same_seed_same_episode(twin):
    env, expert = twin
    first, again = (record_episode(env, expert, 8, config(noisy_episodes=1.0)) for _ in range(2))
    np.testing.assert_array_equal(first.executed, again.executed)
    np.testing.assert_array_equal(first.proprio, again.proprio)


def test_clean_episode_executes_its_labels(twin):
    env, expert = twin
    record = record_episode(env, expert, 9, config(noisy_episodes=0.0))
    np.testing.assert_array_equal(record.executed, record.actions)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"placement": "grid"}, "placement=grid: SIMPLER's evaluation cells, .* choose mild"),
        ({"placement": "wild"}, "placement=wild with backend=mujoco: choose mild"),
        ({"placement": "train"}, "placement=train with backend=mujoco: choose mild"),
        ({"image_size": [256]}, r"must be \[height, width\]"),
        ({"image_size": [128, 99999]}, "each 1 to 4096"),
        ({"image_size": [64, 64], "backend": "fake"}, "only with backend=mujoco or simpler"),
        ({"randomise": "wild"}, "randomise=wild: choose one of none, mild, wide"),
        ({"randomise": "mild", "backend": "fake"}, "randomise=mild: only with backend=mujoco"),
        ({"backend": "maniskill"}, "choose one of fake, mujoco, simpler"),
        ({"noise": -0.1}, "noise=-0.1: must be between 0 and 1"),
        ({"noise": "nan"}, "noise=nan: must be"),
        ({"noise_turn": -1}, "noise_turn=-1"),
        ({"noisy_episodes": 1.5}, "noisy_episodes=1.5: must be between 0 and 1"),
        ({"noisy_steps": -0.1}, "noisy_steps=-0.1: must be between 0 and 1"),
        ({"workers": 0}, "workers=0: must be 1 or more"),
        ({"episodes": 0}, "episodes=0: must be 1 or more"),
        ({"out": SCRIPT}, "is a file; choose another folder"),
        ({"out": SCRIPT / "below"}, f"{SCRIPT} is a file; choose another folder"),
        ({"out": SCRIPT.parent}, "holds something else than episodes"),
    ],
)
def test_check_names_the_cure(wrong, says):
    with pytest.raises(UserError, match=says):
        check(config(**wrong))


def test_the_usual_size_given_is_the_usual_store():
    usual = header_of(config())
    assert header_of(config(image_size=[128, 160])) == usual
    assert header_of(config(image_size=[64, 80])) != usual


def test_test_seeds_and_tasks_without_expert_are_refused():
    with pytest.raises(UserError, match=r"train seeds are 0\.\.99999"):
        check(config(seed=200_000))
    with pytest.raises(UserError, match="not built yet"):
        check(config(task="widowx_stack_cube"))


# --- the command, in the fake simulator -----------------------------------------------------------


@pytest.fixture
def attempts(monkeypatch):
    """Attempts are of one step, and every fifth seed fails; returns the seeds in their order."""
    seeds = []

    def attempt(env, expert, seed, config, driver=None) -> EpisodeRecord:
        seeds.append(seed)
        zeros = np.zeros((1, 7), np.float32)
        return EpisodeRecord(
            images={"overhead_camera": [np.zeros((8, 8, 3), np.uint8)]},
            proprio=np.zeros((1, 8), np.float32),
            actions=zeros,
            executed=zeros,
            terminate=np.zeros(1, bool),
            instruction=["close top drawer"],
            seed=seed,
            success=seed % 5 != 3,
        )

    monkeypatch.setattr(record_demos, "record_episode", attempt)
    return seeds


def fake(out: Path, **keys) -> RecordConfig:
    return config(backend="fake", out=out, **keys)


def record_all(config: RecordConfig) -> None:
    """What main does, all of it in this process."""
    for worker, count in enumerate(shares(config)):
        work(config, worker, count, lambda attempt: None)


def kept(out: Path) -> int:
    return len(EpisodeStore(out))


def test_seeds_of_workers_and_of_a_continued_run(tmp_path, attempts):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    record_all(fake(whole, episodes=9, workers=2, seed=10))
    first, second = [10, 12, 14, 16, 18, 20], [11, 13, 15, 17, 19]
    assert attempts == [*first, *second]  # 18 and 13 fail
    assert shares(fake(whole, episodes=9, workers=2, seed=10)) == [0, 0]
    attempts.clear()
    cut = fake(parts, episodes=9, workers=2, seed=10)
    work(cut, 0, 2, lambda attempt: None)  # killed after 2 and 1 episodes
    work(cut, 1, 1, lambda attempt: None)
    assert shares(cut) == [3, 3]
    record_all(cut)
    assert sorted(attempts) == sorted([*first, *second])
    assert EpisodeStore(parts).seeds() == EpisodeStore(whole).seeds()


@pytest.mark.parametrize("others", [(3, 0), (1, 0), (7, 0), (2, 500), (3, 1)])
def test_other_workers_or_another_seed_never_overshoot(tmp_path, attempts, others):
    record_all(fake(tmp_path, episodes=8, workers=2))
    workers, seed = others
    again = fake(tmp_path, episodes=8, workers=workers, seed=seed)
    assert shares(again) == [0] * workers
    more = fake(tmp_path, episodes=13, workers=workers, seed=seed)
    record_all(more)
    assert kept(tmp_path) == 13
    assert len(attempts) == len(set(attempts))


def test_what_was_forced_is_no_demonstration(tmp_path, monkeypatch):
    """At step 100 the instruction changes, whatever was done: such an episode is not kept."""
    env = make_fake(task_named("open_drawer_place"))

    def episode(announced: int) -> EpisodeRecord:
        expert = DrawerExpert(env.task)
        zeros = np.zeros(7)
        steps = iter(range(1000))
        monkeypatch.setattr(expert, "act", lambda _: (zeros, next(steps) == announced))
        return record_episode(env, expert, 0, fake(tmp_path, task="open_drawer_place"))

    late, early = episode(150), episode(60)
    assert late.meta["forced"]
    assert late.instruction[99] == late.instruction[0] != late.instruction[100]
    assert not early.meta["forced"]
    assert early.terminate.nonzero()[0].tolist() == [60]
    assert "forced" in fault(replace(late, success=True))
    assert fault(late) == "no success in 200 steps"
    assert fault(replace(early, success=True)) == ""


def test_a_subtask_that_was_done_before_is_not_shown(tmp_path, monkeypatch):
    """A drawer that is open from the start: the policy would learn to call a shut one open."""
    env = make_fake(task_named("open_drawer_place"))
    expert, zeros, says = DrawerExpert(env.task), np.zeros(7), iter([True])
    monkeypatch.setattr(expert, "act", lambda _: (zeros, next(says, False)))
    record = record_episode(env, expert, 0, fake(tmp_path, task="open_drawer_place"))
    assert set(record.instruction) == {env.task.instructions[1]}
    assert not record.terminate.any()
    assert not record.meta["forced"]


def test_kept_failures_count(tmp_path, attempts):
    record_all(fake(tmp_path, episodes=4, workers=1, keep_failures=True))
    assert attempts == [0, 1, 2, 3]
    assert kept(tmp_path) == 4
    assert shares(fake(tmp_path, episodes=4, workers=3, keep_failures=True)) == [0, 0, 0]


def test_used_up_train_seeds_are_told(tmp_path, attempts):
    with pytest.raises(UserError, match="no train seeds are left up to 99999; choose a lower"):
        record_all(fake(tmp_path, episodes=3, seed=99_997))
    assert attempts == [99_997, 99_998, 99_999]
    assert kept(tmp_path) == 2


def test_plain_lines_where_there_is_no_terminal(tmp_path, attempts, capsys):
    main(fake(tmp_path, episodes=20))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("close_top_drawer: 8/10 succeed")
    assert lines[1].endswith("16/20 episodes")
    assert lines[2].startswith("20 episodes of 1 steps on average, 5 failed")


def test_another_task_in_the_store_is_refused(tmp_path, attempts):
    record_all(fake(tmp_path, episodes=1))
    with pytest.raises(UserError, match=r"holds episodes of task=close_top_drawer; choose another"):
        check(fake(tmp_path, episodes=1, task="open_top_drawer"))
    with pytest.raises(UserError, match="holds episodes of backend=fake"):
        check(config(out=tmp_path))
    check(fake(tmp_path, episodes=2))


def test_the_fake_backend_is_recorded_too(tmp_path):
    main(fake(tmp_path, episodes=1, keep_failures=True, linger=1))
    record = EpisodeStore(tmp_path).record(0)
    assert set(record.images) == {"overhead_camera"}


def test_a_worker_s_mistake_is_one_line_and_nothing_is_written(tmp_path):
    out = tmp_path / "store"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "backend=simpler", "workers=2", f"out={out}"],
        capture_output=True,
        text=True,
        env={**os.environ, "SIMPLER_ASSETS": str(tmp_path / "nowhere")},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("record_demos.py: ")
    assert done.stderr.count("\n") == 1
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_says_how_to_continue(tmp_path, workers):
    command = ["task=close_top_drawer", "backend=fake", "episodes=9999", "keep_failures=true"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *command, f"workers={workers}", f"out={tmp_path / 'store'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert "episodes" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "record_demos.py: interrupted\n"
    assert out.splitlines()[-1] == f"stopped; the same command continues {tmp_path / 'store'}"


@pytest.mark.slow
def test_workers_end_when_the_parent_is_killed(tmp_path):
    command = ["task=close_top_drawer", "backend=fake", "episodes=9999", "keep_failures=true"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *command, "workers=2", f"out={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        process.stdout.readline()
        process.kill()
    header = header_of(fake(tmp_path))
    deadline = time.monotonic() + 30
    while True:  # until the shards are free
        try:
            for shard in ("000", "001"):
                StoreWriter(tmp_path, shard, header).close()
            return
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.slow
def test_killed_recording_is_continued(tmp_path):
    store = tmp_path / "store"
    command = [sys.executable, str(SCRIPT), "task=close_top_drawer", "episodes=4", f"out={store}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(command, start_new_session=True, **quiet)
    index = store / "000.index.jsonl"
    deadline = time.monotonic() + 120
    while not (index.exists() and index.read_text().count("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = EpisodeStore(store).seeds()
    assert 0 < len(before) < 4
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = EpisodeStore(store)
    assert len(after) == 4
    assert after.seeds() >= before
    assert "4 episodes" in done.stdout
    assert (store / "contact_sheet.png").stat().st_size > 1000
    source = open_source(str(store))
    assert source.signals(0).actions.shape[1] == 7
