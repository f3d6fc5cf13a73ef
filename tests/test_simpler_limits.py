"""SIMPLER's scenes at their limits: bad input, missing parts, repetition, memory, workers."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from selfflow.datasets.rotations import compose, from_axis_angle, inverse, to_axis_angle
from selfflow.datasets.spec import UserError, task_named
from selfflow.envs import simpler_assets
from selfflow.envs.control import AbsolutePose
from selfflow.envs.fake import make_fake
from selfflow.envs.gripper import CLOSED, RelativeGripper
from selfflow.envs.simpler import make_simpler

SHARED = Path(__file__).parents[2] / "shared" / "simpler_assets"
MESHES = f"{simpler_assets.ROBOT_FOLDER}/3obj_recolor_cabinet_visual_matching_1"
SMALL = (64, 80)
SIZES = {"open_drawer_place": SMALL, "move_near": SMALL, "widowx_eggplant_in_basket": (60, 80)}
HOLD = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


# --- input ----------------------------------------------------------------------------------------


def refuses_bad_actions(env: gymnasium.Env) -> None:
    """ValueError for each, after which the episode goes on as if nothing had been asked."""
    before, _ = env.reset(seed=1)
    bad = [[np.nan, *HOLD[1:]], [*HOLD[:6], np.inf], HOLD[:6], [HOLD, HOLD], 0.0]
    for action in bad:
        with pytest.raises(ValueError, match="an action is 7 finite numbers"):
            env.step(np.array(action))
    with pytest.raises(ValueError, match="could not convert"):
        env.step(np.array(["forwards"] * 7))
    observation, *_, info = env.step(HOLD)
    assert info["clipped"] == 0
    np.testing.assert_allclose(observation["proprio"], before["proprio"], atol=1e-3)
    *_, info = env.step(np.array([0, 0, -7, 0, 0, 9, 1.5]))
    assert info["clipped"] == 1
    *_, info = env.step(HOLD)
    assert info["clipped"] == 1  # counted so far


def test_the_fake_refuses_bad_actions():
    refuses_bad_actions(make_fake(task_named("open_top_drawer"), pictures=False))


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize("task", ["open_top_drawer", "widowx_stack_cube"])
def test_bad_actions_are_refused_and_wild_ones_clipped(task: str):
    env = make_simpler(task_named(task), "grid", pictures=False)
    refuses_bad_actions(env)
    env.close()


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
def test_wild_actions_for_a_whole_episode_leave_finite_state():
    env = make_simpler(task_named("pick_coke_can"), "grid", pictures=False)
    rng = np.random.default_rng(0)
    env.reset(seed=7)
    for _ in range(40):
        observation, *_, info = env.step(rng.uniform(-9, 9, 7))
        assert np.isfinite(observation["proprio"]).all()
        assert env.observation_space.contains(observation)
    assert info["clipped"] == 40
    assert info["ik_failed"] > 0
    env.close()


# --- control --------------------------------------------------------------------------------------


def test_relative_gripper_is_simplers_raw_action():
    gripper, drive = RelativeGripper(), np.array([0.4, 0.4])
    gripper.reset(np.zeros(2))
    np.testing.assert_allclose(gripper.goal(0.5, drive), 0.0)  # hold: the last goal
    np.testing.assert_allclose(gripper.goal(0.25, drive), 0.4 + 0.5 * CLOSED)
    np.testing.assert_allclose(gripper.goal(1.0, drive), -0.0101)
    np.testing.assert_allclose(gripper.goal(0.0, drive), CLOSED)


def test_absolute_poses_arrive_and_bad_ones_are_the_environment_s_errors():
    env = AbsolutePose(make_fake(task_named("open_top_drawer")))
    observation, _ = env.reset(seed=0)
    goal = [0.6, 0.1, 1.1, 0.3, -0.2, 0.5, 0.0]
    assert env.action_space.contains(np.array(goal, np.float32))
    observation, *_, info = env.step(np.array(goal))
    np.testing.assert_allclose(observation["proprio"][:3], goal[:3], atol=1e-6)
    np.testing.assert_allclose(to_axis_angle(observation["proprio"][3:7]), goal[3:6], atol=1e-6)
    assert observation["proprio"][7] == 0.0
    assert info["clipped"] == 0
    with pytest.raises(ValueError, match="an action is 7 finite numbers"):
        env.step(np.array([np.nan] * 7))


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize("task", ["open_top_drawer", "widowx_stack_cube"])
def test_an_absolute_pose_is_reached(task: str):
    """Both controllers: from the sensed pose, and from the last target."""
    env = AbsolutePose(make_simpler(task_named(task), "grid", pictures=False))
    observation, _ = env.reset(seed=0)
    start = observation["proprio"].astype(np.float64)
    turned = compose(from_axis_angle([0.1, 0.2, -0.3]), start[3:7])
    goal = np.array([*np.add(start[:3], [0.03, 0.05, -0.04]), *to_axis_angle(turned), 1.0])
    for _ in range(12):
        observation, *_ = env.step(goal)
    off = compose(turned, inverse(observation["proprio"][3:7]))
    assert np.linalg.norm(observation["proprio"][:3] - goal[:3]) < 4e-4
    assert np.linalg.norm(to_axis_angle(off)) < 5e-3
    env.close()


# --- what may be missing --------------------------------------------------------------------------


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
def test_without_a_vulkan_device_there_is_one_line():
    code = "from selfflow.envs.simpler import make_simpler\n"
    code += "from selfflow.datasets.spec import task_named\n"
    code += "make_simpler(task_named('open_top_drawer'))"
    none = {"VK_DRIVER_FILES": "/nowhere", "VK_ICD_FILENAMES": "/nowhere"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | none
    )
    assert found.returncode == 1
    last = found.stderr.splitlines()[-1]
    assert "UserError: backend=simpler found no usable Vulkan device" in last
    assert last.endswith("run: make simpler-setup")


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize("missing", ["data/real_inpainting", "data/custom/models", MESHES])
def test_a_file_missing_at_reset_is_named(tmp_path, monkeypatch, missing: str):
    """The environment stands, the files are gone: an error; a reset works when they are back."""
    here = Path(os.environ["SIMPLER_ASSETS"])
    shutil.copytree(here, tmp_path / "a", copy_function=os.symlink, symlinks=True)
    monkeypatch.setenv("SIMPLER_ASSETS", str(tmp_path / "a"))
    env = make_simpler(task_named("open_drawer_place"), "grid", image_size=SMALL)
    (tmp_path / "a" / missing).rename(tmp_path / "gone")
    with pytest.raises(UserError, match="is missing in"):
        env.reset(seed=0)
    (tmp_path / "gone").rename(tmp_path / "a" / missing)
    env.reset(seed=0)
    env.close()


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
def test_a_closed_environment_opens_again_and_is_not_stepped():
    env = make_simpler(task_named("open_top_drawer"), image_size=SMALL)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(HOLD)
    first, _ = env.reset(seed=2)
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="reset"):
        env.step(HOLD)
    again, _ = env.reset(seed=2)
    np.testing.assert_array_equal(
        first["images"]["overhead_camera"], again["images"]["overhead_camera"]
    )
    env.close()


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
def test_without_pictures_nothing_is_drawn_until_asked():
    env = make_simpler(task_named("open_top_drawer"), "grid", image_size=SMALL, pictures=False)
    seen = make_simpler(task_named("open_top_drawer"), "grid", image_size=SMALL)
    drawn, picture = [], env.simulator.render
    env.simulator.render = lambda: drawn.append(1) or picture()  # type: ignore[method-assign]
    observation, info = env.reset(seed=5)
    other, _ = seen.reset(seed=5)
    assert observation["images"] == {}
    assert env.observation_space.contains(observation)
    assert info["cameras"]["overhead_camera"]["intrinsics"].shape == (3, 3)
    for _ in range(3):
        observation, *_ = env.step(HOLD)
        other, *_ = seen.step(HOLD)
        np.testing.assert_array_equal(observation["proprio"], other["proprio"])
    assert not drawn
    np.testing.assert_array_equal(env.render(), other["images"]["overhead_camera"])
    env.close()
    seen.close()


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.usefixtures("_sim")
def test_ray_tracing_darkens_the_gaps():
    """The same scene in both shadings: the photograph is equal, rays make the open drawer's inside
    dark, which is why the benchmark's authors insist on them; both environments live at once."""
    frames = []
    task = task_named("open_drawer_place")
    options = [{"shader": "rt", "samples": 2}, {"shader": "ibl"}]
    environments = [make_simpler(task, "grid", image_size=(128, 160), **o) for o in options]
    for env in (*environments, environments[0]):
        observation, _ = env.reset(seed=0)
        frames.append(observation["images"]["overhead_camera"].astype(np.float64))
    for env in environments:
        env.close()
    traced, plain, again = frames
    np.testing.assert_array_equal(traced, again)
    assert (np.abs(traced - plain).max(axis=2) == 0).mean() > 0.3  # the photograph
    inside = np.s_[60:66, 70:130]  # behind the front of the top drawer
    assert plain[inside].mean() > 100
    assert traced[inside].mean() < 0.6 * plain[inside].mean()
    table = np.s_[20:35, 75:100]
    assert abs(traced[table].mean() - plain[table].mean()) < 15


