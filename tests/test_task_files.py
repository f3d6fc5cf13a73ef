"""The files of the tasks: draws that recorded episodes depend on, configs, and progress terms."""

import hashlib
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest

from selfflow.datasets.spec import TASKS, UserError, task_named
from selfflow.envs import (
    task_close_drawer,
    task_move_near,
    task_open_drawer,
    task_open_drawer_place,
    task_pick_coke_can,
)
from selfflow.envs.base import RobotEnv
from selfflow.envs.cabinet_placements import MILD, TRAIN, distance_to_front
from selfflow.envs.fake import PointSimulator
from selfflow.envs.tasks import (
    DRAWER_TASKS,
    FILES,
    KINDS,
    RULES,
    Rules,
    default_config,
    draw_placement,
    rules_of,
)

# Of twelve seeds by every kind. Another value: recorded episodes no longer start where they did.
DRAWS = {
    "open_top_drawer": "0e20acee7ce5",
    "open_middle_drawer": "0e20acee7ce5",
    "open_bottom_drawer": "0e20acee7ce5",
    "close_top_drawer": "3a48d14dec97",
    "close_middle_drawer": "3c72cb2b1a80",
    "close_bottom_drawer": "bae4871777d1",
    "open_drawer_place": "0d3f7c62104e",
    "pick_coke_can": "1302a9eef8aa",
    "pick_horizontal_coke_can": "3bb4170c81a5",
    "pick_vertical_coke_can": "92d009dfa423",
    "pick_standing_coke_can": "d139253b74e6",
    "move_near": "44139acf244b",
}


def start(name: str, kind: str, seed: int, config: Any = None) -> dict[str, float]:
    return draw_placement(TASKS[name], kind, np.random.default_rng(seed), seed, config)


def state(**given: list) -> dict[str, np.ndarray]:
    """Of every key that a rule of the Google robot's reads, all at rest but for what is given."""
    usual = {
        "tool": [0.0] * 7,
        "drawers": [0.0] * 3,
        "apple": [-0.05, 0.03, 0.93, 1, 0, 0, 0],
        "apple_on_drawer_floor": [0],
        "objects": [[0.3 * i, 0, 0.95, 1, 0, 0, 0] for i in range(3)],
        "radii": [0.05] * 3,
        "grasped": [0],
        "touches": [1],
    }
    return {name: np.array(value, np.float32) for name, value in (usual | given).items()}


def seen(rules: Rules, *states: dict[str, np.ndarray]) -> dict[str, float]:
    """Progress after these steps from rest; the first subtask is over."""
    rules.reset(state())
    for each in states:
        rules.step(each, 1)
    return rules.progress()


@pytest.mark.parametrize("name", FILES)
def test_a_seed_starts_where_it_always_did(name: str):
    draws = [
        [(key, round(value, 9)) for key, value in start(name, kind, seed).items()]
        for kind in KINDS
        for seed in (*range(10), 1000, 90_002)
    ]
    assert hashlib.sha256(repr(draws).encode()).hexdigest()[:12] == DRAWS[name]


@pytest.mark.parametrize("name", FILES)
def test_each_has_a_config_rules_and_finite_progress(name: str):
    config = default_config(TASKS[name])
    assert is_dataclass(config)
    assert config == FILES[name].default_config()
    with pytest.raises(FrozenInstanceError):
        setattr(config, fields(config)[0].name, 0.0)
    rules = rules_of(TASKS[name], replace(config))
    assert isinstance(rules, Rules)
    before = seen(rules)
    after = seen(rules, state(tool=[0.3, 0.1, 0.7, 1, 0, 0, 0]))
    assert all(isinstance(value, float) and np.isfinite(value) for value in after.values())
    reach = [term for term in after if term.startswith("tool_to_")]
    assert reach
    assert all(after[term] != before[term] for term in reach)


def test_a_config_changes_rule_and_placements():
    task = task_named("open_top_drawer")
    near = replace(MILD, robot_x=(0.7, 0.7))
    config = replace(default_config(task), opened=0.1, mild=near, opening=0.12)
    env = RobotEnv(PointSimulator(), task, pictures=False, config=config)
    _, info = env.reset(seed=0)
    assert info["draws"]["robot_x"] == pytest.approx(0.7)
    assert info["draws"]["drawer_top"] == pytest.approx(0.12)
    assert info["success"]
    _, usual = RobotEnv(PointSimulator(), task, pictures=False).reset(seed=0)
    assert not usual["success"]
    assert usual["draws"]["robot_y"] == info["draws"]["robot_y"]


def test_the_twin_takes_a_config():
    from selfflow.envs.twin import make_mujoco

    task = task_named("pick_standing_coke_can")
    config = replace(task_pick_coke_can.default_config(), can_x=(-0.25, -0.25), can_y=(0.1, 0.1))
    env = make_mujoco(task, image_size=(24, 32), pictures=False, config=config)
    _, info = env.reset(seed=3)
    np.testing.assert_allclose(info["privileged"]["objects"][0, :2], [-0.25, 0.1], atol=2e-3)


