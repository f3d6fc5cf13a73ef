"""How the twin looks and acts, as keys of rollout, record, play and teleop."""

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError, task_named
from selfflow.datasets.store import EpisodeRecord, EpisodeStore, StoreWriter
from selfflow.envs import simpler_assets, twin_render, twin_scene
from selfflow.envs.fake import make_fake
from selfflow.envs.twin import make_mujoco
from selfflow.envs.twin_look import USUAL, Look
from selfflow.eval import parts, play, record_demos, teleop
from selfflow.eval.parts import TWIN_ONLY, RolloutConfig, from_noted, noted, twin_options
from selfflow.eval.play import PlayConfig
from selfflow.eval.record_config import RecordConfig
from selfflow.eval.record_demos import tell_mixture
from selfflow.eval.teleop import TeleopConfig
from selfflow.eval.viewers import Camera

ASSETS = Path(__file__).parents[2] / "shared" / "simpler_assets"
OTHER = ["randomise=mild", "handles=collide", "look.room=plain", "look.shadows=0"]
COMMANDS = {
    "rollout": (RolloutConfig, parts.check, ["policy=hold", "backend=mujoco"]),
    "record": (RecordConfig, record_demos.check, []),
    "play": (PlayConfig, play.check, []),
    "teleop": (TeleopConfig, teleop.check, ["device=script", "keys=w", "view=none"]),
}


def composed(command: str, *given: str) -> Any:
    kind, _, needed = COMMANDS[command]
    return compose(kind, command, [*needed, *given])


