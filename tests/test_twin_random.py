"""Domain randomisation of the twin: from the seed, recorded, undone."""

import mujoco
import numpy as np
import pytest

from selfflow.datasets.spec import UserError, task_named
from selfflow.envs.base import RobotEnv
from selfflow.envs.twin import make_mujoco
from selfflow.envs.twin_body import HOME
from selfflow.envs.twin_random import LEVELS, Randomise, apply, draw
from selfflow.envs.twin_scene import SUBSTEPS

SMALL = (24, 32)
ACTION = np.array([0.03, -0.02, -0.04, 0.05, 0, 0, 0.2])
FAMILIES = ("open_drawer_place", "pick_coke_can", "move_near")


def twin(name: str, randomise: str | Randomise, pictures: bool = False) -> RobotEnv:
    return make_mujoco(task_named(name), image_size=SMALL, pictures=pictures, randomise=randomise)


def arrays(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    """Every number of a compiled model."""
    found = {}
    for part, holder in (("", model), ("vis.", model.vis.headlight), ("opt.", model.opt)):
        for name in dir(holder):
            value = getattr(holder, name)
            if not name.startswith("_") and isinstance(value, np.ndarray):
                found[part + name] = value.copy()
    return found


def trace(env: RobotEnv, seed: int, steps: int = 4) -> list[np.ndarray]:
    observation, info = env.reset(seed=seed)
    seen = [*observation["images"].values(), *info["privileged"].values()]
    for _ in range(steps):
        observation, *_, info = env.step(ACTION)
        seen += [observation["proprio"], *observation["images"].values()]
        seen += info["privileged"].values()
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_a_nominal_episode_after_a_random_one_is_as_in_a_new_env(name: str):
    used, new = twin(name, "wide"), twin(name, "none")
    used.reset(seed=1)
    used.step(ACTION)
    used.simulator._randomise = LEVELS["none"]
    for a, b in zip(trace(used, 5), trace(new, 5), strict=True):
        np.testing.assert_array_equal(a, b)
    left, right = arrays(used.simulator.model), arrays(new.simulator.model)
    assert len(left) > 300
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_seed_fixes_every_draw_and_draws_are_recorded(name: str):
    env = twin(name, "wide")
    first, second = env.reset(seed=7)[1]["draws"], env.reset(seed=7)[1]["draws"]
    assert first == second
    assert first != env.reset(seed=8)[1]["draws"]
    plain = twin(name, "none").reset(seed=7)[1]["draws"]
    assert plain.items() <= first.items(), "places do not change with the level"
    drawn = first.keys() - plain.keys()
    assert drawn >= {"camera_x", "light_turn", "friction", "mass", "gain", "latency",
                     "pattern_floor", "colour_top_r"}  # fmt: skip
    assert all(isinstance(value, float) for value in first.values())


def test_the_recorded_draws_give_the_model():
    env = twin("move_near", "wide")
    draws = env.reset(seed=3)[1]["draws"]
    again = twin("move_near", "none")
    again.reset(seed=3)
    apply(again.simulator.model, draws)
    left, right = arrays(env.simulator.model), arrays(again.simulator.model)
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def test_pictures_differ_and_come_again():
    env, plain = twin("pick_coke_can", "wide", True), twin("pick_coke_can", "none", True)
    pictures = [env.reset(seed=s)[0]["images"]["overhead_camera"].astype(int) for s in (2, 2)]
    nominal = plain.reset(seed=2)[0]["images"]["overhead_camera"].astype(int)
    env.close(), plain.close()
    np.testing.assert_array_equal(*pictures)
    assert np.abs(pictures[0] - nominal).mean() > 3


def test_latency_delays_the_arm_by_as_many_substeps():
    """A whole step late, the arm stays for one step and then does what it did at once."""
    late, prompt = twin("pick_coke_can", "none"), twin("pick_coke_can", "none")
    for env in (late, prompt):
        env.reset(seed=4)
    late.simulator._late = [(HOME, 1.0)] * SUBSTEPS  # as a draw would
    down = np.array([0, 0, -0.05, 0, 0, 0, 1.0])
    before = late.simulator.proprio()[:3]
    late.step(down)
    prompt.step(down)
    assert np.linalg.norm(late.simulator.proprio()[:3] - before) < 1e-3
    assert np.linalg.norm(prompt.simulator.proprio()[:3] - before) > 3e-3


def test_levels_and_ranges():
    with pytest.raises(UserError, match="randomise=wild: choose one of none, mild, wide"):
        twin("open_top_drawer", "wild")
    model = twin("open_top_drawer", "none").simulator.model
    rng = np.random.default_rng(0)
    assert draw(LEVELS["none"], model, rng) == {}
    only = draw(Randomise(mass=0.5), model, rng)
    assert set(only) == {"mass"}
    assert abs(only["mass"]) <= 0.5
