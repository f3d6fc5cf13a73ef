"""Watching an episode: films of policies and recordings, replays, and the page in a browser."""

import base64
import io
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import av
import mujoco
import numpy as np
import pytest
from PIL import Image

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError, task_named
from selfflow.datasets.store import EpisodeStore
from selfflow.envs.twin import make_mujoco
from selfflow.eval import play, teleop, viewers
from selfflow.eval.geom_meshes import poses, shapes
from selfflow.eval.play import PlayConfig, check, main, replay

SCRIPT = Path(__file__).parents[1] / "eval" / "play.py"


def config(**keys) -> PlayConfig:
    said = [f"{k}={'null' if v is None else v}" for k, v in keys.items()]
    return compose(PlayConfig, "play", said)


def film(folder: Path) -> list[np.ndarray]:
    with av.open(str(folder / "episode.mp4")) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def driven(tmp_path_factory) -> Path:
    """One episode of six steps, driven in the twin."""
    out = tmp_path_factory.mktemp("play") / "driven"
    said = ["task=open_top_drawer", "device=script", "view=none", "speed=0", f"out={out}",
            "keep_failures=true", "keys='w*2 a space+w r*2 enter q'"]  # fmt: skip
    teleop.main(compose(teleop.TeleopConfig, "teleop", said))
    return out


# --- films ----------------------------------------------------------------------------------------


def test_without_a_display_a_policys_episode_becomes_a_film(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(play, "has_display", lambda: False)
    monkeypatch.setattr(play, "run_episode", short_episode)
    chosen = config(source="hold", backend="fake", out=tmp_path)
    check(chosen)
    main(chosen)
    assert len(film(tmp_path)) == 4
    assert f"film: {tmp_path}/episode.mp4" in capsys.readouterr().out


def short_episode(env, policy, seed, record):
    from selfflow.eval.rollout import run_episode

    env.task = replace(env.task, max_steps=3)
    return run_episode(env, policy, seed, record)


def test_a_recording_is_acted_again_exactly(driven, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(play, "has_display", lambda: False)
    main(config(source=driven, out=tmp_path, size="[96,128]"))
    frames = film(tmp_path)
    assert len(frames) == 7
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 0.5  # the arm has moved
    assert capsys.readouterr().out.startswith(
        "open_top_drawer, seed 0: replayed 6 steps, failure\n"
    )


def test_what_was_randomised_is_so_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(play, "has_display", lambda: False)
    said = ["task=open_top_drawer", "device=script", "view=none", "speed=0", f"out={tmp_path}/s",
            "keep_failures=true", "randomise=wide", "keys='w*3 a enter q'"]  # fmt: skip
    teleop.main(compose(teleop.TeleopConfig, "teleop", said))
    capsys.readouterr()
    main(config(source=tmp_path / "s", out=tmp_path / "film", size="[32,40]"))
    assert capsys.readouterr().out.startswith(
        "open_top_drawer, seed 0: replayed 4 steps, failure\n"
    )


def test_a_replay_that_differs_says_so(driven):
    episode = EpisodeStore(driven).record(0)
    moved = episode.proprio.copy()
    moved[3, 0] += 0.05
    env = make_mujoco(task_named("open_top_drawer"), image_size=(16, 16))
    seen: list[int] = []
    try:
        said = replay(env, replace(episode, proprio=moved, success=True),
                      lambda observation, info, step: seen.append(step))  # fmt: skip
    finally:
        env.close()
    assert seen == list(range(7))
    assert "up to 50 mm from the recording, which ended otherwise" in said


def test_a_recording_without_simulator_is_shown_by_its_pictures(store, tmp_path, monkeypatch):
    monkeypatch.setattr(play, "has_display", lambda: True)  # a window cannot show pictures
    main(config(source=store, episode=1, out=tmp_path))
    frames, told = film(tmp_path), EpisodeStore(store)
    assert len(frames) == 12
    shown = np.asarray(Image.fromarray(frames[5][:320, :320]).resize((32, 32)))
    (recorded,) = told.frames(1, [5])
    assert np.corrcoef(shown.ravel(), recorded.ravel())[0, 1] > 0.8


def test_subtasks_are_replayed_too(driven, tmp_path):
    said = ["task=open_drawer_place", "device=script", "view=none", "speed=0", "backend=fake",
            f"out={tmp_path / 's'}", "keep_failures=true", "keys='w t w enter q'"]  # fmt: skip
    teleop.main(compose(teleop.TeleopConfig, "teleop", said))
    from selfflow.envs.fake import make_fake

    told = []
    store = EpisodeStore(tmp_path / "s")

    def record(observation, info, step) -> None:
        told.append(observation["instruction"])

    again = replay(make_fake(task_named("open_drawer_place")), store.record(0), record)
    assert told == store.signals(0).instruction
    assert again == "replayed 2 steps, failure"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"source": "expret"}, "source=expret: choose checkpoint, expert, .* or a path"),
        ({"source": "no/where"}, "no/where: no such path"),
        ({"speed": 0}, "speed=0.0: must be"),
        ({"size": "[480]"}, "size=.*height, width"),
        ({"size": "[48,99999]"}, "each 16 to 4096, or null"),
        ({"port": 65536}, "port=65536: must be between 0 and 65535"),
        ({"out": f"{SCRIPT}/below"}, f"{SCRIPT} is a file; choose another folder"),
        ({"task": "open_door"}, "task=open_door: no such task"),
        ({"source": "checkpoint", "checkpoint": "no/where"}, "checkpoint=no/where"),
    ],
)
def test_check_names_the_cure(wrong, says):
    with pytest.raises(UserError, match=says):
        check(config(**wrong))


