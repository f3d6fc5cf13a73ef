"""ManiSkill's Bridge tasks: the mapping to its controller, its files, its scenes."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from selfflow.datasets.rotations import canonical, compose, from_axis_angle, rotate, to_axis_angle
from selfflow.datasets.spec import TASKS, UserError, task_named
from selfflow.envs import maniskill, maniskill_assets, simpler_assets
from selfflow.envs.bridge_expert import BridgeExpert
from selfflow.envs.bridge_tasks import BRIDGE_RULES, PAIRS, grid_cell
from selfflow.envs.maniskill import OwnRules, proprio_of, start_poses, to_controller
from selfflow.eval import parts

SHARED = Path(__file__).parents[2] / "shared"
ASSETS, ORACLE = SHARED / "simpler_assets", SHARED / "oracle" / "simpler"
CARROT = task_named("widowx_carrot_on_plate")
needs_files = pytest.mark.skipif(not ASSETS.is_dir(), reason=f"no SIMPLER assets at {ASSETS}")
needs_maniskill = pytest.mark.skipif(
    importlib.util.find_spec("mani_skill") is None,
    reason="mani-skill is not installed: pip install 'selfflow[maniskill]' adds 0.7 GB",
)
ZERO = np.zeros(3)


def euler(angles: np.ndarray) -> np.ndarray:
    """Quaternion of Rx(a)·Ry(b)·Rz(c)."""
    x, y, z = (from_axis_angle(angle * axis) for angle, axis in zip(angles, np.eye(3), strict=True))
    return compose(compose(x, y), z)


# --- the mapping, without ManiSkill ---------------------------------------------------------------


@given(arrays(np.float64, 3, elements=st.floats(-np.pi / 2, np.pi / 2)))
def test_the_angles_mean_the_same_rotation(turn):
    sent = to_controller(np.array([0, 0, 0, *turn, 0.5]), ZERO, ZERO)
    same = np.abs(euler(sent[3:6].astype(np.float64)) @ from_axis_angle(turn))
    assert same == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("off", [0.0, 1e-9, 1e-5])
def test_the_angles_hold_where_two_axes_coincide(sign: float, off: float):
    turn = to_axis_angle(euler(np.array([0.7, sign * (np.pi / 2 - off), 0.2])))
    sent = to_controller(np.array([0, 0, 0, *turn, 0.5]), ZERO, ZERO).astype(np.float64)
    assert np.abs(euler(sent[3:6]) @ from_axis_angle(turn)) == pytest.approx(1.0, abs=1e-6)


def test_the_target_turns_about_the_sensed_tool():
    rng = np.random.default_rng(0)
    action, tool, target = rng.normal(size=(5, 7)), rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    sent = to_controller(action, tool, target)
    turned = rotate(from_axis_angle(action[:, 3:6]), target - tool)
    np.testing.assert_allclose(target + sent[:, :3], tool + turned + action[:, :3], atol=1e-5)
    still = to_controller(np.array([0.01, -0.02, 0.03, 0, 0, 0, 1.0]), tool[0], target[0])
    np.testing.assert_allclose(still, [0.01, -0.02, 0.03, 0, 0, 0, 1], atol=1e-6)
    assert to_controller(np.zeros(7), ZERO, ZERO)[6] == -1.0  # closed


def test_proprioception_says_how_far_the_fingers_stand_apart():
    tool = np.array([[0.1, 0.2, 0.3, -1.0, 0, 0, 0]] * 3)
    qpos = np.zeros((3, 8))
    qpos[:, 6:] = np.array([0.015, 0.026, 0.037])[:, None]
    sensed = proprio_of(tool, qpos)
    assert sensed.dtype == np.float32
    np.testing.assert_allclose(sensed[:, 7], [0, 0.5, 1], atol=1e-6)
    np.testing.assert_allclose(sensed[0, :7], [0.1, 0.2, 0.3, 1, 0, 0, 0], atol=1e-6)


def test_start_poses_are_the_placements():
    cell = grid_cell(CARROT.name, 3)
    xyz, turns = start_poses(CARROT.name, cell, np.array([0.88, 0.87]))
    np.testing.assert_allclose(xyz[0], [cell["source_x"], cell["source_y"], 0.88])
    np.testing.assert_allclose(xyz[1], [cell["target_x"], cell["target_y"], 0.87])
    np.testing.assert_allclose(turns[0], from_axis_angle([0, 0, cell["source_yaw"]]))
    np.testing.assert_allclose(turns[1], [1, 0, 0, 0])


def test_success_is_maniskills_and_simplers_rule_is_beside_it():
    """A carrot high above the plate: no success to SIMPLER, whatever ManiSkill says."""
    pose = np.array([0, 0, 1, 1, 0, 0, 0], np.float32)
    no = np.zeros(1, np.float32)
    state = {"source": pose, "target": pose, "source_centre": np.array([0, 0, 2.0])}
    state |= {"target_centre": pose[:3], "source_grasped": no, "source_touches_other": no}
    rules = OwnRules(CARROT)
    rules.reset(state | {"success": np.ones(1, np.float32)})
    assert rules.success()
    assert rules.progress()["simpler_rule"] == 0.0
    rules.step(state | {"success": no, "source_centre": np.array([0, 0, 1.02])}, 0)
    assert not rules.success()
    assert rules.progress()["simpler_rule"] == 1.0


def test_tasks_and_messages(monkeypatch):
    assert set(maniskill.IDS) == set(BRIDGE_RULES) == set(parts.tasks_of("maniskill"))
    with pytest.raises(UserError, match="task=move_near: ManiSkill has none such; choose one of"):
        maniskill.make_maniskill(TASKS["move_near"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; type pip install 'selfflow\[maniskill\]'"):
        maniskill.make_maniskill(CARROT)


# --- its files ------------------------------------------------------------------------------------


@pytest.fixture
def no_own_files(tmp_path, monkeypatch):
    """A user without downloads of ManiSkill's; the folder that links are made in."""
    monkeypatch.delenv("MS_ASSET_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SIMPLER_ASSETS", str(ASSETS))
    return tmp_path / "cache" / "selfflow" / "maniskill"


