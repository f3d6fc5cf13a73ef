"""A policy drives and the expert takes over: what is driven, what is recorded, what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.spec import ActionChunk, Observation, UserError, task_named
from selfflow.envs.expert import DrawerExpert
from selfflow.envs.fake import make_fake
from selfflow.envs.twin import make_mujoco
from selfflow.eval.handover import drive
from selfflow.eval.record_config import RecordConfig, check
from selfflow.eval.record_demos import fault, record_episode

PLACE = task_named("open_drawer_place")
BUNDLED = Path(__file__).parents[1] / "checkpoints" / "twin"


def config(**keys) -> RecordConfig:
    overrides = [f"{k}={v}" for k, v in {"task": "close_top_drawer", "linger": 1, **keys}.items()]
    return compose(RecordConfig, "record", overrides)


class Driver:
    """Chunks of four small moves; `ends` says at which decision the subtask does."""

    embodiment = "google_robot"

    def __init__(self, move: float = 0.05, ends: int | None = None) -> None:
        self._action = np.array([0, move, 0, 0, 0, 0.2, 0], np.float32)
        self._ends = ends

    def reset(self, seed: int | None = None) -> None:
        self.seed, self.seen = seed, list[str]()

    def act(self, observation: Observation) -> ActionChunk:
        self.seen.append(observation["instruction"])
        ends = np.zeros(4, bool)
        ends[1] = self._ends == len(self.seen) - 1
        return ActionChunk(np.tile(self._action, (4, 1)), ends)


@pytest.fixture
def driven() -> Callable[..., tuple]:
    def one(steps: int, driver: Driver) -> tuple:
        env = make_fake(PLACE)
        observation, info = env.reset(seed=3)
        return env, *drive(env, driver, observation, info, 3, steps)

    return one


def test_it_drives_so_many_steps_and_may_end_its_subtask(driven: Callable[..., tuple]):
    driver = Driver()
    env, observation, _, steps = driven(10, driver)
    assert (steps, driver.seed) == (10, 3)
    assert len(driver.seen) == 3  # chunks of four: two more actions are dropped
    assert observation["instruction"] == PLACE.instructions[0]
    driver = Driver(ends=1)  # in its second chunk, before the second action: after five steps
    env, observation, _, steps = driven(10, driver)
    assert steps == 10
    assert env.subtask == 1
    assert observation["instruction"] == PLACE.instructions[1]
    assert driver.seen == [PLACE.instructions[0]] * 2 + [PLACE.instructions[1]] * 2


def test_it_stops_where_nothing_is_left_to_do(driven: Callable[..., tuple]):
    assert driven(0, Driver())[-1] == 0
    assert driven(10, Driver(move=float("nan")))[-1] == 0

    class Ends(Driver):
        def act(self, observation: Observation) -> ActionChunk:
            return ActionChunk(np.zeros((2, 7), np.float32), np.array([False, True]))

    env = make_fake(PLACE)
    observation, info = env.reset(seed=3)
    assert drive(env, Driver(), observation, info | {"success": True}, 3, 10)[-1] == 0
    env, _, _, steps = driven(10, Ends())  # one step a subtask, then the last one's end
    assert (steps, env.subtask) == (2, 1)


@pytest.mark.slow
def test_the_expert_s_part_is_recorded_alone():
    task = task_named("close_top_drawer")
    env = make_mujoco(task, image_size=(16, 16))
    try:
        own = config(checkpoint="a", handover=[6, 6], noisy_episodes=0)
        whole = record_episode(env, DrawerExpert(task), 5, config(noisy_episodes=0))
        record = record_episode(env, DrawerExpert(task), 5, own, Driver())
    finally:
        env.close()
    assert record.success
    assert not fault(record)
    assert (record.meta["driven"], record.meta["driver"]) == (6, "a")
    assert "driven" not in whole.meta
    assert record.draws == whole.draws  # the start is the seed's, whoever acts
    start, begun = whole.privileged["tool"][0], record.privileged["tool"][0]
    assert np.linalg.norm(begun[:3] - start[:3]) > 0.03  # driven away from it
    assert len(record.images["overhead_camera"]) == len(record.actions) + 1


def test_a_subtask_that_the_driver_ended_is_not_a_forced_one():
    env = make_fake(PLACE)
    record = record_episode(
        env, DrawerExpert(PLACE), 0, config(task=PLACE.name, handover=[20, 20]), Driver(ends=1)
    )
    assert set(record.instruction) == {PLACE.instructions[1]}
    assert not record.meta["forced"]


def test_the_plan_keeps_the_episode_s_home():
    """The arm's first pose gives the gripper's, wherever the policy has left the arm."""
    env = make_fake(PLACE)
    _, first = env.reset(seed=0)
    later = first
    for _ in range(5):
        _, _, _, _, later = env.step(np.array([0, 0.1, 0, 0, 0, 0.3, 1]))
    moved, still = DrawerExpert(PLACE), DrawerExpert(PLACE)
    moved.reset(first["privileged"])
    moved.act(later["privileged"])
    still.reset()
    still.act(first["privileged"])
    np.testing.assert_array_equal(moved._home_q, still._home_q)
    np.testing.assert_array_equal(moved._home_p, still._home_p)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"handover": [5]}, r"handover=\[5\]: must be \[least, most\]"),
        ({"handover": [9, 5]}, "0 to 112 for close_top_drawer"),
        ({"handover": [0, 113]}, "0 to 112"),
        ({"handover": [-1, 5]}, "must be"),
        ({"checkpoint": "nowhere"}, "checkpoint=nowhere: no such folder; give a policy's run"),
    ],
)
def test_mistakes_are_known_before_anything_is_written(tmp_path: Path, wrong: dict, says: str):
    with pytest.raises(UserError, match=says):
        check(config(**{"checkpoint": BUNDLED, "out": tmp_path / "demos", **wrong}))
    assert not (tmp_path / "demos").exists()
