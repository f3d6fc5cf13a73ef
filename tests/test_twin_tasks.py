"""Every task of the twin: gymnasium's contract and the expert's success; the table's physics."""

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from selfflow.datasets.spec import TASKS, UserError, task_named
from selfflow.envs.base import RobotEnv
from selfflow.envs.simpler_expert import expert_for
from selfflow.envs.tasks import FILES, TABLE_TASKS
from selfflow.envs.twin import make_mujoco
from selfflow.envs.twin_objects import NEAR_THINGS
from selfflow.envs.twin_scene import HANDLES, TABLE_TOP, Look

QUICK = ("close_top_drawer", "pick_coke_can", "move_near")  # one of each family
SEED = 90_002


def blind(name: str, placement: str = "mild", **options) -> RobotEnv:
    return make_mujoco(task_named(name), placement, image_size=(24, 32), pictures=False, **options)


def solve(env: RobotEnv, seed: int) -> dict:
    """The expert's episode up to its first success, at most to the step limit."""
    expert, truncated = expert_for(env.task), False
    _, info = env.reset(seed=seed)
    expert.reset()
    while not (truncated or info["success"]):
        action, done = expert.act(info["privileged"])
        if done and not env.final_subtask:
            env.advance_subtask()
        *_, truncated, info = env.step(action)
    return info


@pytest.mark.parametrize("name", FILES)
def test_contract(name: str, monkeypatch):
    monkeypatch.setenv("SELFFLOW_RENDERER", "ray")  # opens no OpenGL, for a few small pictures
    env = make_mujoco(task_named(name), image_size=(12, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # metres and radians by contract; gymnasium only recommends a normalised box
        warnings.filterwarnings("ignore", message=".*normalized space.*")
        check_env(env, skip_render_check=True)
    _, info = env.reset(seed=SEED)
    assert not info["success"]
    assert all(np.isfinite(value) for value in info["progress"].values())
    assert all(isinstance(value, float) for value in info["progress"].values())


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FILES]
)
def test_expert_solves_it(name: str):
    before, after = blind(name).reset(seed=SEED)[1]["progress"], solve(blind(name), SEED)
    assert after["success"]
    assert after["progress"] != before


def test_a_table_task_draws_pictures():
    env = make_mujoco(task_named("move_near"), "grid", image_size=(64, 80))
    first, second = (env.reset(seed=s)[0]["images"]["overhead_camera"] for s in (0, 12))
    env.close()
    assert first.shape == (64, 80, 3)
    assert np.abs(first.astype(int) - second).mean() > 1, "other things stand there"


@pytest.mark.parametrize("seed", [0, 12, 24, 36, 48])
def test_things_stand_where_they_were_put(seed: int):
    """Each triplet: settled on the table, upright, at rest, the others parked."""
    env = blind("move_near", "grid")
    _, info = env.reset(seed=seed)
    places, draws = info["privileged"]["objects"], info["draws"]
    wanted = {(round(draws[f"x{i}"], 2), round(draws[f"y{i}"], 2)) for i in range(3)}
    assert {(round(x, 2), round(y, 2)) for x, y in places[:, :2].tolist()} == wanted
    assert np.all(places[:, 2] > TABLE_TOP + 0.015)
    assert info["privileged"]["touches"] == 1
    assert info["privileged"]["grasped"] == 0
    env.step(np.array([0.0] * 6 + [1.0]))
    moved = env.simulator.privileged()["objects"] - places
    assert np.abs(moved[:, :3]).max() < 1e-3
    heights = [env.simulator.data.body(name).xpos[2] for name in NEAR_THINGS]
    assert sum(h < 0 for h in heights) == len(NEAR_THINGS) - 3


def test_lifted_free_of_the_table():
    """Held up it is grasped and touches nothing but the fingers; let go it touches the table."""
    env = blind("pick_standing_coke_can")
    info = solve(env, SEED)
    state = info["privileged"]
    assert (state["grasped"], state["touches"]) == (1, 0)
    assert info["progress"]["lift"] > 0.01
    for _ in range(8):
        *_, info = env.step(np.array([0.0] * 6 + [1.0]))
    assert (info["privileged"]["grasped"], info["privileged"]["touches"]) == (0, 1)
    assert not info["success"]


def test_handles_collide_only_if_asked():
    with pytest.raises(UserError, match="choose one of visual, collide"):
        blind("open_top_drawer", handles="solid")
    with pytest.raises(UserError, match="only with a drawer task"):
        blind("move_near", handles="collide")
    solid = [int(blind("open_top_drawer", handles=h).simulator.model.geom_contype.sum())
             for h in HANDLES]  # fmt: skip
    assert solid[1] - solid[0] == 9, "a bar and two posts on each of three drawers"


def test_looks_are_chosen():
    with pytest.raises(UserError, match="choose one of plain, office"):
        blind("open_top_drawer", look=Look(room="hall"))
    model = blind("open_top_drawer", look=Look("office", shadows=512, samples=4)).simulator.model
    assert (model.vis.quality.shadowsize, model.vis.quality.offsamples) == (512, 4)
    assert model.nlight == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE_TASKS)
def test_experts_solve_the_table_tasks_under_noise(name: str):
    """Wide randomisation and perturbed actions: it recovers from what goes wrong."""
    env, good = blind(name, randomise="wide"), 0
    for seed in range(90_010, 90_020):
        good += bool(solve(env, seed)["success"])
    assert good >= 9


def test_every_task_has_an_instruction_and_a_limit():
    assert {TASKS[name].max_steps for name in TABLE_TASKS} == {80}
    observation, _ = blind("move_near", "grid").reset(seed=0)
    assert observation["instruction"] == "move blue plastic bottle near pepsi can"
