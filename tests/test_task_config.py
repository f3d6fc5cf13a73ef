"""`task_config`: other values of a task's Config from yaml, and recordings that start by them."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError, task_named
from selfflow.datasets.store import EpisodeStore
from selfflow.envs.cabinet_placements import APPLE_GRID, DRAWER_POSES, PLAIN, ROBOT_CELLS
from selfflow.envs.tasks import FILES, config_with, default_config, draw_placement, photographs
from selfflow.eval import play
from selfflow.eval.record_config import RecordConfig, check, header_of
from selfflow.eval.record_demos import main, tell_mixture

PLACE = task_named("open_drawer_place")


def config(*changes: str, **keys) -> RecordConfig:
    keys = {"task": "open_drawer_place", "backend": "simpler", "out": "not/there"} | keys
    changes = tuple(f"+task_config.{change}" for change in changes)
    return compose(RecordConfig, "record", [*(f"{k}={v}" for k, v in keys.items()), *changes])


def test_values_of_a_yaml_file_take_the_place_of_the_defaults():
    changes = {"shown": ["b0"], "held_open": 1, "photo_x": [0, 0.02], "train": {"apple_x": [0, 1]}}
    given, usual = config_with(PLACE, changes), default_config(PLACE)
    assert given == replace(
        usual,
        shown=("b0",),
        held_open=1.0,
        photo_x=(0.0, 0.02),
        train=replace(usual.train, apple_x=(0.0, 1.0)),
    )


@pytest.mark.parametrize("name", FILES)
def test_every_task_takes_its_own_values_again(name: str):
    task = task_named(name)
    usual = default_config(task)
    assert config_with(task, asdict(usual)) == usual
    assert config_with(task, {}) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("shwn=[a0]", "task_config.shwn: no such key; choose one of mild"),
        ("train.apple=[0,1]", "task_config.train.apple: no such key; choose one of robot_x"),
        ("shown=[z]", r"shown=\['z'\]: must be some of a0, a1"),
        ("shown=[]", r"shown=\[\]: must be some of a0, a1"),
        ("shown=a0", "task_config.shown=a0: must be like"),
        ("photo_x=[1]", r"task_config.photo_x=\[1\]: must be like \(-0.12, 0.03\)"),
        ("photo_x=[1,x]", "task_config.photo_x=.*: must be like"),
        ("photo_x=[0.3,0.1]", r"task_config.photo_x=\(0.3, 0.1\): must be \(low, high\)"),
        ("photo_x=[-inf,inf]", r"task_config.photo_x=\[-inf, inf\]: must be like"),
        ("train.apple_x=[1,0]", r"task_config.train.apple_x=\(1.0, 0.0\): must be \(low, high\)"),
        ("plain_share=7", "task_config.plain_share=7.0: must be between 0 and 1"),
        ("train=3", "task_config.train=3: must be like"),
        ("plain_share=true", "task_config.plain_share=True: must be like 0.5"),
        ("keep_away=0.01", "task_config.keep_away=0.01: must be 0.015 m or more"),
        ("keep_away=nan", "task_config.keep_away=nan: must be like"),
    ],
)
def test_what_is_no_value_is_refused(change: str, said: str):
    with pytest.raises(UserError, match=said):
        check(config(change))


@pytest.mark.parametrize("value", ["5.7", "inf", "true"])
def test_a_count_stays_one(value: str):
    with pytest.raises(UserError, match=r"task_config.high_steps=.*: must be like 5"):
        check(config(f"high_steps={value}", task="pick_coke_can"))


@pytest.mark.parametrize(
    "override", ["plain_share=0.2", "train.apple_x=[0,1]", "={plain_share:0.2}"]
)
def test_how_to_give_them_is_said(override: str):
    given = f"task_config{override if override.startswith('=') else '.' + override}"
    with pytest.raises(UserError, match=r"one by one, \+task_config.NAME=VALUE"):
        compose(RecordConfig, "record", ["task=open_drawer_place", given])


def test_tasks_without_one_are_told():
    with pytest.raises(UserError, match="widowx_spoon_on_towel has no config"):
        check(config("keep_away=0.03", task="widowx_spoon_on_towel"))


def test_photographs_are_the_configs():
    shown = config("shown=[c0,a0,a0]")
    assert header_of(shown).photographs == ("open_drawer_a0", "open_drawer_c0")
    names = photographs(PLACE)
    assert names == header_of(config()).photographs
    assert len(names) == 6
    assert not {f"open_drawer_{pose}" for pose in ("a0", "b0", "c0")} & {*names}


def test_placements_keep_away_from_every_cell_also_where_the_evaluations_photographs_are_shown():
    changes = {"shown": ["a0", "b0", "c0"], "plain_share": 0.2, "photo_x": [-0.04, 0.05]}
    given, rng, seen = config_with(PLACE, changes), np.random.default_rng(0), []
    for _ in range(200):
        start = draw_placement(PLACE, "train", rng, None, given)
        seen.append(start["photo"])
        for kind, cells in (("robot", ROBOT_CELLS), ("apple", APPLE_GRID)):
            at = np.array([start[f"{kind}_x"], start[f"{kind}_y"]])
            assert np.linalg.norm(np.array(cells) - at, axis=1).min() >= 0.015
    poses = {list(DRAWER_POSES)[int(photo)] for photo in seen if photo != PLAIN}
    assert poses == {"a0", "b0", "c0"}
    assert 20 <= seen.count(PLAIN) <= 60  # of 200, at 0.2


@pytest.mark.slow
def test_a_recording_starts_by_it_notes_it_and_is_played_by_it(tmp_path, capsys, monkeypatch):
    keys = dict(task="close_top_drawer", backend="mujoco", linger=1, episodes=1, noisy_episodes=0)
    change = "opening=0.05", "mild.robot_y=[0.021,0.022]"
    given = config(*change, out=str(tmp_path), **keys)
    check(given)
    main(given)
    store = EpisodeStore(tmp_path)
    told = json.loads(str(store.metadata(0)["task_config"]))
    assert told == {"opening": 0.05, "mild": {"robot_y": [0.021, 0.022]}}
    record = store.record(0)
    assert 0.021 <= record.draws["robot_y"] <= 0.022
    assert record.privileged["drawers"][0, 0] == pytest.approx(0.05, abs=1e-3)
    capsys.readouterr()
    tell_mixture(given)
    assert capsys.readouterr().out == ""
    tell_mixture(replace(given, task_config={}))
    assert "opening" in capsys.readouterr().out
    with monkeypatch.context() as older:  # episodes from before there was such a key
        older.setattr(EpisodeStore, "metadata", lambda self, i: {})
        tell_mixture(replace(given, task_config={}))
        assert capsys.readouterr().out == ""
    play.main(
        compose(
            play.PlayConfig, "play", [f"source={tmp_path}", "mp4=true", f"out={tmp_path}/films"]
        )
    )
    said = capsys.readouterr().out
    assert "success" in said
    assert "changed since" not in said
