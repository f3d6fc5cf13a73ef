"""HDF5: robomimic's and ALOHA's layouts, written here as those projects write them."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfflow.datasets.episodes import EpisodeSource, Measures
from selfflow.datasets.hdf5 import Hdf5Source, recognised
from selfflow.datasets.robomimic_panda import ROBOMIMIC
from selfflow.datasets.rotations import canonical, compose, from_axis_angle, rotate
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import UserError

h5py = pytest.importorskip("h5py")

BASE = np.array([-0.56, 0.1, 0.912])
CONTROLLER = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "control_delta": True,
}
MODEL = (
    '<mujoco><worldbody><body name="table"/>'
    '<body name="robot0_base" pos="-0.56 0.1 0.912" quat="0.70710678 0 0 0.70710678"/>'
    "</worldbody></mujoco>"
)
YAML = """
embodiment: {name: lab_panda, control_hz: 20.0, limits: [0.05, 0.05, 0.05, 0.5, 0.5, 0.5, 1.0]}
cameras: {front: obs/agentview_image}
text: lift the cube
state:
  position: obs/robot0_eef_pos
  rotation: obs/robot0_eef_quat
  rotation_as: quat_xyzw
  gripper: obs/robot0_gripper_qpos[0]
  open: 0.04
  closed: 0.0
action:
  kind: delta
  position: actions[0:3]
  position_unit: 0.05
  rotation: actions[3:6]
  rotation_as: rotvec
  rotation_unit: 0.5
  gripper: actions[6]
  open: -1.0
  closed: 1.0
