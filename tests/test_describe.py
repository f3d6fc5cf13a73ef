"""One's own data by YAML: conventions against closed forms, and mistakes in the file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from selfflow.datasets import describe
from selfflow.datasets.describe import load_spec, needs_spec, part, spec_of
from selfflow.datasets.episodes import Signals
from selfflow.datasets.pose_actions import ROTATIONS, Part, pose_deltas, to_quaternion
from selfflow.datasets.rotations import (
    canonical,
    compose,
    from_axis_angle,
    from_rpy,
    rotate,
    to_axis_angle,
    to_matrix,
)
from selfflow.datasets.spec import UserError

T = 12
TEXTS = ["stir"] * T
EXAMPLE = describe.SHIPPED / "example_robot.yaml"


def quaternions(rng: np.random.Generator, n: int = T) -> np.ndarray:
    return canonical(rng.normal(size=(n, 4)))


def given(q: np.ndarray) -> dict[str, np.ndarray]:
    """The same rotations in every form."""
    m = to_matrix(q)
    w, x, y, z = q.T
    roll = np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    pitch = np.arcsin(np.clip(2 * (w * y - z * x), -1, 1))
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return {
        "rotvec": to_axis_angle(q),
        "rpy": np.stack([roll, pitch, yaw], axis=1),
        "quat_xyzw": -q[:, [1, 2, 3, 0]],  # the other of the two that mean the same
        "quat_wxyz": q,
        "6d_columns": np.concatenate([m[..., 0], m[..., 1]], axis=1),
        "6d_rows": np.concatenate([m[:, 0], m[:, 1]], axis=1),
    }


def spec(state: dict | None = None, action: dict | None = None, **more: Any) -> dict[str, Any]:
    own = {"embodiment": "widowx", "cameras": {"front": "image"}, "text": "stir"}
    return own | ({"state": state} if state else {}) | ({"action": action} if action else {}) | more


def signals(content: dict[str, Any], numbers: dict[str, np.ndarray]) -> Signals:
    return spec_of(content).convert(numbers, TEXTS)


def test_every_form_of_a_rotation_gives_the_same_signals() -> None:
    rng = np.random.default_rng(0)
    p, q, opening = rng.normal(size=(T, 3)), quaternions(rng), rng.uniform(size=(T, 1))
    forms = given(q)
    assert set(forms) == set(ROTATIONS)
    results = []
    for name, values in forms.items():
        rows = np.concatenate([p, values, opening], axis=1)
        n = 3 + values.shape[1]
        pose = {"position": "s[0:3]", "rotation": f"s[3:{n}]", "rotation_as": name}
        arm = pose | {"gripper": f"s[{n}]", "open": 1, "closed": 0}
        results.append(signals(spec(arm, arm), {"s": rows}))
    for found in results:
        np.testing.assert_allclose(found.proprio[:, 3:7], q, atol=1e-6)
        np.testing.assert_allclose(found.actions[:, 3:6], to_axis_angle(q), atol=1e-6)
        np.testing.assert_allclose(found.proprio, results[0].proprio, atol=1e-6)
        np.testing.assert_allclose(found.actions, results[0].actions, atol=1e-6)
        assert found.proprio_valid.all()
        assert found.action_valid.all()


def test_deltas_lead_back_to_the_poses_in_float64() -> None:
    rng = np.random.default_rng(1)
    p, q = rng.normal(size=(T, 3)), quaternions(rng)
    moved, turned = pose_deltas((p[:-1], q[:-1]), (p[1:], q[1:]))
    at, to = p[0], q[0]
    for t in range(T - 1):
        at, to = at + moved[t], compose(from_axis_angle(turned[t]), to)
        np.testing.assert_allclose(at, p[t + 1], atol=1e-12)
        np.testing.assert_allclose(canonical(to), q[t + 1], atol=1e-12)


@pytest.mark.parametrize("kind", ["target", "target_steps", "reached"])
def test_absolute_poses_become_deltas(kind: str) -> None:
    rng = np.random.default_rng(2)
    sensed, commanded = rng.normal(size=(T, 3)), rng.normal(size=(T, 3))
    q, goal = quaternions(rng), quaternions(rng)
    pose = {"position": "{}[0:3]", "rotation": "{}[3:7]", "rotation_as": "quat_wxyz"}
    state, command = ({k: v.format(key) for k, v in pose.items()} for key in ("s", "a"))
    action = {"kind": kind} | ({} if kind == "reached" else command)
    numbers = {"s": np.concatenate([sensed, q], 1), "a": np.concatenate([commanded, goal], 1)}
    found = signals(spec(state, action), numbers)
    start, end, valid = {
        "target": ((sensed, q), (commanded, goal), np.ones(T, bool)),
        "target_steps": (
            (np.roll(commanded, 1, 0), np.roll(goal, 1, 0)),
            (commanded, goal),
            np.arange(T) > 0,
        ),
        "reached": (
            (sensed, q),
            (np.roll(sensed, -1, 0), np.roll(q, -1, 0)),
            np.arange(T) < T - 1,
        ),
    }[kind]
    np.testing.assert_array_equal(found.action_valid, valid)
    moves, turns = found.actions[valid, :3], found.actions[valid, 3:6]
    np.testing.assert_allclose((start[0][valid] + moves), end[0][valid], atol=1e-6)
    back = canonical(compose(from_axis_angle(turns), start[1][valid]))
    np.testing.assert_allclose(back, end[1][valid], atol=1e-6)
    assert not found.actions[~valid].any()


def test_what_a_target_does_not_command_stays() -> None:
    rng = np.random.default_rng(2)
    sensed, goal, q = rng.normal(size=(T, 3)), rng.normal(size=(T, 3)), quaternions(rng)
    state = {"position": "s[0:3]", "rotation": "s[3:7]", "rotation_as": "quat_wxyz"}
    numbers = {"s": np.concatenate([sensed, q], 1), "a": goal}
    for axes in (3, 2):
        action = {"kind": "target", "position": f"a[0:{axes}]"}
        found = signals(spec(state, action), numbers).actions
        moves = (goal - sensed)[:, :axes]
        np.testing.assert_allclose(found[:, :axes], moves, atol=1e-6)
        assert not found[:, axes:6].any()
    flat = spec({"position": "s[0:2]"}, {"kind": "target", "position": "a"})
    with pytest.raises(UserError, match="has a z, but the state"):
        signals(flat, numbers)


def test_a_delta_in_the_tools_frame_is_turned_into_the_bases() -> None:
    quarter = np.tile(from_rpy([0.0, 0.0, np.pi / 2]), (T, 1))  # the tool's x is the base's y
    numbers = {"s": np.concatenate([np.zeros((T, 3)), quarter], 1)}
    numbers["a"] = np.tile([0.1, 0.0, 0.2, 0.3, 0.0, 0.0], (T, 1))
    state = {"position": "s[0:3]", "rotation": "s[3:7]", "rotation_as": "quat_wxyz"}
    arm = {"position": "a[0:3]", "rotation": "a[3:6]", "rotation_as": "rotvec", "frame": "tool"}
    found = signals(spec(state, arm), numbers)
    wanted = np.tile([0, 0.1, 0.2, 0, 0.3, 0, 1], (T, 1))
    np.testing.assert_allclose(found.actions, wanted, atol=1e-7)
    # and the pose that follows is the one that the tool means itself
    after = compose(quarter[0], from_axis_angle([0.3, 0.0, 0.0]))
    np.testing.assert_allclose(
        canonical(compose(from_axis_angle(found.actions[0, 3:6]), quarter[0])),
        canonical(after),
        atol=1e-7,
    )
    np.testing.assert_allclose(found.actions[0, :3], rotate(quarter[0], [0.1, 0, 0.2]), atol=1e-7)


def test_units_grippers_and_ends() -> None:
    closing = np.zeros(T)
    closing[[3, 7]] = 0.8, -0.5
    numbers = {
        "mm": np.full((T, 2), 250.0),
        "degrees": np.tile([0.0, 0.0, 90.0], (T, 1)),
        "width": np.linspace(-0.01, 0.09, T)[:, None],
        "closing": closing[:, None],
        "done": (np.arange(T) == 5).astype(float)[:, None],
    }
    pose = {"position": "mm", "position_unit": 0.001}
    turn = {"rotation": "degrees", "rotation_as": "rpy", "rotation_unit": np.pi / 180}
    state = {**pose, **turn, "gripper": "width", "open": 0.08, "closed": 0}
    action = {**pose, **turn, "gripper": "closing", "open": -1, "closed": 1, "relative": True}
    found = signals(spec(state, action, terminate="done"), numbers)
    np.testing.assert_allclose(found.proprio[0, :3], [0.25, 0.25, 0], atol=1e-7)
    np.testing.assert_allclose(found.actions[0, 3:6], [0, 0, np.pi / 2], atol=1e-6)
    opening = np.clip(numbers["width"][:, 0] / 0.08, 0, 1)
    np.testing.assert_allclose(found.proprio[:, 7], opening, atol=1e-6)
    np.testing.assert_array_equal(found.actions[:, 6], [1] * 3 + [0] * 4 + [1] * 5)
    assert np.flatnonzero(found.terminate).tolist() == [5]
    found = signals(spec(state, {"kind": "reached"}, terminate="last"), numbers)
    np.testing.assert_allclose(found.actions[:-1, 6], opening[1:], atol=1e-6)
    assert np.flatnonzero(found.terminate).tolist() == [T - 1]


@pytest.mark.parametrize("name", list(ROTATIONS))
def test_rows_that_are_no_poses_are_not_valid(name: str) -> None:
    rng = np.random.default_rng(3)
    values = given(quaternions(rng))[name]
    values[2] = np.nan
    wrong = [2]
    if name not in ("rotvec", "rpy"):
        values[4] = 0
        wrong = [2, 4]
    position = rng.normal(size=(T, 3))
    position[6, 1] = np.inf
    arm = {"position": "p", "rotation": "r", "rotation_as": name}
    found = signals(spec(arm, arm), {"p": position, "r": values})
    assert np.flatnonzero(~found.proprio_valid).tolist() == [*wrong, 6]
    assert np.flatnonzero(~found.action_valid).tolist() == [*wrong, 6]
    assert np.isfinite(found.proprio).all()
    assert not found.actions[wrong].any()
    assert not to_quaternion(values, name)[1][wrong].any()


def test_joint_data_have_no_signals_but_frames_and_text() -> None:
    found = spec_of(spec())
    assert (found.numbers, found.text) == ({}, "stir")
    none = found.convert({}, TEXTS)
    assert not none.action_valid.any()
    assert not none.proprio_valid.any()
    assert not none.terminate.any()


def test_the_example_explains_every_key_and_all_shipped_specs_load() -> None:
    found = load_spec(EXAMPLE)
    assert (found.embodiment.name, found.embodiment.control_hz) == ("my_robot", 10.0)
    assert found.embodiment.cameras == ("front", "wrist")
    assert found.cameras == load_spec("example_robot").cameras
    assert found.numbers == {"observation.state": 0, "action": 0}
    text = EXAMPLE.read_text()
    for key in {*describe.TOP, *describe.ROBOT, *describe.STATE, *describe.ACTION}:
        assert f"{key}: " in text or f"{key}:\n" in text, key
    for choice in (*ROTATIONS, *describe.KINDS, *describe.FRAMES):
        assert choice in text, choice
    for path in describe.SHIPPED.glob("*.yaml"):
        load_spec(path.stem)


def test_parts() -> None:
    assert part("obs/eef_pos") == Part("obs/eef_pos")
    assert part("a[6]") == Part("a", 6, 7)
    assert part("a[0:3]") == Part("a", 0, 3)
    for wrong in ("a[", "a[:3]", "a[-1]", ""):
        with pytest.raises(UserError, match="give a key"):
            part(wrong)
    found = spec_of(spec({"position": "s[4:7]"}))
    with pytest.raises(UserError, match=r"s\[4:7\]: the data have 6 values"):
        found.convert({"s": np.zeros((T, 6))}, TEXTS)


STATE = {"position": "s[0:3]"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "the spec: give keys and values"),
        (spec(stat={}), "no key stat; did you mean state"),
        ({"embodiment": "widowx", "text": "a"}, "the spec: cameras is missing"),
        (spec(embodiment="panda"), "embodiment=panda: choose one of google_robot, widowx"),
        (spec(embodiment={"name": "a"}), "embodiment: control_hz is missing"),
        (spec(embodiment={"name": "a", "control_hz": "fast"}), "control_hz=fast: give a number"),
        (spec(embodiment={"name": "a", "control_hz": 5, "limits": [1]}), "give 7 numbers"),
        (spec(embodiment={"name": "widowx", "control_hz": 5}), "write embodiment: widowx"),
        (spec(instruction="task"), "give either instruction"),
        (spec({"position": 3}), "position=3: give a text"),
        (spec({"rotation": "s[3:6]"}), "rotation_as=: choose one of rotvec, rpy"),
        (spec({**STATE, "rotation": "s", "rotation_as": "euler"}), "rotation_as=euler: choose"),
        (spec({"gripper": "s[6]", "open": 1, "closed": 0}), "position: is missing"),
        (spec({**STATE, "gripper": "s[6]", "open": 1}), "state.closed=None: give a number"),
        (spec({**STATE, "gripper": "s[6]", "open": 1, "closed": 1}), "both 1.0"),
        (spec({**STATE, "frame": "tool"}), "state: no key frame"),
        (spec(None, {**STATE, "kind": "absolute"}), "action.kind=absolute: choose one of delta"),
        (spec(None, {**STATE, "kind": "target"}), "needs the state"),
        (spec(None, {**STATE, "frame": "tool"}), "needs the state"),
        (spec(STATE, {**STATE, "kind": "reached"}), "the state says them"),
        (spec(STATE, {"kind": "target"}), "action.position: is missing"),
        (spec(STATE, {**STATE, "frame": "tool", "kind": "target"}), "only a delta"),
        (
            spec(STATE, {"kind": "target", "position": "a", "rotation": "b", "rotation_as": "rpy"}),
            "state.rotation: is missing",
        ),
        (spec({**STATE, "position_unit": 0}), "give a number above 0"),
        (
            spec(None, {**STATE, "gripper": "a", "open": 0, "closed": 1, "relative": True}),
            "opposite signs",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as found:
        load_spec(path)
    assert message in str(found.value)
    assert "robot.yaml" in str(found.value)
    assert "\n" not in str(found.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nor one of .*example_robot"):
        load_spec("no_such_spec")
    with pytest.raises(UserError, match="cannot be read"):
        load_spec(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(UserError, match=r"bad\.yaml: cannot be read") as found:
        load_spec(tmp_path / "bad.yaml")
    assert "\n" not in str(found.value)


def test_data_without_a_spec_say_what_they_hold() -> None:
    message = str(needs_spec("here", "HDF5 file", {"obs/a": "7 float", "actions": "7 float"}))
    for word in ("here", "obs/a (7 float)", "docs/your_own_data.md", "here::my_robot.yaml"):
        assert word in message
