"""The closed loop without physics: its folder, resuming, workers, what is refused."""

import json
import queue
import signal
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from selfflow.datasets.spec import UserError, task_named
from selfflow.envs.fake import make_fake
from selfflow.envs.twin_look import USUAL
from selfflow.eval import parts, results, simpler_rollout, workers
from selfflow.eval.parts import RolloutConfig
from selfflow.eval.report import shading


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
    env = make_fake(task_named("open_drawer_place"), pictures=False)
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
