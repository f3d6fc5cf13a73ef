"""The last stage: what each limit does, what it counts, and its place in the rollout."""

import numpy as np
import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.spec import ActionChunk, UserError, task_named
from selfflow.envs.fake import make_fake
from selfflow.eval import parts
from selfflow.eval.beside import Beside
from selfflow.eval.parts import RolloutConfig
from selfflow.eval.report import summarize
from selfflow.eval.rollout import run_episode
from selfflow.policies.limits import Limiter, Limits

HERE = np.array([0.5, 0.0, 1.0], np.float32)


def action(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_nothing_is_changed_without_limits():
    limiter, given = Limiter(Limits()), action(9, -9, 9, 3, -3, 3, 0.4)
    np.testing.assert_array_equal(limiter(given, HERE), given)
    assert limiter.counts == {"actions": 1}


def test_steps_are_shortened_along_their_direction():
    limiter = Limiter(Limits(max_metres=0.05, max_radians=0.2))
    out = limiter(action(0.03, 0.04, 0.12, 0.1, 0, 0, 1), HERE)  # 0.13 m, 0.1 rad
    np.testing.assert_allclose(out[:3], np.array([0.03, 0.04, 0.12]) * 0.05 / 0.13, rtol=1e-6)
    np.testing.assert_array_equal(out[3:], action(0.1, 0, 0, 1))
    out = limiter(action(0.03, 0.04, 0, 0, 0, -0.4, 0), HERE)  # 0.05 m: just allowed
    np.testing.assert_allclose(out, [0.03, 0.04, 0, 0, 0, -0.2, 0], rtol=1e-6)
    assert limiter.counts == {"actions": 2, "max_metres": 1, "max_radians": 1}


def test_the_low_pass_is_geometric_from_rest_and_spares_the_gripper():
    limiter = Limiter(Limits(low_pass=0.5))
    steady = action(0.1, 0, 0, 0, 0.2, 0, 0.7)
    for n in range(1, 5):
        out = limiter(steady, HERE)
        np.testing.assert_allclose(out[:6], steady[:6] * (1 - 0.5**n), rtol=1e-6)
        assert out[6] == steady[6]
    limiter.reset()
    np.testing.assert_allclose(limiter(steady, HERE)[:6], steady[:6] / 2, rtol=1e-6)
    assert limiter.counts == {"actions": 1}


def test_the_tool_stays_in_its_box_and_is_not_thrown_back_into_it():
    limiter = Limiter(Limits(workspace=(0.4, -0.1, 0.9, 0.6, 0.1, 1.1)))
    np.testing.assert_allclose(
        limiter(action(0.3, 0.05, -0.3, 0, 0, 0, 1), HERE)[:3], [0.1, 0.05, -0.1], atol=1e-6
    )
    outside = action(0.7, 0, 1)
    np.testing.assert_array_equal(limiter(action(0.1, 0, 0, 0, 0, 0, 1), outside)[:3], 0)
    below = action(0.3, 0, 1)
    np.testing.assert_array_equal(limiter(action(-0.1, 0, 0, 0, 0, 0, 1), below)[:3], 0)
    back = action(-0.02, 0, 0, 0, 0, 0, 1)
    np.testing.assert_allclose(limiter(back, outside), back)
    assert limiter.counts == {"actions": 4, "workspace": 3}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_metres": 0.0}, "max_metres=0.0: must be above 0"),
        ({"max_radians": -1.0}, "max_radians=-1.0"),
        ({"low_pass": 1.0}, "low_pass=1.0: 0"),
        ({"workspace": (0.0, 0.0, 0.0)}, "six numbers"),
        ({"workspace": (0.0, 0.0, 1.0, 1.0, 1.0, 0.5)}, "the least first"),
    ],
)
def test_limits_that_cannot_be_are_one_line(given: dict, says: str):
    with pytest.raises(UserError, match=says):
        Limits(**given)


class Straight:
    """Always the same action."""

    embodiment = "google_robot"

    def reset(self, seed: int | None = None) -> None: ...

    def act(self, observation: dict) -> ActionChunk:
        return ActionChunk(np.tile(action(0.04, 0, 0, 0, 0, 0, 1), (4, 1)))


def test_a_rollout_counts_what_was_limited_anew_each_episode():
    env, limiter = make_fake(task_named("close_top_drawer")), Limiter(Limits(max_metres=0.01))
    episodes = [run_episode(env, Straight(), seed, limiter=limiter) for seed in (1, 2)]
    for episode in episodes:
        assert episode.limited == {"actions": episode.steps, "max_metres": episode.steps}
    total = sum(e.steps for e in episodes)
    assert summarize(episodes)["limited"] == {"actions": total, "max_metres": total}
    assert run_episode(env, Straight(), 1).limited == {}


def test_older_runs_go_on_and_new_keys_tell_runs_apart():
    plain = compose(RolloutConfig, "rollout", ["policy=hold"])
    assert not {*parts.LATER} & {*plain.identity()}
    limited = compose(RolloutConfig, "rollout", ["policy=hold", "workspace=[0,0,0,1,1,1]"])
    assert limited.identity()["workspace"] == [0, 0, 0, 1, 1, 1]
    assert limited.limits == Limits(workspace=(0.0, 0.0, 0.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("low_pass=1", "low_pass=1"),
        ("workspace=[0,0,1]", "six numbers"),
        ("ensemble=0.01", "ensemble=0.01: only with policy=checkpoint"),
        ("steps=4", "steps=4: only with policy=checkpoint"),
        ("checkpoint=run", "checkpoint=run: only with policy=checkpoint"),
    ],
)
def test_mistakes_are_known_before_work_begins(override: str, says: str):
    config = compose(RolloutConfig, "rollout", ["policy=hold", "backend=fake", override])
    with pytest.raises(UserError, match=says):
        parts.check(config)


class Dreaming(Straight):
    imagine, imagined = True, None


def test_the_imagined_frame_of_a_step_is_shown_beside_it():
    policy = Dreaming()
    beside = Beside(policy)
    real = np.full((8, 10, 3), 200, np.uint8)

    def imagined(step: int) -> int:
        picture = beside(real, step)
        half = (picture.shape[1] - 8) // 2
        assert (picture[:, :half] == 200).all()
        return int(picture[0, -1, 0])

    assert imagined(0) == 24  # nothing yet
    policy.imagined = np.stack([np.full((4, 5, 3), v, np.uint8) for v in (1, 2)]), 2
    assert [imagined(step) for step in range(1, 7)] == [1, 1, 2, 2, 2, 2]
    policy.imagined = np.full((1, 4, 5, 3), 9, np.uint8), 2
    assert imagined(7) == 9


@pytest.mark.parametrize(
    ("backend", "task", "name"),
    [
        ("mujoco", "open_drawer_place", "twin"),
        ("simpler", "open_drawer_place", "simpler"),
        ("simpler", "close_middle_drawer", "simpler"),
        ("simpler", "pick_coke_can", "twin"),
    ],
)
def test_the_bundled_policy_is_that_of_the_scene(backend: str, task: str, name: str):
    config = compose(RolloutConfig, "rollout", [f"backend={backend}", f"task={task}"])
    assert config.run.name == name
    assert (config.run / "model.safetensors").stat().st_size < 25e6
    given = compose(RolloutConfig, "rollout", [f"backend={backend}", "checkpoint=mine"])
    assert str(given.run) == "mine"