"""


def env_args(controller: dict | None = CONTROLLER) -> str:
    kwargs = {"control_freq": 20, "controller_configs": controller}
    return json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": kwargs})


def robomimic(path: Path, lengths: tuple[int, ...] = (5, 7, 3), args: str | None = None) -> Path:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = env_args() if args is None else args
        for i, t in enumerate(lengths):
            number = (0, 2, 10)[i]
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"], demo.attrs["model_file"] = t, MODEL
            demo["actions"] = rng.uniform(-1.2, 1.2, (t, 7))
            demo["dones"] = (np.arange(t) == t - 1).astype(int)
            demo["obs/robot0_eef_pos"] = rng.uniform(-1, 1, (t, 3))
            q = rng.normal(size=(t, 4))
            demo["obs/robot0_eef_quat"] = q / np.linalg.norm(q, axis=1, keepdims=True)
            demo["obs/robot0_gripper_qpos"] = np.tile([0.02, -0.02], (t, 1))
            images = rng.integers(0, 256, (t, 12, 16, 3), dtype=np.uint8)
            demo.create_dataset("obs/agentview_image", data=images, chunks=(1, 12, 16, 3))
        file["mask/valid"] = np.array([b"demo_10"])
        file["mask/train"] = np.array([b"demo_2", b"demo_0"])
    return path


def aloha(folder: Path, compress: bool, episodes: tuple[int, ...] = (0, 1, 10)) -> Path:
    rng = np.random.default_rng(1)
    folder.mkdir()
    for n in episodes:
        t = 4 + n
        with h5py.File(folder / f"episode_{n}.hdf5", "w") as file:
            file.attrs["sim"], file.attrs["compress"] = False, compress
            file["action"] = rng.normal(size=(t, 14)).astype(np.float32)
            file["observations/qpos"] = rng.normal(size=(t, 14)).astype(np.float32)
            images = np.full((t, 24, 32, 3), (200, 100, 20), np.uint8)
            images[np.arange(t), :, :, 2] = 15 * np.arange(t)[:, None, None]
            if compress:
                coded = [jpeg(image) for image in images]
                longest = max(map(len, coded)) + 9
                rows = [np.frombuffer(c.ljust(longest, b"\0"), np.uint8) for c in coded]
                file["observations/images/cam_high"] = np.stack(rows)
                file["compress_len"] = np.array([[len(c) for c in coded]])
            else:
                file["observations/images/cam_high"] = images
    return folder


def jpeg(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=95)
    return out.getvalue()


def test_robomimic_in_our_convention(tmp_path: Path) -> None:
    path = robomimic(tmp_path / "lift.hdf5")
    source = Hdf5Source(path)
    assert isinstance(source, EpisodeSource)
    assert isinstance(source, Measures)
    assert [source.length(i) for i in range(len(source))] == [5, 7, 3]
    assert source.cameras == ("agentview",)
    assert source.metadata(2) == {"episode": 10, "fps": 20.0, "task": "Lift", "file": "lift.hdf5"}
    found = source.signals(1)
    with h5py.File(path) as file:
        demo = file["data/demo_2"]
        raw, position = demo["actions"][:], demo["obs/robot0_eef_pos"][:]
        quaternion = demo["obs/robot0_eef_quat"][:][:, [3, 0, 1, 2]]
        images = demo["obs/agentview_image"][:]
    np.testing.assert_allclose(found.actions[:, :3], raw[:, :3].clip(-1, 1) * 0.05, atol=1e-7)
    np.testing.assert_allclose(found.actions[:, 3:6], raw[:, 3:6].clip(-1, 1) * 0.5, atol=1e-7)
    np.testing.assert_array_equal(found.actions[:, 6], raw[:, 6] < 0)  # +1 closes
    # back from the base, which stands turned by 90 degrees, to the world
    turned = canonical([0.70710678, 0, 0, 0.70710678])
    np.testing.assert_allclose(rotate(turned, found.proprio[:, :3]) + BASE, position, atol=1e-6)
    back = canonical(compose(turned, found.proprio[:, 3:7].astype(float)))
    np.testing.assert_allclose(back, canonical(quaternion), atol=1e-6)
    np.testing.assert_allclose(found.proprio[:, 7], 0.5)
    assert found.terminate.tolist() == [False] * 6 + [True]
    assert found.instruction == ["lift the cube"] * 7
    frames = source.frames(1, [6, 2, 2])
    np.testing.assert_array_equal(np.stack(frames), images[[6, 2, 2]])


def test_masks_choose_demos(tmp_path: Path) -> None:
    path = robomimic(tmp_path / "lift.hdf5")
    assert [Hdf5Source(path, mask="train").length(i) for i in range(2)] == [5, 7]
    assert len(Hdf5Source(path, mask="valid")) == 1
    with pytest.raises(UserError, match="mask=test: choose one of train, valid"):
        Hdf5Source(path, mask="test")


def test_a_path_says_spec_split_and_what_to_skip(tmp_path: Path) -> None:
    path = robomimic(tmp_path / "lift.hdf5")
    assert len(open_source(str(path))) == 3
    assert len(open_source(f"{path}?split:train")) == 2
    with pytest.raises(UserError, match="no option shards for this format; there are: split, skip"):
        open_source(f"{path}?shards:2")
    spec = tmp_path / "robot.yaml"
    spec.write_text(YAML)
    own, shipped = open_source(f"{path}::{spec}").signals(1), open_source(str(path)).signals(1)
    inside = np.abs(shipped.actions[:, :6]) < [0.0499] * 3 + [0.499] * 3  # ours clips, as robosuite
    np.testing.assert_allclose(
        own.actions[:, :6][inside], shipped.actions[:, :6][inside], atol=1e-6
    )
    assert own.instruction == ["lift the cube"] * 7
    np.testing.assert_allclose(own.proprio[:, 7], shipped.proprio[:, 7], atol=1e-6)


def test_the_controller_says_the_scale(tmp_path: Path) -> None:
    nested = {"type": "BASIC", "body_parts": {"right": CONTROLLER | {"output_max": [0.1] * 6}}}
    nested["body_parts"]["right"]["output_min"] = -0.1
    source = Hdf5Source(robomimic(tmp_path / "a.hdf5", args=env_args(nested)))
    assert np.abs(source.signals(0).actions[:, :6]).max() == pytest.approx(0.1)
    for wrong, message in (
        (None, "no controller with output_max"),
        (CONTROLLER | {"control_delta": False}, "absolute actions of OSC_POSE"),
        (CONTROLLER | {"type": "JOINT_VELOCITY"}, "delta actions of JOINT_VELOCITY"),
        (CONTROLLER | {"output_min": 0.0}, "not symmetric"),
    ):
        source = Hdf5Source(robomimic(tmp_path / "b.hdf5", args=env_args(wrong)))
        with pytest.raises(UserError, match=message):
            source.signals(0)


@pytest.mark.parametrize("compress", [False, True])
def test_aloha_frames_and_raw_arrays(
    tmp_path: Path, compress: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = aloha(tmp_path / "task", compress)
    source = Hdf5Source(folder)
    assert [source.length(i) for i in range(3)] == [4, 5, 14]  # 10 after 1
    assert "joint-space actions" in caplog.text
    assert source.cameras == ("cam_high",)
    assert source.measures == ("action", "observations/qpos")
    for step, frame in zip([3, 0, 9], source.frames(2, [3, 0, 9], "cam_high"), strict=True):
        assert np.abs(frame.astype(int) - [200, 100, 15 * step]).max() <= 3  # RGB, not BGR
    found = source.signals(2)
    assert not found.action_valid.any()
    assert not found.proprio_valid.any()
    with h5py.File(folder / "episode_10.hdf5") as file:
        np.testing.assert_array_equal(source.measured(2, "action"), file["action"][:])
    assert source.measured(2, "observations/images/cam_high") is None
    assert source.measured(2, "nothing") is None
    assert source.metadata(2) == {"episode": 10, "sim": False, "file": "episode_10.hdf5"}


def test_a_spec_of_ones_own_reads_other_keys_and_texts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = robomimic(tmp_path / "own.hdf5")
    with h5py.File(path, "a") as file:
        file["data"].attrs["task"] = "stack"
        file["data/demo_0/words"] = np.array([b"one", b"two", b"three", b"four", b"five"])
    constant = replace(ROBOMIMIC, instruction=None, text="lift it")
    assert Hdf5Source(path, constant).signals(0).instruction == ["lift it"] * 5
    assert (
        Hdf5Source(path, replace(ROBOMIMIC, instruction="task")).signals(0).instruction[0]
        == "stack"
    )
    words = Hdf5Source(path, replace(ROBOMIMIC, instruction="words")).signals(0).instruction
    assert words == ["one", "two", "three", "four", "five"]
    with pytest.raises(UserError, match="no text 'nothing'"):
        Hdf5Source(path, replace(ROBOMIMIC, instruction="nothing")).signals(0)
    wide = replace(ROBOMIMIC, numbers={**ROBOMIMIC.numbers, "actions": 8})
    with pytest.raises(UserError, match="actions has 7 values a step, expected 8"):
        Hdf5Source(path, wide).signals(0)
    for key, told in (("words", "no numbers"), ("obs", "no obs in /data/demo_0")):
        with pytest.raises(UserError, match=told):
            Hdf5Source(path, replace(ROBOMIMIC, numbers={"actions": 7, key: 0})).signals(0)
    with pytest.raises(UserError, match="actions holds no text"):
        Hdf5Source(path, replace(ROBOMIMIC, instruction="actions")).signals(0)
    planes = replace(ROBOMIMIC, cameras={"x": "obs/planes", "gone": "obs/gone"})
    with h5py.File(path, "a") as file:
        file["data/demo_0/obs/planes"] = np.zeros((5, 3, 8, 8), np.uint8)
    with pytest.raises(UserError, match=r"obs/planes are \(3, 8, 8\) uint8, not \(H, W, 3\)"):
        Hdf5Source(path, planes).frames(0, [0])
    assert "left out: camera gone (obs/gone)" in caplog.text
    blind = replace(ROBOMIMIC, cameras={"x": "obs/x"})
    with pytest.raises(UserError, match="no camera of the spec"):
        Hdf5Source(path, blind)
    with pytest.raises(UserError, match=r"wrist: .* has agentview"):
        Hdf5Source(path).frames(0, [0], "wrist")


def test_damaged_files_are_named_or_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = aloha(tmp_path / "task", False)
    whole = (folder / "episode_1.hdf5").read_bytes()
    (folder / "episode_1.hdf5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"episode_1\.hdf5: cannot be read"):
        Hdf5Source(folder)
    source = Hdf5Source(folder, skip_corrupt=True)
    assert (len(source), source.skipped) == (2, 1)
    assert "left out" in caplog.text
    path = robomimic(tmp_path / "lift.hdf5")
    with h5py.File(path, "a") as file:
        del file["data/demo_2/actions"]
        file["data/demo_2/actions"] = np.zeros((0, 7))
        file["mask/all"] = np.array([b"demo_0", b"demo_2", b"demo_77"])
    with pytest.raises(UserError, match="data/demo_2/actions is empty"):
        Hdf5Source(path)
    source = Hdf5Source(path, mask="all", skip_corrupt=True)
    assert (len(source), source.skipped) == (1, 2)
    (tmp_path / "other.hdf5").write_bytes(b"not this")
    assert not recognised(tmp_path / "other.hdf5")
    assert recognised(folder)
    with h5py.File(tmp_path / "odd.hdf5", "w") as file:
        file["x"] = [1]
    with pytest.raises(UserError, match=r"HDF5 file needs a spec .* it has x"):
        Hdf5Source(tmp_path / "odd.hdf5")


def test_threads_read_the_same(tmp_path: Path) -> None:
    source = Hdf5Source(robomimic(tmp_path / "lift.hdf5"))
    alone = [source.frames(i, range(source.length(i))) for i in range(3)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(source.frames, k % 3, range(source.length(k % 3))) for k in range(30)]
    for k, job in enumerate(jobs):
        np.testing.assert_array_equal(np.stack(job.result()), np.stack(alone[k % 3]))


def test_an_action_of_one_turns_as_the_controller_does() -> None:
    """exp(r) from the left, in the base frame: what OSC_POSE's goal is."""
    numbers = {key: np.zeros((1, width)) for key, width in ROBOMIMIC.numbers.items()}
    numbers["actions"][0, 5] = 1.0
    numbers["env_args/output_max"][:] = 0.5
    numbers["model_file/robot0_base"][:, 3] = 1
    numbers["obs/robot0_eef_quat"][:] = [1, 0, 0, 0]  # xyzw: half a turn about x
    found = ROBOMIMIC.convert(numbers, ["x"])
    np.testing.assert_allclose(found.proprio[0, 3:7], [0, 1, 0, 0], atol=1e-7)
    moved = compose(from_axis_angle(found.actions[0, 3:6]), found.proprio[0, 3:7])
    np.testing.assert_allclose(moved, [0, np.cos(0.25), np.sin(0.25), 0], atol=1e-7)