# --- determinism ----------------------------------------------------------------------------------


def trace(env: gymnasium.Env, seed: int, steps: int = 8) -> list[np.ndarray]:
    """The first frame, sensed state and privileged state of every step, and the last frame."""
    rng = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    found = [*observation["images"].values()]
    for _ in range(steps):
        action = [*rng.uniform(-0.03, 0.03, 3), *rng.uniform(-0.2, 0.2, 3), rng.integers(2)]
        observation, *_, info = env.step(np.array(action))
        found += [observation["proprio"], *info["privileged"].values()]
    return [*found, *observation["images"].values()]


@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize("task", list(SIZES))
@pytest.mark.parametrize("placement", ["mild", "grid"])
def test_an_episode_is_fixed_by_its_id(task: str, placement: str):
    """Bit for bit, in another environment too, whatever ran before and meanwhile."""
    one, other = (
        make_simpler(task_named(task), placement, image_size=SIZES[task]) for _ in range(2)
    )
    first = trace(one, 3)
    differs = trace(other, 13, steps=3)
    second = trace(other, 3)
    trace(one, 5, steps=2)
    third = trace(one, 3)
    for a, b, c in zip(first, second, third, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    assert np.any(differs[0] != first[0])
    one.close()
    other.close()


# --- processes and memory -------------------------------------------------------------------------


def apart(work: Callable[["multiprocessing.Queue[Any]"], None]) -> Any:
    """What `work` puts into its queue, in a new process in which no renderer has been open."""
    context = multiprocessing.get_context("spawn")
    report = context.Queue()
    process = context.Process(target=work, args=(report,))
    process.start()
    try:
        return report.get(timeout=120)
    finally:
        process.kill()
        process.join()


def vector_and_single(report: "multiprocessing.Queue[Any]") -> None:
    """Puts the last observations of two workers, of the same episodes one after the other, and
    what a process says that is forked while an environment is open here."""
    name = "selfflow.envs.registration:selfflow/Simpler-OpenDrawerPlace-v0"

    def make() -> gymnasium.Env:
        return gymnasium.make(name, image_size=SMALL)

    vector = gymnasium.vector.AsyncVectorEnv([make, make])
    vector.reset(seed=[5, 6])
    for _ in range(2):
        together, *_ = vector.step(np.stack([HOLD, HOLD]))
    vector.close()
    env, alone = make(), []
    for seed in (5, 6):
        env.reset(seed=seed)
        for _ in range(2):
            observation, *_ = env.step(HOLD)
        alone.append(observation)
    said: multiprocessing.Queue[str] = multiprocessing.Queue()
    multiprocessing.get_context("fork").Process(target=said_when_made, args=(said,)).start()
    report.put((together, alone, said.get(timeout=100)))


def said_when_made(report: "multiprocessing.Queue[str]") -> None:
    """Puts the UserError of making an environment."""
    try:
        make_simpler(task_named("open_top_drawer"))
    except UserError as e:
        report.put(str(e))


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.usefixtures("_sim")
def test_worker_processes_with_gymnasium_s_own_defaults():
    """Forked, with shared memory, instructions included; where a fork would hang, it says so."""
    together, alone, said = apart(vector_and_single)
    for i, one in enumerate(alone):
        np.testing.assert_array_equal(together["proprio"][i], one["proprio"])
        assert together["instruction"][i] == one["instruction"] == "open top drawer"
        np.testing.assert_array_equal(
            together["images"]["overhead_camera"][i], one["images"]["overhead_camera"]
        )
    assert "forked while its parent drew with SAPIEN; start it with context='spawn'" in said


def fifty_resets(report: "multiprocessing.Queue[Any]") -> None:
    """Puts resident MB after resets 1, 11, .. 51, and after close()."""
    env = make_simpler(task_named("open_drawer_place"), "grid", image_size=(128, 160))
    found = []
    for seed in range(51):
        env.reset(seed=seed)
        if seed % 10 == 0:
            found.append(resident())
    env.close()
    report.put([*found, resident()])


def resident() -> float:
    """MB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.usefixtures("_sim")
def test_fifty_resets_do_not_grow_and_close_frees():
    """Measured 858 MB flat to 4 MB over the resets, 413 MB after close()."""
    *during, closed = apart(fifty_resets)
    print(f"resident, MB: {', '.join(f'{x:.0f}' for x in during)}; closed {closed:.0f}")
    assert max(during) < 1200
    assert during[-1] - during[1] < 10
    assert closed < max(during) - 200