def test_an_episode_that_is_not_there_names_those_that_are(store):
    with pytest.raises(UserError, match=r"episode=2: .* has 2; choose 0\.\.1"):
        check(config(source=store, episode=2))


def test_viser_and_windows_that_are_not_there_name_the_cure(monkeypatch, driven):
    monkeypatch.setattr("selfflow.eval.web_scene.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'selfflow\[web\]'"):
        check(config(web="true", task="open_top_drawer"))
    monkeypatch.setattr(viewers, "has_display", lambda: False)
    env = make_mujoco(task_named("open_top_drawer"), image_size=(16, 16))
    with pytest.raises(UserError, match="needs a display"):
        viewers.Window(env)
    env.close()


# --- geoms as triangles ---------------------------------------------------------------------------

GEOMS = """<mujoco><asset>
<texture name="t" type="2d" builtin="flat" width="8" height="8" rgb1="1 .5 0"/>
<material name="m" texture="t" rgba="1 1 .5 1"/>
<mesh name="tetra" vertex="0 0 0 1 0 0 0 1 0 0 0 1"/></asset><worldbody>
<geom type="plane" size="0 2 1"/>
<geom name="box" type="box" size=".1 .2 .3" material="m" pos="1 2 3" euler="0 0 90"/>
<geom type="sphere" size=".5" rgba="0 1 0 .5"/>
<geom type="ellipsoid" size=".5 .3 .2"/>
<geom type="capsule" size=".2 .6"/>
<geom type="cylinder" size=".2 .6"/>
<geom type="mesh" mesh="tetra"/>
<geom type="sphere" size="1" group="3"/>
<geom type="sphere" size="1" rgba="1 1 1 0"/>
</worldbody></mujoco>"""


def test_geoms_become_closed_surfaces_of_the_right_volume():
    model = mujoco.MjModel.from_xml_string(GEOMS)  # pyright: ignore[reportAttributeAccessIssue]
    found, unknown = shapes(model)
    assert unknown == 0
    assert [s.geom for s in found] == list(range(7))  # the hidden ones are left out
    exact = [0.048, np.pi / 6, 0.04 * np.pi, (0.048 + 0.032 / 3) * np.pi, 0.048 * np.pi, 1 / 6]
    for shape, volume in zip(found[1:], exact, strict=True):
        a, b, c = shape.vertices[shape.faces].transpose(1, 0, 2)
        measured = np.sum(np.cross(a, b) * c) / 6  # positive where faces look outward
        np.testing.assert_allclose(measured, volume, rtol=0.04)
    np.testing.assert_allclose(found[1].rgba, (1, 0.5, 0, 1), atol=0.01)
    assert found[2].rgba == (0, 1, 0, 0.5)
    np.testing.assert_allclose(np.ptp(found[0].vertices, axis=0), (16, 4, 0))


def test_poses_are_those_of_the_geoms():
    model = mujoco.MjModel.from_xml_string(GEOMS)  # pyright: ignore[reportAttributeAccessIssue]
    data = mujoco.MjData(model)  # pyright: ignore[reportAttributeAccessIssue]
    mujoco.mj_forward(model, data)  # pyright: ignore[reportAttributeAccessIssue]
    half = np.sqrt(0.5)
    np.testing.assert_allclose(poses(data)[1], [1, 2, 3, half, 0, 0, half], atol=1e-9)