def test_wrong_configs_are_refused():
    with pytest.raises(UserError, match=r"must be selfflow.envs.task_move_near.Config, got .*coke"):
        rules_of(task_named("move_near"), task_pick_coke_can.default_config())
    with pytest.raises(UserError, match="widowx_stack_cube has no config; have: open_top"):
        default_config(task_named("widowx_stack_cube"))
    with pytest.raises(UserError, match="has no config"):
        rules_of(task_named("widowx_stack_cube"), task_open_drawer.default_config())
    with pytest.raises(UserError, match=r"robot_x=\(1.0, 0.5\): must be \(low, high\)"):
        replace(TRAIN, robot_x=(1.0, 0.5))
    with pytest.raises(UserError, match=r"train_opening=.*must be"):
        replace(task_close_drawer.default_config(), train_opening=(0.2, 0.1))


@pytest.mark.parametrize("name", ["close_top_drawer", "pick_coke_can", "move_near"])
def test_ranges_without_room_beside_the_evaluation_are_told(name: str, monkeypatch):
    for module in ("cabinet_placements", "task_pick_coke_can", "task_move_near"):
        monkeypatch.setattr(f"selfflow.envs.{module}.ATTEMPTS", 30)
    config = replace(default_config(task_named(name)), keep_away=9.0)
    with pytest.raises(UserError, match="no start fits"):
        start(name, "train", 0, config)


def test_thresholds_are_the_config_s():
    """Each threshold moved past a state's value turns the verdict."""
    cases = [
        ("open_top_drawer", "opened", 0.2, state(drawers=[0.16, 0, 0])),
        ("close_top_drawer", "shut", 0.01, state(drawers=[0.03, 0, 0])),
        (
            "open_drawer_place",
            "held_open",
            0.1,
            state(drawers=[0.07, 0, 0], apple_on_drawer_floor=[1]),
        ),
        ("pick_coke_can", "lift", 0.03, lifted(0.015)),
        ("move_near", "near", 0.05, near(0.08)),
        ("move_near", "moved", 0.2, near(0.08)),
    ]
    for name, threshold, value, then in cases:
        config = default_config(TASKS[name])
        for changed, success in ((config, True), (replace(config, **{threshold: value}), False)):
            rules = rules_of(TASKS[name], changed)
            seen(rules, then)
            assert rules.success() is success, (name, threshold)


def lifted(height: float) -> dict[str, np.ndarray]:
    """The can hangs so high above its start, touching nothing."""
    return state(objects=[[0, 0, 0.95 + height, 1, 0, 0, 0]], grasped=[1], touches=[0])


def near(distance: float) -> dict[str, np.ndarray]:
    """The source has come to so far (m) from the target's outline, radii of 0.05 m between."""
    places = [[0.3 - 0.1 - distance, 0, 0.95], [0.3, 0, 0.95], [0.6, 0, 0.95]]
    return state(objects=[[*place, 1, 0, 0, 0] for place in places])


def test_five_high_steps_count():
    config = replace(task_pick_coke_can.default_config(), lift=0.5, high=0.04)
    for height, expected in ((0.05, True), (0.03, False)):
        rules = rules_of(TASKS["pick_coke_can"], config)
        seen(rules, *[lifted(height)] * 5)
        assert rules.success() is expected


def test_progress_of_the_drawers():
    opened = rules_of(TASKS["open_middle_drawer"])
    terms = seen(opened, state(drawers=[0, 0.2, 0]), state(drawers=[0, 0.1, 0]))
    assert (terms["opening"], terms["opened"]) == (pytest.approx(0.1), 1.0)
    closed = rules_of(TASKS["close_bottom_drawer"])
    closed.reset(state(drawers=[0, 0, 0.2]))
    closed.step(state(drawers=[0, 0, 0.08]), 0)
    assert closed.progress()["pushed"] == pytest.approx(0.12)


def test_distances_to_the_drawer():
    inside = np.array([0.0175 + 0.1, -0.3, 0.74, 1, 0, 0, 0])
    assert distance_to_front(inside, "top", 0.1) == pytest.approx(0, abs=1e-9)
    assert distance_to_front(inside, "top", 0.0) == pytest.approx(0.1)
    above = inside + np.array([0, 0, 0.045, 0, 0, 0, 0])
    assert distance_to_front(above, "top", 0.1) == pytest.approx(0.03)
    place = rules_of(TASKS["open_drawer_place"])
    floor = [*(task_open_drawer_place.FLOOR + np.array([0.2, 0, 0.03])), 1, 0, 0, 0]
    terms = seen(place, state(drawers=[0.2, 0, 0], apple=floor, tool=floor))
    assert terms["apple_to_floor"] == pytest.approx(0.03, abs=1e-6)
    assert terms["tool_to_apple"] == 0
    assert place.progress()["opened"] == 1


def test_every_task_is_somewhere():
    assert set(RULES) == set(TASKS)
    assert set(DRAWER_TASKS) <= set(FILES)
    assert task_move_near.CELLS == 60