@needs_files
def test_simplers_files_are_all_that_the_tasks_need(no_own_files, monkeypatch, tmp_path):
    for _ in range(2):  # a repetition finds all as it is
        folder = maniskill_assets.asset_folder()
        assert folder == no_own_files
        for task in PAIRS:
            assert maniskill_assets.missing(folder, task) == []
            maniskill_assets.require(folder, task)
    robot = folder / maniskill_assets.WIDOWX
    urdf = (robot / maniskill_assets.URDF).read_text()
    pairs = (robot / maniskill_assets.SRDF).read_text()
    assert pairs.count("<disable_collisions") == len(maniskill_assets.OVERLAPPING) < 32
    for link in {link for pair in maniskill_assets.OVERLAPPING for link in pair}:
        assert f'<link name="{link}"' in urdf
    monkeypatch.setenv("SIMPLER_ASSETS", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no SIMPLER assets .* run python envs/simpler_assets\.py"):
        maniskill_assets.asset_folder()


@needs_files
def test_links_follow_simplers_folder(no_own_files, monkeypatch, tmp_path):
    maniskill_assets.asset_folder()
    other = tmp_path / "other"
    (other / maniskill_assets.ROBOT).mkdir(parents=True)
    (other / maniskill_assets.ROBOT / maniskill_assets.URDF).write_text("<robot/>")
    monkeypatch.setenv("SIMPLER_ASSETS", str(other))
    folder = maniskill_assets.asset_folder()
    assert (folder / maniskill_assets.WIDOWX / maniskill_assets.URDF).read_text() == "<robot/>"
    with pytest.raises(UserError, match=r"6 of .* are missing, .*run python envs/simpler_assets"):
        maniskill_assets.require(folder, "widowx_eggplant_in_basket")


def test_the_users_own_files_come_first(no_own_files, monkeypatch, tmp_path):
    own = tmp_path / ".maniskill"
    (own / maniskill_assets.BRIDGE).mkdir(parents=True)
    assert maniskill_assets.asset_folder() == own
    with pytest.raises(UserError, match=r"6 of .*download_asset bridge_v2_real2sim"):
        maniskill_assets.require(own, CARROT.name)
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path / "named"))
    assert maniskill_assets.asset_folder() == tmp_path / "named"


