"""One episode without physics: its rules, readings of success, counts, and what is drawn."""

from dataclasses import replace

import numpy as np
import pytest

from selfflow.datasets.spec import ActionChunk, task_named
from selfflow.envs.fake import HANDLE, PointSimulator, make_fake
from selfflow.eval.rollout import BAD_ACTION, STEP_LIMIT, TERMINATED, run_episode

PLACE, CLOSE = task_named("open_drawer_place"), task_named("close_top_drawer")


class Script:
    """A policy that plays the given chunks, the last one for ever."""

    embodiment = "google_robot"

    def __init__(self, *chunks: ActionChunk) -> None:
        self.chunks, self.asked = chunks, []

    def reset(self, seed: int | None = None) -> None:
        self.asked, self.seed = [], seed

    def act(self, observation) -> ActionChunk:
        self.asked.append(observation["instruction"])
        return self.chunks[min(len(self.asked), len(self.chunks)) - 1]


class Solver:
    """Solves the fake open_drawer_place, one waypoint a decision."""

    embodiment = "google_robot"

    def __init__(self, simulator: PointSimulator) -> None:
        self.simulator = simulator

    def reset(self, seed: int | None = None) -> None:
        self.step = 0

    def act(self, observation) -> ActionChunk:
        apple = self.simulator.privileged()["apple"][:3].astype(float)
        pulled, inside = HANDLE + np.array([0.25, 0, 0]), HANDLE + np.array([0.1, 0, 0.1])
        plan = [(HANDLE, 1), (HANDLE, 0), (pulled, 0), (pulled, 1), None, (apple, 1), (apple, 0)]
        plan += [(inside, 0), (inside, 1), None]
        waypoint, self.step = plan[self.step], self.step + 1
        if waypoint is None:
            return chunk(1, ends=0)
        move = self.simulator.to_base(waypoint[0]) - observation["proprio"][:3]
        return ActionChunk(np.array([[*move, 0, 0, 0, waypoint[1]]]))


def chunk(count: int, ends: int | None = None, dx: float = 0.0) -> ActionChunk:
    actions = np.zeros((count, 7))
    actions[:, 0] = dx
    return ActionChunk(actions, None if ends is None else np.arange(count) == ends)


class Looks(Script):
    """Keeps what it is shown."""

    def reset(self, seed: int | None = None) -> None:
        super().reset(seed)
        self.shown = []

    def act(self, observation) -> ActionChunk:
        self.shown.append(observation["images"])
        return super().act(observation)


def test_without_a_record_only_what_the_policy_sees_is_drawn(monkeypatch):
    env, drawn = make_fake(PLACE), []
    draw = env.simulator.render
    monkeypatch.setattr(env.simulator, "render", lambda: drawn.append(1) or draw())
    policy = Looks(chunk(4, dx=0.01), chunk(5, ends=3), chunk(7, dx=-0.01))
    unseen = run_episode(env, policy, 1)
    blind, decisions = policy.shown, len(unseen.latencies)
    assert len(drawn) == decisions
    assert env.pictures
    seen = run_episode(env, policy, 1, record=lambda *_: None)
    assert len(drawn) > 200 > decisions > 25
    for one, other in zip(blind, policy.shown, strict=True):
        assert one.keys() == other.keys() == env.simulator.image_shapes.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert replace(unseen, latencies=()) == replace(seen, latencies=())


def test_pictures_are_on_again_however_an_episode_ends(monkeypatch):
    env = make_fake(CLOSE)
    with pytest.raises(ValueError, match="empty chunk"):
        run_episode(env, Script(chunk(0)), 1)
    assert env.pictures
    env.pictures = False
    policy = Looks(chunk(8))
    run_episode(env, policy, 1)
    assert policy.shown
    assert not any(policy.shown)
    assert not env.pictures


def test_solver_succeeds_and_terminates():
    env = make_fake(PLACE)
    for seed in (200_000, 200_001):
        episode = run_episode(env, Solver(env.simulator), seed)
        assert (episode.success, episode.early_stop, episode.ever) == (True, True, True)
        assert episode.reason == TERMINATED
        assert (episode.steps, episode.first_success, episode.subtask_steps) == (8, 8, (4,))
        assert len(episode.latencies) == 10  # two of the ten decisions only said terminate
        assert episode.progress["touched"] == 1
        assert (episode.clipped, episode.ik_failed) == (0, 0)


def test_without_terminate_the_environment_advances_at_100_and_the_chunk_is_dropped():
    policy = Script(chunk(8))
    episode = run_episode(make_fake(PLACE), policy, 1)
    assert (episode.steps, episode.reason, episode.subtask_steps) == (200, STEP_LIMIT, (100,))
    # 12 chunks of 8 and one of which only 4 were executed; then 12 whole and one of 4 up to 200
    assert policy.asked == ["open top drawer"] * 13 + ["place apple into top drawer"] * 13
    assert policy.seed == 1


def test_terminate_comes_before_its_step_and_drops_the_rest():
    policy = Script(chunk(5, ends=3), chunk(5, ends=2))
    episode = run_episode(make_fake(PLACE), policy, 1)
    assert (episode.steps, episode.reason, episode.subtask_steps) == (5, TERMINATED, (3,))
    assert policy.asked == ["open top drawer", "place apple into top drawer"]


@pytest.mark.parametrize("looks_while_shut", [False, True])
def test_success_is_read_three_ways(looks_while_shut):
    env = make_fake(CLOSE)

    class ShutsAndOpens(Script):
        """Shuts the drawer and pulls it open again, in one chunk or in two."""

        def act(self, observation) -> ActionChunk:
            if not self.asked:
                handle = env.simulator.to_base(HANDLE + np.array([0.2, 0, 0]))
                forth = env.simulator.to_base(HANDLE) - handle
                moves = (handle - observation["proprio"][:3], np.zeros(3), forth, -forth)
                actions = np.array([[*m, 0, 0, 0, i == 0] for i, m in enumerate(moves)], float)
                cut = 3 if looks_while_shut else 4
                self.chunks = [ActionChunk(c) for c in (actions[:cut], actions[cut:]) if len(c)]
                self.chunks.append(chunk(1, ends=0))
            return super().act(observation)

    episode = run_episode(env, ShutsAndOpens(), 5)
    assert (episode.success, episode.early_stop, episode.ever) == (False, looks_while_shut, True)
    assert (episode.first_success, episode.steps) == (3, 4)


def test_counts_and_bad_actions():
    episode = run_episode(make_fake(CLOSE), Script(chunk(1, dx=3.0)), 1)
    assert episode.clipped == episode.steps == 113
    assert episode.ik_failed > 100  # it left the reach at once
    episode = run_episode(make_fake(CLOSE), Script(chunk(2), chunk(2, dx=np.nan)), 1)
    assert (episode.reason, episode.steps) == (BAD_ACTION, 2)
    with pytest.raises(ValueError, match="empty chunk"):
        run_episode(make_fake(CLOSE), Script(chunk(0)), 1)


def test_record_sees_every_observation_once():
    seen = []
    episode = run_episode(
        make_fake(CLOSE),
        Script(chunk(7)),
        1,
        lambda observation, info, step: seen.append(
            (step, observation["images"]["wrist_camera"].shape)
        ),
    )
    assert seen == [(step, (16, 16, 3)) for step in range(episode.steps + 1)]
