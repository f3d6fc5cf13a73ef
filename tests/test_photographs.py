"""Whoever was trained on the evaluation's photographs is told so beside its score."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.spec import EMBODIMENTS, task_named
from selfflow.envs.base import RobotEnv
from selfflow.envs.fake import make_fake
from selfflow.eval import simpler_rollout
from selfflow.eval.parts import RolloutConfig
from selfflow.eval.report import table
from selfflow.eval.suite_table import remarks
from selfflow.policies.finetune import origins

ROBOT = EMBODIMENTS["google_robot"]


def test_a_policy_s_checkpoint_names_what_its_stores_showed():
    seen = SimpleNamespace(embodiment=ROBOT, photographs=("b", "a"))
    more = SimpleNamespace(embodiment=ROBOT, photographs=("c", "a"))
    silent = SimpleNamespace(embodiment=ROBOT)  # of a format that cannot say
    assert origins([seen, more, silent])["photographs"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("task", "words", "seen"),
    [
        ("open_top_drawer", (), ["open_drawer_a0", "open_drawer_a1"]),
        ("open_drawer_place", (), ["open_drawer_a0"]),  # is not shown before a1
        ("move_near", (), []),
        ("open_top_drawer", ("backend=mujoco",), []),
        ("open_top_drawer", ("variant=darker",), []),  # there is none behind the cabinet
    ],
)
def test_only_those_behind_the_task_count(task, words, seen, tmp_path: Path, monkeypatch):
    shown = ["open_drawer_a1", "open_drawer_a0", "bridge_sink"]
    (tmp_path / "config.json").write_text(json.dumps({"photographs": shown}))
    monkeypatch.setattr(simpler_rollout, "resolve", lambda run: tmp_path)
    given = ["backend=simpler", f"task={task}", *words]
    config = compose(RolloutConfig, "rollout", given)
    assert simpler_rollout.photographs_seen(config) == seen
    (tmp_path / "config.json").write_text("{}")  # of a checkpoint from before
    assert simpler_rollout.photographs_seen(config) == []


def test_the_tables_say_it():
    row = {
        "task": "open_top_drawer",
        "shader": "rt",
        "paper_shader": "rt",
        "photographs_seen": ["open_drawer_a0"],
    }
    said = remarks({"variants": [row, row | {"task": "x", "photographs_seen": []}], "not_run": []})
    assert "Photographs seen in training: open_top_drawer" in said
    assert any("without the denoiser" in line for line in said)
    assert not any("Not comparable" in line for line in said)
    summary = row | {
        "backend": "simpler",
        "placement": "grid",
        "policy": "checkpoint",
        "episodes": 1,
        "successes": 1,
        "wilson_95": (0.2, 1.0),
        "successes_by_reading": {"last_step": 1, "early_stop": 1, "ever": 1},
        "latency_ms_p50": None,
        "latency_ms_p95": None,
        "median_steps": None,
    }
    cells = dict(zip(*(column._cells for column in table([summary]).columns), strict=True))
    assert cells["photographs"] == "seen in training"


def test_no_step_before_a_reset_or_after_close():
    env: RobotEnv = make_fake(task_named("open_top_drawer"))
    with pytest.raises(RuntimeError, match=r"reset\(\) comes first"):
        env.step(env.action_space.sample())
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.close()
    with pytest.raises(RuntimeError, match=r"reset\(\) comes first"):
        env.step(env.action_space.sample())
