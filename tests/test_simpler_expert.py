"""The scripted experts of the drawer tasks, in the real SIMPLER scene and without a simulator."""

from pathlib import Path

import numpy as np
import pytest

from selfflow.datasets.spec import task_named
from selfflow.envs.base import RobotEnv
from selfflow.envs.expert import OPENED, DrawerExpert, perturb
from selfflow.envs.simpler import make_simpler
from selfflow.envs.simpler_expert import expert_for

SHARED = Path(__file__).parents[2] / "shared"
Places = list[tuple[float, str]]  # the apple's height and the instruction, a step


def _run(name: str, cell: int, steps: int, noise: float = 0.0) -> tuple[RobotEnv, dict, Places]:
    """The expert for that many steps on one of the grid's cells."""
    env = make_simpler(task_named(name), "grid", pictures=False)
    expert, rng, seen = expert_for(env.task), np.random.default_rng(cell), []
    observation, info = env.reset(seed=cell)
    expert.reset()
    for _ in range(steps):
        action, done = expert.act(info["privileged"])
        if done and not env.final_subtask:
            assert info["privileged"]["drawers"][0] >= OPENED
            observation = env.advance_subtask()
        if rng.random() < 0.5:
            action = perturb(action, rng, noise, 4 * noise)
        told = observation["instruction"]
        observation, *_, info = env.step(action)
        seen.append((float(info["privileged"]["apple"][2]), told))
    env.close()
    return env, info, seen


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
@pytest.mark.parametrize(
    ("name", "cell", "noise"),
    [("open_top_drawer", 8, 0.0), ("open_top_drawer", 3, 0.02), ("close_bottom_drawer", 2, 0.0)],
)
def test_the_expert_moves_a_drawer(name: str, cell: int, noise: float):
    _, info, _ = _run(name, cell, 65, noise)
    assert info["success"]
    assert info["clipped"] == 0


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.usefixtures("_sim")
def test_the_expert_places_the_apple_and_lifts_it_only_when_told_to():
    env, info, seen = _run("open_drawer_place", 26, 130)
    assert info["success"]
    height, first = seen[0][0], env.task.instructions[0]
    assert sum(told == first for _, told in seen) < 70  # well before the forced advance at 100
    assert all(abs(z - height) < 0.01 for z, told in seen if told == first)


# --- without a simulator -------------------------------------------------------------------------


def _state(opening: float, apple: tuple[float, float, float] = (-0.05, 0.03, 0.918)) -> dict:
    state = {
        "tool": [0.2, 0.1, 1.05, 1, 0, 0, 0],
        "base": [0.65, 0.0, 0.08, 0, 0, 0, 1],
        "drawers": [opening, opening, opening],
        "apple": [*apple, 1, 0, 0, 0],
        "apple_on_drawer_floor": [0],
    }
    return {name: np.array(value, np.float32) for name, value in state.items()}


def test_a_shut_drawer_is_tried_again_and_never_called_open():
    expert = DrawerExpert(task_named("open_drawer_place"))
    expert.reset()
    assert not any(expert.act(_state(0.1))[1] for _ in range(300))
    ends = [expert.act(_state(OPENED + 0.01))[1] for _ in range(150)]
    assert sum(ends) == 1


def test_the_pull_returns_to_its_height_and_y():
    expert = DrawerExpert(task_named("open_top_drawer"))
    expert.reset()
    state, to_world = _state(0.0), np.array([-1.0, -1.0, 1.0])  # the base looks along -x
    action = np.zeros(7)
    while not np.isclose(action[0], -0.12, atol=1e-6):  # towards the robot
        action, _ = expert.act(state)
        state["tool"][:3] += 0.3 * action[:3] * to_world
    aim = state["tool"][:3] + 0.7 * action[:3] * to_world
    assert aim[2] == pytest.approx(0.735, abs=1e-3)  # 2 cm below the front's edge
    state["tool"][1:3] += (0.01, 0.02)  # drifted off
    action, _ = expert.act(state)
    np.testing.assert_allclose((state["tool"][:3] + action[:3] * to_world)[1:], aim[1:], atol=1e-5)
