"""The closed loop without physics: rules of an episode, folder, resuming, workers."""

import json
import queue
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from selfflow.datasets.spec import ActionChunk, UserError, task_named
from selfflow.envs.fake import HANDLE, PointSimulator, make_fake
from selfflow.envs.twin_look import USUAL
from selfflow.eval import parts, results, simpler_rollout, workers
from selfflow.eval.parts import RolloutConfig
from selfflow.eval.report import shading
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


# --- the command ----------------------------------------------------------------------------------


def config(out: Path, **other) -> RolloutConfig:
    known = {
        "task": "close_top_drawer",
        "backend": "fake",
        "placement": "mild",
        "gripper": "opening",
        "policy": "random",
        "checkpoint": None,
        "execute": None,
        "steps": None,
        "episodes": 4,
        "seed": 200_000,
        "split": "test",
        "workers": 1,
        "videos": 1,
        "out": str(out),
    }
    return RolloutConfig(**(known | other))


def lines(out: Path) -> list[dict]:
    found = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    for line in found:
        line["latencies"] = len(line["latencies"])
    return found


def test_main_writes_what_it_says(tmp_path, capsys):
    out = tmp_path / "run"
    summary = simpler_rollout.main(config(out))
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "episode_200000.mp4",
        "episode_200000.png",
        "episodes.jsonl",
        "summary.json",
    ]
    assert [line["seed"] for line in lines(out)] == [200_000, 200_001, 200_002, 200_003]
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["episodes"] == 4
    assert summary["task"] == "close_top_drawer"
    printed = capsys.readouterr().out
    assert printed.count("success so far") == 4
    assert "4/4" in printed
    assert str(out) in printed
    assert "Wilson" in printed


