"""Training placements keep away from what is evaluated on; demonstrations say what they show."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.spec import TASKS, UserError, task_named
from selfflow.datasets.store import EpisodeStore, StoreHeader, StoreWriter, read_header
from selfflow.envs import bridge_tasks, task_open_drawer_place
from selfflow.envs.backgrounds import chosen_photo, plain_background
from selfflow.envs.cabinet_placements import APPLE_GRID, DRAWER_POSES, PLAIN
from selfflow.envs.placements import KEEP_AWAY
from selfflow.envs.simpler_assets import URDF_VERSIONS
from selfflow.envs.tasks import (
    DRAWER_TASKS,
    RULES,
    TABLE_TASKS,
    draw_placement,
    photographs,
)
from selfflow.eval.grids import visual_matching
from selfflow.eval.record_config import RecordConfig, check, header_of
from selfflow.eval.record_demos import main

ASSETS = Path(__file__).parents[2] / "shared" / "simpler_assets"
DRAWS = 1000


@cache
def defaults() -> RecordConfig:
    return compose(RecordConfig, "record", ["backend=simpler", "task=close_bottom_drawer"])


def config(**keys) -> RecordConfig:
    return replace(defaults(), **keys)


@cache
def drawn(name: str, kind: str = "train", count: int = DRAWS) -> list[dict[str, float]]:
    return [
        draw_placement(TASKS[name], kind, np.random.default_rng(seed), seed)
        for seed in range(count)
    ]


def places(starts: list[dict[str, float]], *keys: str) -> np.ndarray:
    """(n, keys)."""
    return np.array([[start[key] for key in keys] for start in starts])


def nearest(points: np.ndarray, cells: np.ndarray) -> float:
    """The least distance between a point (n, d) and a cell (m, d)."""
    return float(np.linalg.norm(points[:, None] - cells[None], axis=-1).min())


# --- placements -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWER_TASKS)
def test_robots_and_apples_keep_away_from_every_drawer_cell(name):
    train = drawn(name)
    robots = places(train, "robot_x", "robot_y")
    cells = places(drawn(name, "grid", 27), "robot_x", "robot_y")
    lattice = np.array([(x, y) for x in (0.65, 0.75, 0.85) for y in (-0.2, 0.0, 0.2)])
    assert nearest(robots, cells) >= KEEP_AWAY == 0.015
    assert nearest(robots, lattice) >= KEEP_AWAY  # of variant aggregation
    assert np.all(np.abs(robots - robots.mean(axis=0)).max(axis=0) > 0.08)
    if name == "open_drawer_place":
        apples = places(train, "apple_x", "apple_y")
        assert nearest(apples, np.array(APPLE_GRID)) >= KEEP_AWAY
        reach = task_open_drawer_place.default_config().reach
        assert np.linalg.norm(robots - apples, axis=1).max() <= reach == 0.84
    openings = places(train, "drawer_top", "drawer_middle", "drawer_bottom")
    assert np.count_nonzero(openings, axis=1).max() == name.startswith("close_")
    assert openings.max() < 0.25


def test_training_surrounds_each_evaluated_pose():
    """The robot stands in every direction of a0, b0 and c0, on plain backgrounds too."""
    plain = [start for start in drawn("open_drawer_place") if start["photo"] == PLAIN]
    robots = places(plain, "robot_x", "robot_y")
    for pose in ("a0", "b0", "c0"):
        off = robots - DRAWER_POSES[pose][:2]
        near = off[np.linalg.norm(off, axis=1) < 0.06]
        quarters = {(dx > 0, dy > 0) for dx, dy in near}
        assert len(quarters) == 4


def test_place_apple_never_shows_its_evaluation_s_photographs():
    shown = Counter(chosen_photo(start) for start in drawn("open_drawer_place"))
    assert set(shown) == {None, "a1", "a2", "b1", "b2", "c1", "c2"}
    assert 0.4 * DRAWS < shown[None] < 0.6 * DRAWS
    assert set(photographs(task_named("open_drawer_place"))) == {
        f"open_drawer_{pose}" for pose in shown if pose
    }
    assert {chosen_photo(start) for start in drawn("open_top_drawer")} == {None, *DRAWER_POSES}


def test_a_photograph_belongs_to_a_pose_beside_the_robot_s():
    for start in drawn("open_top_drawer"):
        if pose := chosen_photo(start):
            x, y, yaw = DRAWER_POSES[pose]
            assert -0.121 < start["robot_x"] - x < 0.031
            assert abs(start["robot_y"] - y) < 0.041
            assert abs(start["robot_yaw"] - yaw) < 0.021


@pytest.mark.parametrize("name", [n for n in TABLE_TASKS if "coke" in n])
def test_cans_keep_away_from_every_cell(name):
    cells = places(drawn(name, "grid", 75), "can_x", "can_y")
    assert nearest(places(drawn(name), "can_x", "can_y"), cells) >= KEEP_AWAY


def test_move_near_s_objects_keep_away_from_every_layout():
    train, cells = drawn("move_near"), drawn("move_near", "grid", 60)
    taken = np.array([[c[f"{axis}{i}"] for axis in "xy"] for c in cells for i in range(3)])
    for i in range(3):
        assert nearest(places(train, f"x{i}", f"y{i}"), taken) >= KEEP_AWAY


@pytest.mark.parametrize("name", bridge_tasks.PAIRS)
def test_widowx_sources_keep_away_from_every_trial(name):
    cells = places(drawn(name, "grid", 24), "source_x", "source_y")
    train = places(drawn(name), "source_x", "source_y")
    assert nearest(train, cells) >= bridge_tasks.KEEP_AWAY >= KEEP_AWAY


@pytest.mark.parametrize("name", RULES)
def test_colourings_are_drawn_and_a_seed_fixes_everything(name):
    train = drawn(name, count=80)
    assert train == drawn.__wrapped__(name, count=80)
    if TASKS[name].embodiment == "google_robot":
        assert {start["colouring"] for start in train} == set(range(len(URDF_VERSIONS)))
        assert len(URDF_VERSIONS) == 4


@pytest.mark.parametrize("name", ["open_top_drawer", "move_near", "widowx_stack_cube"])
def test_unknown_kinds_are_refused(name):
    with pytest.raises(ValueError, match=r"choose mild, grid.* or train"):
        draw_placement(TASKS[name], "wild", np.random.default_rng(0), 0)


def test_a_plain_background_fades_between_its_colours():
    start = drawn("open_top_drawer", count=1)[0] | {"photo": PLAIN}
    start |= {"top_r": 200.0, "bottom_r": 100.0, "top_g": 50.0, "bottom_g": 50.0}
    picture = plain_background(start, (11, 4))
    assert picture.shape == (11, 4, 3)
    np.testing.assert_array_equal(picture[:, 2, 0], np.arange(200, 99, -10))
    assert np.all(picture[..., 1] == 50)
    assert chosen_photo(start) is None


def test_without_an_entry_the_nearest_photograph_is_shown():
    assert chosen_photo({"robot_x": 0.86, "robot_y": 0.2}) == "c2"


# --- the command ----------------------------------------------------------------------------------


def test_simpler_records_training_placements_alone():
    check(config())
    check(config(placement="train", image_size=[512, 640]))
    with pytest.raises(
        UserError, match=r"placement=grid: SIMPLER's evaluation cells.*choose train"
    ):
        check(config(placement="grid"))
    with pytest.raises(UserError, match="placement=mild with backend=simpler: choose train"):
        check(config(placement="mild"))
    ratio, numbers = r"in the ratio of \[256, 320", "each 1 to 4096"
    for size, says in (([256, 256], ratio), ([256], numbers), ([0, 0], numbers)):
        with pytest.raises(UserError, match=rf"must be \[height, width\],? {says}"):
            check(config(image_size=size))
    check(config(task="widowx_stack_cube", image_size=[120, 160]))


def test_the_header_says_what_was_shown(tmp_path):
    for name in RULES:
        header = header_of(config(task=name))
        assert header.placement == "train"
        assert header.image_size == ((240, 320) if "widowx" in name else (256, 320))
        tested = {
            Path(need).stem for v in visual_matching() if v.task == name for need in v.needs
        }  # pick_coke_can is not in the evaluation, its three orientations are
        seen = tested & set(header.photographs)
        assert seen == (set() if name == "open_drawer_place" else tested)
    name = "widowx_stack_cube"
    header = header_of(config(task=name))
    with StoreWriter(tmp_path, "000", header):
        assert read_header(tmp_path) == header
    with pytest.raises(UserError, match="holds episodes of image_size"):
        check(config(task=name, image_size=[480, 640], out=str(tmp_path)))


def test_stores_of_older_versions_are_read_and_continued(tmp_path):
    old = {
        "version": 1,
        "embodiment": "google_robot",
        "task": "close_top_drawer",
        "cameras": ["overhead_camera"],
        "backend": "mujoco",
    }
    (tmp_path / "store.json").write_text(json.dumps(old))
    header = read_header(tmp_path)
    assert header == StoreHeader("google_robot", "close_top_drawer", ("overhead_camera",), "mujoco")
    check(config(backend="mujoco", task="close_top_drawer", out=str(tmp_path)))


# --- in the real scene ----------------------------------------------------------------------------


@pytest.mark.sim
@pytest.mark.slow
def test_a_demonstration_in_the_real_scene(tmp_path, monkeypatch):
    if not ASSETS.is_dir():
        pytest.skip(f"no assets at {ASSETS}")
    monkeypatch.setenv("SIMPLER_ASSETS", str(ASSETS))
    main(config(episodes=2, out=str(tmp_path), noisy_episodes=1.0, linger=2))
    store = EpisodeStore(tmp_path)
    assert len(store) == 2
    colours = set()
    for i in range(2):
        record = store.record(i)
        assert record.success
        assert record.images["overhead_camera"][0].shape == (256, 320, 3)
        assert record.instruction[0] == "close bottom drawer"
        assert not record.terminate.any()
        assert np.abs(record.executed - record.actions)[:, :3].max() > 0.01
        assert record.meta["noise"] == 0.02
        base = record.privileged["base"][0]
        np.testing.assert_allclose(
            base[:2], [record.draws["robot_x"], record.draws["robot_y"]], atol=1e-5
        )
        opening = record.privileged["drawers"][:, 2]
        assert opening[0] == pytest.approx(record.draws["drawer_bottom"], abs=5e-3)
        assert opening[-1] <= 0.05
        colours.add(record.draws["colouring"])
    assert (tmp_path / "contact_sheet.png").stat().st_size > 10_000