# --- its scenes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene():
    """The carrot's environment, without pictures unless asked for."""
    with pytest.MonkeyPatch.context() as patch:
        if "SIMPLER_ASSETS" not in os.environ and ASSETS.is_dir():
            patch.setenv("SIMPLER_ASSETS", str(ASSETS))
        patch.setenv("MS_ASSET_DIR", "")  # ours sets it
        try:
            simpler_assets.photo("bridge_real_eval_1")
            env = maniskill.make_maniskill(CARROT, "grid", pictures=False)
        except UserError as e:
            pytest.skip(str(e))
        yield env
        env.close()


@pytest.mark.sim
@pytest.mark.slow
@needs_maniskill
@pytest.mark.filterwarnings("default")
def test_an_expert_puts_the_carrot_on_the_plate(scene):
    observation, info = scene.reset(seed=9)
    assert observation["images"] == {}
    assert observation["instruction"] == CARROT.instructions[0]
    assert info["backend"] == "maniskill"
    again, _ = scene.reset(seed=9)
    np.testing.assert_array_equal(again["proprio"], observation["proprio"])
    expert = BridgeExpert(scene.task)
    expert.reset()
    for _ in range(scene.task.max_steps):
        action, _ = expert.act(info["privileged"])
        observation, reward, _, truncated, info = scene.step(action)
        assert scene.observation_space["proprio"].contains(observation["proprio"])
    assert truncated
    assert info["success"]
    assert reward == 1.0
    assert info["progress"]["simpler_rule"] == 1.0
    assert info["ik_failed"] == info["clipped"] == 0


@pytest.mark.sim
@pytest.mark.slow
@needs_maniskill
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "cell"), [("smooth_1", 9), ("contact_1", 9)])
def test_replays_the_original(scene, name: str, cell: int):
    path = ORACLE / f"widowx_carrot_{name}.npz"
    if not path.exists():
        pytest.skip(f"no oracle trace {path}")
    with np.load(path) as z:
        trace = {key: z[key] for key in z.files}
    assert json.loads(str(trace["meta"]))["episode_id"] == cell
    simulator = scene.simulator
    simulator.reset(grid_cell(CARROT.name, cell), np.random.default_rng(0))
    for n, action in enumerate(trace["action"]):
        sensed = simulator.proprio().astype(np.float64)
        turned = canonical(compose(from_axis_angle(action[3:6]), sensed[3:7]))
        assert simulator.step(sensed[:3] + action[:3], turned, float(action[6] + 1) / 2)
        state = simulator.privileged()
        off = np.linalg.norm(state["tool"][:3] - trace["ee_pose"][n + 1, :3])
        assert off < (2e-4 if name.startswith("smooth") else 1e-3)
    carrot = np.linalg.norm(state["source"][:3] - trace["object_pose"][-1, 0, :3])
    assert carrot < 0.005
    assert bool(state["success"][0]) == bool(trace["success"][-1])


@pytest.mark.sim
@pytest.mark.slow
@needs_maniskill
@pytest.mark.filterwarnings("default")
def test_the_vector_of_one_scene_is_that_scene(scene):
    from selfflow.envs.maniskill_vector import make_maniskill_vector

    with pytest.raises(UserError, match="num_envs=2: sim_backend=cpu has one scene"):
        make_maniskill_vector(CARROT, 2, sim_backend="cpu")
    vector = make_maniskill_vector(CARROT, 1, sim_backend="cpu")
    single, info = scene.reset(seed=5)
    batch, told = vector.reset(seed=5)
    assert told["draws"] == [info["draws"]]
    assert batch["images"]["3rd_view_camera"].shape == (1, 480, 640, 3)
    rng = np.random.default_rng(0)
    for _ in range(5):
        action = np.append(rng.uniform(-0.02, 0.02, 6), 1.0)
        single, *_ = scene.step(action)
        batch, rewards, _, _, told = vector.step(action[None])
        np.testing.assert_allclose(batch["proprio"][0], single["proprio"], atol=2e-5)
    assert rewards.shape == told["success"].shape == (1,)
    assert batch["instruction"] == (single["instruction"],)
    np.testing.assert_allclose(
        batch["images"]["3rd_view_camera"][0].astype(float), scene.render().astype(float), atol=3
    )
    with pytest.raises(ValueError, match="finite"):
        vector.step(np.full((1, 7), np.nan))
    vector.close()