MISTAKES = [
    (["look.room=hall"], "room=hall: choose one of plain, office"),
    (["robot=tin"], "robot=tin: choose one of primitives, google_mesh"),
    (["look=plain"], "look=plain: give its own keys, look.room, look.shadows, look.samples"),
    (["look.shadows=-1"], r"look\.shadows=-1: must be between 0 and 8192"),
    (["look.sun=1"], r"look\.sun: no such key; choose one of room, samples, shadows"),
    (["look.samples=4", "backend=fake"], r"look\.samples=4: only with backend=mujoco"),
    (["photo=true", "backend=fake"], "photo=true: only with backend=mujoco"),
    (["handles=glued"], "handles=glued"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_in_one_line(command: str):
    for given, says in MISTAKES if command == "record" else MISTAKES[:1]:
        with pytest.raises(UserError, match=says):
            COMMANDS[command][1](composed(command, *given))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_hands_the_keys_on(command: str):
    config = composed(command, *OTHER)
    COMMANDS[command][1](config)
    same = {"play": "rollout", "teleop": "recorder"}
    used = getattr(config, same[command])() if command in same else config
    wanted = {"randomise": "mild", "handles": "collide", "look": Look("plain", 0)}
    assert twin_options(used) == TWIN_ONLY | wanted


def test_they_are_noted_as_single_values_and_read_back():
    options = twin_options(composed("record", *OTHER))
    assert from_noted(noted(options) | {"device": "keyboard"}) == options
    assert from_noted({}) == TWIN_ONLY  # as recorded before there were such keys
    assert all(isinstance(value, str | int) for value in noted(options).values())


def test_a_rollout_begun_before_there_was_a_look_goes_on():
    assert "look" not in composed("rollout").identity()
    told = composed("rollout", "look.room=plain").identity()
    assert told["look"] == {"room": "plain", "shadows": 512, "samples": 0}


def test_the_recorded_twin_is_made_with_them(monkeypatch):
    asked = []
    maker = lambda task, placement, **keys: asked.append(keys) or make_fake(task, placement)  # noqa: E731
    monkeypatch.setitem(record_demos.BACKENDS, "mujoco", maker)
    config = composed("record", *OTHER)
    record_demos.make_recorded(config)
    assert asked == [twin_options(config)]


def test_the_look_is_seen():
    task, pictures = task_named("close_top_drawer"), []
    for look in (USUAL, replace(USUAL, shadows=0), replace(USUAL, room="plain")):
        env = make_mujoco(task, image_size=(32, 40), look=look)
        pictures.append(env.reset(seed=0)[0]["images"]["overhead_camera"].astype(int))
        env.close()
    differ = [np.abs(a - b).mean() for a, b in pairwise(pictures)]
    assert min(differ) > 1


def test_the_larger_live_picture_has_the_photograph_too(monkeypatch):
    if not (ASSETS / simpler_assets.ROBOT_FOLDER).is_dir():
        pytest.skip(f"no SIMPLER data files in {ASSETS}")
    monkeypatch.setenv("SIMPLER_ASSETS", str(ASSETS))
    env = make_mujoco(task_named("close_top_drawer"), "grid", (32, 40), photo=True)
    observation, _ = env.reset(seed=0)
    same, larger = Camera(env, (32, 40)), Camera(env, (64, 80))
    try:
        own = observation["images"][same.name]
        np.testing.assert_array_equal(same.picture(observation), own)
        halved = larger.picture(observation).reshape(32, 2, 40, 2, 3).mean((1, 3))
        assert np.abs(halved - own).mean() < 4
    finally:
        same.close()
        larger.close()
        env.close()


@pytest.mark.parametrize(("own", "used"), [(None, "0"), ("3", "3")])
def test_a_worker_process_draws_on_one_thread(monkeypatch, own: str | None, used: str):
    monkeypatch.setenv("LP_NUM_THREADS", own or "")
    if own is None:
        monkeypatch.delenv("LP_NUM_THREADS")
    monkeypatch.setenv("SELFFLOW_RENDERER", "egl")
    monkeypatch.setattr(twin_render.multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr(
        twin_render, "GLRenderer", lambda *given: twin_render.RayRenderer(*given[:3])
    )
    monkeypatch.setattr(twin_render.ctypes.util, "find_library", lambda name: name)
    monkeypatch.setattr(twin_render, "OPENED_BY", set())
    twin_render.make_renderer(twin_scene.build(2, 2), 2, 2)
    assert os.environ["LP_NUM_THREADS"] == used


# --- recordings of several kinds ------------------------------------------------------------------


def recorded(out: Path, *given: str) -> RecordConfig:
    """A store with one more episode, of a step, by a recording with these keys."""
    config = composed("record", "task=close_top_drawer", f"out={out}", *given)
    one = np.zeros((1, 7), np.float32)
    episode = EpisodeRecord(
        images={"overhead_camera": [np.zeros((8, 8, 3), np.uint8)]},
        proprio=np.zeros((1, 8), np.float32),
        actions=one,
        executed=one,
        terminate=np.zeros(1, bool),
        instruction=["close top drawer"],
        seed=0,
        success=True,
        meta=record_demos.options_meta(config),
    )
    with StoreWriter(out, "000", record_demos.header_of(config)) as writer:
        writer.append(episode)
    return config


def test_a_store_that_is_continued_otherwise_says_so(tmp_path, capsys):
    out = tmp_path / "store"
    tell_mixture(composed("record", f"out={out}"))  # there is none yet
    tell_mixture(recorded(out))
    assert capsys.readouterr().out == ""
    other = recorded(out, "look.room=plain", "randomise=mild")
    record_demos.check(other)
    tell_mixture(other)
    assert "holds episodes with randomise=none, room=office; it is" in capsys.readouterr().out
    rooms = [EpisodeStore(out).metadata(i)["room"] for i in range(2)]
    assert rooms == ["office", "plain"]


def test_a_recording_is_played_as_it_was_recorded(tmp_path, monkeypatch):
    recorded(tmp_path / "store", *OTHER)
    played = []
    monkeypatch.setattr(
        play, "play_simulated", lambda config, rollout, *rest: played.append(rollout)
    )
    play.main(composed("play", f"source={tmp_path}/store"))
    assert twin_options(played[0]) == twin_options(composed("record", *OTHER))


def test_another_simulator_s_episodes_note_nothing_of_the_twin():
    assert record_demos.options_meta(composed("record", "backend=fake")) == {"task_config": "{}"}
