"""Recording demonstrations: what an episode holds, and that a killed recording is continued."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import UserError, task_named
from selfflow.datasets.store import EpisodeStore
from selfflow.envs.expert import DrawerExpert
from selfflow.envs.twin import make_mujoco
from selfflow.eval.record_demos import RecordConfig, check, record_episode

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


def test_test_seeds_and_tasks_without_expert_are_refused():
    with pytest.raises(UserError, match=r"train seeds are 0\.\.99999"):
        check(config(seed=200_000))
    with pytest.raises(UserError, match="not built yet"):
        check(config(task="move_near"))


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
