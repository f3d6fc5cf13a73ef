"""Teleoperation: what keys and other devices mean, and that what was driven is a demonstration."""

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfflow.configs.entry import compose
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import EMBODIMENTS, GRIPPER, UserError, task_named
from selfflow.datasets.store import EpisodeStore, StoreWriter
from selfflow.envs.fake import HANDLE, make_fake
from selfflow.eval import devices, record_demos
from selfflow.eval.devices import Gamepad, Input, SpaceMouse, from_keys, script_steps, typed_keys
from selfflow.eval.teleop import GRIPPER_STEPS, Pilot, TeleopConfig, check, main
from selfflow.eval.web_view import WebView

SCRIPT = Path(__file__).parents[1] / "eval" / "teleop.py"
BY_SCRIPT = {"backend": "fake", "device": "script", "view": "none", "speed": 0}


def config(**keys) -> TeleopConfig:
    given = {"task": "open_top_drawer", **BY_SCRIPT, **keys}
    said = [f"{k}={'null' if v is None else v}" for k, v in given.items()]
    return compose(TeleopConfig, "teleop", said)


def run(out, keys: str, **more) -> EpisodeStore:
    chosen = config(out=out, keys=f"'{keys}'", **more)
    check(chosen)
    main(chosen)
    return EpisodeStore(out)


# --- keys -----------------------------------------------------------------------------------------


def test_what_a_terminal_sends_becomes_keys():
    sent = "w\x1b[A\x1bOD \r\x7f\x1b[1;5CW"
    assert typed_keys(sent) == ["w", "up", "left", "space", "enter", "backspace", "\x1b[1;5C", "W"]


def test_keys_of_one_step_add_up_and_repeats_count_once():
    wanted = from_keys(["w", "w", "a", "F", "left", "x", "t", "space"])
    np.testing.assert_allclose(wanted.motion, [1, 1, -devices.FINE, 0, 0, 1])
    assert wanted.toggle
    assert wanted.commands == (devices.DONE,)
    assert not from_keys(["w", "s", "space", "space", "x"]).moves
    assert from_keys(["."]).moves


def test_a_script_says_the_keys_of_each_step():
    assert script_steps("w*2 a+F space") == [["w"], ["w"], ["a", "F"], ["space"]]
    for wrong in ("y", "w*", "w*x", "w+", "Enter"):
        with pytest.raises(UserError, match="write like"):
            script_steps(wrong)


def test_pilot_scales_motion_and_goes_on_while_the_gripper_closes():
    pilot = Pilot(EMBODIMENTS["google_robot"], 0.1, 3.0, 0.9)
    assert pilot.action(Input(), still=False) is None
    action = pilot.action(from_keys(["w", "left"]), still=False)
    np.testing.assert_allclose(action, [0.1, 0, 0, 0, 0, np.pi / 2, 1])  # the turn is clipped
    assert pilot.action(from_keys(["space"]), still=False)[GRIPPER] == 0
    after = [pilot.action(Input(), still=False) for _ in range(GRIPPER_STEPS)]
    assert [a is None for a in after] == [False] * (len(after) - 1) + [True]
    np.testing.assert_allclose(pilot.action(Input(), still=True), np.zeros(7))


# --- episodes -------------------------------------------------------------------------------------


def solution(seed: int, task: str = "open_top_drawer") -> str:
    """Keys that close the gripper at the handle and pull the drawer open, in the fake simulator."""
    env = make_fake(task_named(task))
    observation, info = env.reset(seed=seed)
    base = info["privileged"]["base"]
    yaw = np.pi + info["draws"]["robot_yaw"]
    away = HANDLE - base[:3]
    c, s = np.cos(yaw), np.sin(yaw)
    goal = np.array([c * away[0] + s * away[1], -s * away[0] + c * away[1], away[2]])
    steps = np.round((goal - observation["proprio"][:3]) / 0.1 / devices.FINE).astype(int)
    keys = [
        f"{pair[int(n < 0)]}*{abs(n)}" for pair, n in zip(("WS", "AD", "RF"), steps, strict=True)
    ]
    return " ".join([*keys, "space", "s*3"])


def test_a_driven_episode_reads_back_as_a_demonstration(tmp_path):
    store = run(tmp_path / "s", f"{solution(0)} .*2 enter q", seed=0)
    assert len(store) == 1
    episode, source = store.record(0), open_source(str(tmp_path / "s"))
    assert episode.success
    assert episode.meta["device"] == "script"
    np.testing.assert_array_equal(episode.actions, episode.executed)
    signals = source.signals(0)
    np.testing.assert_allclose(signals.actions[-6:-3, 0], -0.1)  # the pull
    np.testing.assert_allclose(signals.actions[-3:-1, :6], 0)
    assert signals.actions[0, GRIPPER] == 1
    assert signals.actions[-2, GRIPPER] == 0
    # what the robot did is what it was told to
    moved = np.diff(signals.proprio[:, :3], axis=0)
    np.testing.assert_allclose(moved, signals.actions[:-1, :3], atol=1e-5)
    assert signals.action_valid.tolist() == [True] * len(moved) + [False]
    assert not signals.terminate.any()
    assert source.metadata(0)["seed"] == 0