def test_resuming_gives_the_run_that_was_not_stopped(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    simpler_rollout.main(config(whole, videos=0))
    simpler_rollout.main(config(stopped, videos=0, episodes=2))
    with open(stopped / "episodes.jsonl", "a") as f:
        f.write('{"seed": 200002, "succ')  # a kill in the middle of a line
    ran = []
    original = workers.run_episode
    monkeypatch.setattr(
        workers, "run_episode", lambda *a, **k: ran.append(a[2]) or original(*a, **k)
    )
    simpler_rollout.main(config(stopped, videos=0))
    assert ran == [200_002, 200_003]
    assert lines(stopped) == lines(whole)
    simpler_rollout.main(config(stopped, videos=0))  # nothing left to do
    assert ran == [200_002, 200_003]
    assert lines(stopped) == lines(whole)


def test_a_run_of_another_config_or_anything_else_is_not_continued(tmp_path):
    out = tmp_path / "run"
    simpler_rollout.main(config(out, episodes=1, videos=0))
    with pytest.raises(UserError, match="holds a run with policy=random"):
        simpler_rollout.check(config(out, policy="hold"))
    simpler_rollout.check(config(out, episodes=9, workers=2))
    smooth = config(out, low_pass=0.5).identity()
    (out / "config.json").write_text(json.dumps(smooth))
    with pytest.raises(UserError, match=r"holds a run with low_pass=0\.5"):
        simpler_rollout.check(config(out))  # which has the key at its usual value
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="something else"):
        simpler_rollout.check(config(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        simpler_rollout.check(config(tmp_path / "mine.txt"))


def test_a_run_killed_before_its_first_episode_is_continued(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.json.part").write_text("{")  # killed while config.json was written
    simpler_rollout.check(config(out))
    results.write_json(out / results.CONFIG, config(out).identity())  # or just after it
    simpler_rollout.check(config(out))
    simpler_rollout.main(config(out, episodes=1, videos=0))
    assert len(lines(out)) == 1


@pytest.mark.parametrize("damaged", ["", "{", "[]", "\0\0"])
def test_a_damaged_folder_is_one_line(tmp_path, damaged):
    out = tmp_path / "run"
    simpler_rollout.main(config(out, episodes=1, videos=0))
    whole = (out / "config.json").read_text()
    (out / "config.json").write_text(damaged)
    with pytest.raises(UserError, match=r"config\.json is damaged; choose another folder"):
        simpler_rollout.check(config(out))
    (out / "config.json").write_text(whole)
    simpler_rollout.check(config(out))
    with open(out / "episodes.jsonl", "a") as f:
        f.write(f"{damaged}\n")
    with pytest.raises(UserError, match=r"episodes\.jsonl: line 2 is damaged"):
        simpler_rollout.check(config(out))


def test_options_reach_simpler_and_no_other_backend(tmp_path, monkeypatch):
    asked = []
    for backend in parts.BACKENDS:
        maker = lambda *a, backend=backend, **k: asked.append((backend, k)) or make_fake(*a)  # noqa: E731
        monkeypatch.setitem(parts.BACKENDS, backend, maker)
        parts.make_env(config(tmp_path, backend=backend))
    parts.make_env(config(tmp_path, backend="simpler", gripper="sticky", urdf_version="none"))
    parts.make_env(config(tmp_path, pictures=False))
    own = {
        "gripper": "opening",
        "urdf_version": "recolor_cabinet_visual_matching_1",
        "shader": "ibl",
        "samples": None,
        "variant": "visual_matching",
    }
    twin = {"randomise": "none", "handles": "visual", "robot": "primitives", "photo": False}
    twin["look"] = USUAL
    for backend, options in asked[: len(parts.BACKENDS)]:
        wanted = {"simpler": own, "mujoco": twin}.get(backend, {})
        assert options == {"pictures": True} | wanted, backend
    sticky = own | {"pictures": True, "gripper": "sticky", "urdf_version": "none"}
    assert asked[-2:] == [("simpler", sticky), ("fake", {"pictures": False})]


def test_without_pictures_an_episode_is_the_same_and_none_is_filmed(tmp_path):
    seen, blind = tmp_path / "seen", tmp_path / "blind"
    simpler_rollout.main(config(seen, episodes=2, videos=1))
    simpler_rollout.main(config(blind, episodes=2, videos=1, pictures=False))
    assert lines(blind) == lines(seen)
    assert not list(blind.glob("*.mp4"))
    assert list(seen.glob("*.mp4"))
    simpler_rollout.check(config(seen, episodes=3, pictures=False))  # it may be continued so
    with pytest.raises(UserError, match="pictures=false: a checkpoint needs them"):
        simpler_rollout.check(config(tmp_path / "new", policy="checkpoint", pictures=False))
    env = make_fake(PLACE, pictures=False)
    observation, info = env.reset(seed=1)
    assert observation["images"] == {}
    assert env.observation_space.contains(observation)
    assert set(info["cameras"]) == {"overhead_camera", "wrist_camera"}
    assert env.render().shape == (24, 32, 3)


def test_samples_belong_to_ray_tracing(tmp_path):
    simpler = {"backend": "simpler", "policy": "hold"}
    with pytest.raises(UserError, match="samples=8: rays a pixel, only with shader=rt"):
        parts.check(config(tmp_path, **simpler, samples=8))
    with pytest.raises(UserError, match="samples=0: must be 1 or more"):
        parts.check(config(tmp_path, **simpler, shader="rt", samples=0))
    assert config(tmp_path, **simpler).identity()["samples"] is None
    assert config(tmp_path, **simpler, shader="rt").identity()["samples"] == 4
    assert "samples" not in config(tmp_path).identity()
    assert shading(config(tmp_path, **simpler, shader="rt").identity()) == "rt, 4 rays a pixel"
    assert shading(config(tmp_path, **simpler).identity()) == "ibl"
    assert shading(config(tmp_path).identity()) == "-"


def test_workers_give_the_same_episodes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    simpler_rollout.main(config(one, episodes=3))
    simpler_rollout.main(config(two, episodes=3, workers=2))
    assert lines(two) == lines(one)
    assert (two / "episode_200000.mp4").is_file()


def test_a_worker_that_died_is_told_while_others_still_report():
    dead = SimpleNamespace(is_alive=lambda: False, exitcode=-9)
    alive = SimpleNamespace(is_alive=lambda: True, exitcode=None)

    class Busy:  # a message every 0.1 s, and one that the dead worker left
        left = True

        def get(self, timeout: float) -> str:
            if timeout < 0.1 and not self.left:
                raise queue.Empty
            self.left = False
            return "step"

    messages = workers._until_all_ended([alive, dead], Busy())
    assert next(messages) == "step"
    with pytest.raises(RuntimeError, match="exit code -9"):
        next(messages)


def test_workers_are_started_deaf_to_ctrl_c_and_the_parent_hears_it_after():
    heard = pytest.raises(KeyboardInterrupt)
    with heard, workers._for_workers():
        # to this thread: torch and mujoco may have others, which block nothing
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        child = subprocess.run(["grep", "SigBlk", "/proc/self/status"], stdout=subprocess.PIPE)
    assert int(child.stdout.split()[1], 16) & 1 << signal.SIGINT - 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_worker_s_user_error_arrives(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such task"):
        workers.run_seeds(
            config(tmp_path / "x", task="nope", workers=2),
            [200_000, 200_001],
            tmp_path / "x",
            lambda message: None,
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"task": "nope"}, "choose one of open_top_drawer"),
        ({"task": "pick_coke_can"}, "not built yet"),
        ({"backend": "mujco"}, "did you mean mujoco"),
        ({"placement": "wild"}, "choose one of grid, mild"),
        ({"gripper": "sticky"}, "gripper=sticky: only with backend=simpler"),
        ({"gripper": "stiky", "backend": "simpler"}, "did you mean sticky"),
        ({"urdf_version": "red", "backend": "simpler"}, "urdf_version=red: no such"),
        ({"shader": "rtt", "backend": "simpler"}, "shader=rtt: no such"),
        ({"randomise": "mild"}, "randomise=mild: only with backend=mujoco"),
        ({"randomise": "wild", "backend": "mujoco"}, "choose one of none, mild, wide"),
        ({"handles": "solid", "backend": "mujoco"}, "choose one of visual, collide"),
        ({"policy": "best"}, "choose one of checkpoint, expert, hold, random"),
        ({"split": "tst"}, "did you mean test"),
        ({"episodes": 0}, "episodes=0: must be 1 or more"),
        ({"seed": 7}, "or give split=train"),
        ({"seed": 199_999, "split": "select"}, "select seeds are 100000..199999"),
        ({"policy": "checkpoint", "checkpoint": "/nowhere"}, "/nowhere"),
    ],
)
def test_check_names_the_cure(tmp_path, wrong, says):
    with pytest.raises(UserError, match=says) as caught:
        simpler_rollout.check(config(tmp_path / "x", **wrong))
    assert "\n" not in str(caught.value)


def test_aliases_are_the_same_run(tmp_path):
    alias = config(tmp_path, task="google_robot_close_top_drawer")
    simpler_rollout.check(alias)
    assert alias.identity() == config(tmp_path).identity()


def test_every_yaml_key_is_a_field():
    from selfflow.configs.entry import compose

    composed = compose(RolloutConfig, "rollout", [])
    parts.one_of("backend", composed.backend, parts.BACKENDS)