# --- the browser ----------------------------------------------------------------------------------

needs_viser = pytest.mark.skipif(find_spec("viser") is None, reason="viser is not installed")
needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
CHROMIUM = ["chromium", "--headless=new", "--no-sandbox", "--use-angle=swiftshader",
            "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist", "--window-size=1200,700",
            "--remote-debugging-port=0"]  # fmt: skip


@contextmanager
def browser(url: str, profile: Path):
    """A function that makes a screenshot of the page."""
    from websockets.sync.client import connect

    process = subprocess.Popen(
        [*CHROMIUM, f"--user-data-dir={profile}", url], stderr=subprocess.DEVNULL
    )
    try:
        told = wait_for(
            lambda: (profile / "DevToolsActivePort").read_text().split(), FileNotFoundError
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{told[0]}/json", timeout=10) as reply:
            pages = [page for page in json.load(reply) if page["type"] == "page"]
        with connect(pages[0]["webSocketDebuggerUrl"], max_size=None) as socket:

            def screenshot() -> np.ndarray:
                socket.send(json.dumps({"id": 1, "method": "Page.captureScreenshot"}))
                data = json.loads(socket.recv())["result"]["data"]
                return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

            yield screenshot
    finally:
        process.terminate()
        process.wait()


def wait_for(get, *errors):
    end = time.monotonic() + 120
    while True:
        try:
            if found := get():
                return found
        except errors:
            pass
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
@needs_viser
@needs_chromium
def test_the_page_shows_the_robot_where_it_went(driven, tmp_path):
    command = [sys.executable, str(SCRIPT), f"source={driven}", "web=true", "port=8765"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        line = wait_for(lambda: [t for t in log.read_text().splitlines() if "in the browser" in t])
        wait_for(lambda: "the episode is over" in log.read_text())
        with browser(line[0].split()[3], tmp_path / "profile") as screenshot:
            page = wait_for(lambda: with_scene(screenshot()))[0]
            first, last = fingertips(driven, page)
            page = wait_for(lambda: with_dark(screenshot(), last))[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
    Image.fromarray(page).save(tmp_path / "page.png")
    assert np.abs(last - first).max() > 15  # where they were at the start


def with_scene(page: np.ndarray) -> list[np.ndarray]:
    """The page, once its canvas shows the wooden cabinet."""
    r, g, b = page.reshape(-1, 3).astype(int).T
    return [page] if np.mean((r - b > 40) & (r > g) & (g > b)) > 0.1 else []


def with_dark(page: np.ndarray, places: np.ndarray) -> list[np.ndarray]:
    """The page, once it is dark at these rows and columns, before a light wall and floor."""
    spots = [page[row - 2 : row + 3, column - 2 : column + 3].mean() for row, column in places]
    return [page] if max(spots) < 60 else []


def fingertips(driven: Path, page: np.ndarray) -> np.ndarray:
    """(first and last moment, two tips, row and column) in a page seen by the head camera."""
    env = make_mujoco(task_named("open_top_drawer"), pictures=False)
    model, data = env.simulator.model, env.simulator.data
    camera = model.camera("overhead_camera").id
    tips = [model.geom(f"finger_{side}_tip").id for side in ("left", "right")]
    middle = np.array(page.shape[:2]) / 2
    focal = middle[0] / np.tan(np.radians(model.cam_fovy[camera]) / 2)
    places = []

    def note(observation, info, step) -> None:
        away = data.geom_xpos[tips] - data.cam_xpos[camera]
        x, y, z = (away @ data.cam_xmat[camera].reshape(3, 3)).T
        places.append(middle + focal * np.stack([y / z, x / -z], 1))

    replay(env, EpisodeStore(driven).record(0), note)
    env.close()
    return np.round([places[0], places[-1]]).astype(int)


@needs_viser
def test_the_page_can_be_paused_stepped_and_taken_back():
    from selfflow.eval.web_scene import Moment, WebScene

    page = WebScene(None, "camera", 8790, hz=50.0)
    try:
        image = np.zeros((8, 8, 3), np.uint8)
        page.add(Moment(image, "go", 0, False))
        page._play.value = False
        page._step.value = True
        page.add(Moment(image, "go", 1, False))  # the step is spent on this return
        assert page._at == 1
        page._slider.value = 0
        assert not page._past_end()
        assert page._at == 0
        page._step.value = True
        assert not page._past_end()
        assert page._at == 1
        assert not page._past_end()
        page._play.value = True
        time.sleep(0.03)
        assert page._past_end()
    finally:
        page.close()