def test_the_store_is_one_with_the_recorders(tmp_path):
    out = tmp_path / "s"
    recorder = config(out=out).recorder()
    record_demos.check(recorder)
    with StoreWriter(out, "000", record_demos.header_of(recorder)) as writer:
        writer.note_failure(0, "the expert failed here")
    store = run(out, f"{solution(1)} enter q")
    assert store.metadata(0)["seed"] == 1
    assert store.seeds() == {0, 1}
    with pytest.raises(UserError, match="choose another folder"):
        check(config(out=out, task="open_middle_drawer"))


def test_discarded_and_unfinished_episodes_are_not_kept(tmp_path, capsys):
    store = run(tmp_path / "s", f"w*2 backspace enter w enter backspace {solution(2)} enter w q")
    assert [store.metadata(i)["seed"] for i in range(len(store))] == [2]
    assert store.failures == dict.fromkeys((0, 1), "discarded by the operator")
    assert "1 episodes" in capsys.readouterr().out
    again = run(tmp_path / "s", "backspace w q")  # seed 3, then 4 that was begun
    assert "seed 4: left after 1 steps, not kept" in capsys.readouterr().out
    assert set(again.failures) == {0, 1, 3}
    kept = run(tmp_path / "s", "w backspace w enter q", keep_failures="true")
    assert set(kept.failures) == {0, 1, 3, 4}
    assert [kept.record(i).success for i in range(2)] == [True, False]


def test_the_operator_ends_subtasks(tmp_path):
    keys = "w*2 t s w t q"  # the second t ends the last subtask, and with it the episode
    store = run(tmp_path / "s", keys, task="open_drawer_place", keep_failures="true")
    signals, episode = store.signals(0), store.record(0)
    first, second = task_named("open_drawer_place").instructions
    assert signals.instruction == [first] * 3 + [second] * 2
    assert signals.terminate.tolist() == [False, False, True, False, True]
    assert episode.meta["forced"] is False


def test_time_runs_on_where_wait_is_off(tmp_path):
    keys = "w h*3 w enter q"  # help is no motion
    waits = run(tmp_path / "a", keys, keep_failures="true")
    goes_on = run(tmp_path / "b", keys, keep_failures="true", wait="false")
    assert (waits.length(0), goes_on.length(0)) == (3, 6)
    np.testing.assert_allclose(goes_on.signals(0).actions[1:4, :6], 0)


def test_at_the_step_limit_it_waits_for_the_operator(tmp_path):
    limit = task_named("open_top_drawer").max_steps
    store = run(tmp_path / "s", f"w+s .*{limit + 5} enter backspace q")
    assert store.failures == {0: "discarded by the operator"}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"device": "mouse"}, "device=mouse: no such device"),
        ({"view": "tv"}, "view=tv: no such view"),
        ({"keys": "z"}, "keys: 'z' is none of"),
        ({"device": "keyboard", "keys": "w"}, "only with device=script"),
        ({"move": -0.1}, "move=-0.1: must be between"),
        ({"speed": "nan"}, "speed=nan: must be between"),
        ({"size": "[480]"}, "size=.*height, width"),
        ({"size": "[48,99999]"}, "each 16 to 4096, or null"),
        ({"port": -1}, "port=-1: must be between 0 and 65535"),
        ({"view": "window"}, "view=window: needs"),
        ({"episodes": 0}, "episodes=0"),
        ({"placement": "grid"}, "placement=grid: SIMPLER's evaluation cells"),
        ({"task": "move_near", "backend": "fake"}, "not built yet"),
    ],
)
def test_check_names_the_cure(wrong, says):
    with pytest.raises(UserError, match=says):
        check(config(**wrong))


# --- devices --------------------------------------------------------------------------------------


def test_gamepad_events_become_motion(tmp_path):
    def event(kind, number, value):
        return struct.pack("<IhBB", 0, value, kind, number)

    pad = tmp_path / "js0"
    state = [event(0x82, 2, -32767), event(0x82, 5, -32767), event(0x81, 0, 1)]  # at the start
    pad.write_bytes(b"".join([*state, event(2, 1, -32767), event(2, 5, 32767), event(2, 0, 3000)]))
    gamepad = Gamepad(pad)
    wanted = gamepad.read()
    np.testing.assert_allclose(wanted.motion, [1, 0, 1, 0, 0, 0])
    assert not wanted.toggle  # A was held when it was opened
    with pad.open("ab") as file:
        file.write(event(1, 0, 1) + event(1, 7, 1) + event(1, 5, 1) + event(2, 1, 0))
    wanted = gamepad.read()
    np.testing.assert_allclose(wanted.motion, [0, 0, 1, 1, 0, 0])
    assert wanted.toggle
    assert wanted.commands == (devices.KEEP,)
    gamepad.close()


class FakeHid(types.ModuleType):
    """A SpaceMouse that sends these reports."""

    reports: list[bytes] = []  # noqa: RUF012

    def enumerate(self, vendor):
        product = {"path": b"/dev/hidraw0", "product_string": "SpaceMouse Compact"}
        return [product] if vendor == SpaceMouse.VENDORS[0] else []

    def device(self):
        calls = {"open_path": lambda path: None, "set_nonblocking": lambda on: None}
        calls |= {"read": lambda n: self.reports.pop(0) if self.reports else b"", "close": list}
        return types.SimpleNamespace(**calls)


def test_spacemouse_reports_become_motion(monkeypatch):
    hid = FakeHid("hid")
    monkeypatch.setitem(sys.modules, "hid", hid)
    mouse = SpaceMouse(devices.Script("t enter"))
    # pushed away from the operator, lifted, twisted anticlockwise seen from above
    hid.reports += [struct.pack("<Bhhh", 1, 0, -350, -175), struct.pack("<Bhhh", 2, 0, 0, -350)]
    hid.reports += [bytes([3, 1])]
    wanted = mouse.read()
    np.testing.assert_allclose(wanted.motion, [1, 0, 0.5, 0, 0, 1])
    assert wanted.toggle
    assert wanted.commands == (devices.DONE,)
    hid.reports += [bytes([3, 1]), struct.pack("<Bhhhhhh", 1, 350, 0, 0, 0, 0, 0)]  # newer models
    wanted = mouse.read()
    np.testing.assert_allclose(wanted.motion, [0, -1, 0, 0, 0, 0])
    assert not wanted.toggle  # the button is still down
    assert wanted.commands == (devices.KEEP,)


def test_devices_that_are_not_there_name_the_cure(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "hid", None)
    with pytest.raises(UserError, match=r"pip install 'selfflow\[teleop\]'"):
        SpaceMouse(devices.Script(""))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(UserError, match="no terminal"):
        devices.open_device("keyboard", "")


# --- the page -------------------------------------------------------------------------------------


def test_the_page_streams_pictures_and_takes_keys():
    page = WebView(0, "press w")
    image = np.zeros((16, 24, 3), np.uint8)
    image[:, 12:] = (200, 30, 30)
    page.show(image)
    try:
        with urllib.request.urlopen(f"{page.url}/", timeout=30) as reply:
            assert "press w" in reply.read().decode()
        with urllib.request.urlopen(f"{page.url}/stream", timeout=30) as stream:
            size = int(re.search(rb"Length: (\d+)", stream.read1(200))[1])
        assert size > 100
        jpeg = page.next_jpeg(b"")
        np.testing.assert_allclose(np.asarray(Image.open(io.BytesIO(jpeg))), image, atol=12)
        for key, headers in (("w", {"X-Key": "w"}), ("forged", {}), (" ", {"X-Key": "space"})):
            request = urllib.request.Request(f"{page.url}/key", key.encode(), headers)
            urllib.request.urlopen(request, timeout=30).close()
        assert page.take_keys() == ["w", "space"]
        assert page.take_keys() == []
        with pytest.raises(UserError, match="port="):
            WebView(int(page.url.rpartition(":")[2]))
    finally:
        page.close()


# --- a real terminal ------------------------------------------------------------------------------

IN_TERMINAL = (  # makes standard input its controlling terminal, so that Ctrl-C is a signal
    "import fcntl, runpy, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_keys_of_a_terminal_and_ctrl_c_leaves_a_readable_store(tmp_path):
    master, slave = pty.openpty()
    said = ["backend=fake", "task=open_top_drawer", "view=none", "keep_failures=true", "speed=10"]
    command = [sys.executable, "-c", IN_TERMINAL, str(SCRIPT), *said, f"out={tmp_path / 's'}"]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    fcntl.fcntl(master, fcntl.F_SETFL, os.O_NONBLOCK)
    shown = ""

    def until(text: str) -> None:
        nonlocal shown
        end = time.monotonic() + 60
        while text not in shown:
            assert time.monotonic() < end, shown
            try:
                shown += os.read(master, 4096).decode()
            except BlockingIOError:
                time.sleep(0.01)
        shown = shown.partition(text)[2]

    until("step 0/113")
    for key, then in (
        ("w", "step 1/"), ("\x1b[A", "step 2/"), (" ", "step 6/"), ("\r", "seed 0: kept, 6 steps"),
        ("s", "step 1/"), ("\x7f", "seed 1: not kept"), ("w", "seed 2  step 1/"),
    ):  # fmt: skip
        os.write(master, key.encode())
        until(then)
    os.write(master, b"\x03")
    until("stopped; the same command continues")
    assert process.wait(timeout=60) == 130
    os.close(master)
    store = EpisodeStore(tmp_path / "s")
    assert (len(store), store.skipped, set(store.failures)) == (1, 0, {1})
    actions = store.signals(0).actions
    np.testing.assert_allclose(actions[0], [0.1, 0, 0, 0, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(actions[1], [0, 0, 0, 0, -0.2, 0, 1], atol=1e-6)
    np.testing.assert_allclose(actions[2:6], np.zeros((4, 7)))
    assert json.loads((tmp_path / "s" / "store.json").read_text())["backend"] == "fake"
