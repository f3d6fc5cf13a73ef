"""Annotated clips: the real DROID and Language-Table samples, and made-up ones for the errors."""

import json
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from selfflow.datasets.clips import ClipFolder, recognised
from selfflow.datasets.droid import DROID_CLIPS
from selfflow.datasets.episodes import EpisodeSource, Measures
from selfflow.datasets.rotations import compose, from_axis_angle, from_rpy, to_axis_angle
from selfflow.datasets.spec import UserError

SAMPLES = Path(__file__).parents[2] / "shared/samples"
DROID = SAMPLES / "ctrlworld_droid/dataset_example/droid_subset"
TABLE = SAMPLES / "irasim_language_table/robotdata/opensource_robotdata/languagetable"


@pytest.fixture
def droid() -> ClipFolder:
    if not DROID.is_dir():
        pytest.skip(f"{DROID} is not there")
    return ClipFolder(DROID)


def annotation(name: str) -> dict:
    return json.loads((DROID / f"annotation/{name}.json").read_text())


def test_droid_is_read_whole(droid: ClipFolder, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(droid, EpisodeSource)
    assert isinstance(droid, Measures)
    assert recognised(DROID)
    assert [droid.length(i) for i in range(len(droid))] == [39, 33]
    assert droid.cameras == ("exterior_1", "exterior_2", "wrist")
    assert droid.metadata(1) == {
        "episode": 199,
        "success": False,
        "fps": 5.0,
        "file": "annotation/val/199.json",
    }
    assert set(droid.signals(1).instruction) == {"Move the green towel to the right of the lid"}
    assert set(droid.signals(0).instruction) == {""}
    ClipFolder(DROID)
    assert "1 of 2 clips have no text" in caplog.text


def test_droid_frames_are_the_videos(droid: ClipFolder) -> None:
    """Any order of steps gives what decoding all in turn gives; the green towel is in view."""
    whole = droid.frames(1, range(33), "wrist")
    assert whole[0].shape == (192, 320, 3)
    for step, frame in zip([30, 4, 4], droid.frames(1, [30, 4, 4], "wrist"), strict=True):
        np.testing.assert_array_equal(frame, whole[step])
    red, green, blue = np.moveaxis(whole[0].astype(int), -1, 0)
    assert ((green > red + 30) & (green > blue + 30)).mean() > 0.02
    assert np.abs(whole[0].astype(int) - droid.frames(1, [0])[0]).mean() > 20  # another camera


def test_droid_poses_and_actions_in_our_convention(droid: ClipFolder) -> None:
    raw, found = annotation("val/199"), droid.signals(1)
    states = np.array(raw["states"])  # the file's own 5 Hz rows: xyz, rpy, gripper
    np.testing.assert_allclose(found.proprio[:, :3], states[:, :3], atol=1e-6)
    np.testing.assert_allclose(found.proprio[:, 7], 1 - states[:, 6], atol=1e-6)
    turned = compose(from_rpy(states[:, 3:6]), found.proprio[:, 3:7] * [1, -1, -1, -1])
    assert np.abs(to_axis_angle(turned)).max() < 1e-5
    # an action leads from the pose at its frame to the last command before the next
    goal = np.array(raw["action.cartesian_position"])[2::3]
    n = len(goal)
    assert found.action_valid.tolist() == [True] * n + [False] * (33 - n)
    np.testing.assert_allclose(
        found.proprio[:n, :3] + found.actions[:n, :3], goal[:, :3], atol=1e-6
    )
    reached = compose(from_axis_angle(found.actions[:n, 3:6]), found.proprio[:n, 3:7])
    off = compose(from_rpy(goal[:, 3:]), reached * [1, -1, -1, -1])
    assert np.abs(to_axis_angle(off)).max() < 1e-5
    # commands lead where the arm then goes
    moved = np.diff(found.proprio[:, :3], axis=0)
    for axis in range(3):
        assert np.corrcoef(found.actions[:32, axis], moved[:, axis])[0, 1] > 0.85
    assert not found.actions[~found.action_valid].any()
    low, high = -np.array(droid.embodiment.limits), np.array(droid.embodiment.limits)
    assert ((found.actions >= low) & (found.actions <= high)).all()


def test_numbers_once_a_frame_are_measured(droid: ClipFolder) -> None:
    joints = droid.measured(1, "joints")
    assert joints is not None
    np.testing.assert_array_equal(joints, annotation("val/199")["joints"])
    assert "joints" in droid.measures
    assert droid.measured(1, "action.joint_position") is None  # at 15 Hz
    assert droid.measured(1, "texts") is None


def test_language_table_is_read_whole() -> None:
    if not TABLE.is_dir():
        pytest.skip(f"{TABLE} is not there")
    source = ClipFolder(TABLE)
    assert (len(source), source.length(0), source.cameras) == (1, 18, ("front",))
    assert source.frames(0, [17])[0].shape == (360, 640, 3)
    raw = json.loads((TABLE / "annotation/test/example.json").read_text())["actions"]
    found = source.signals(0)
    np.testing.assert_allclose(found.actions[:17, :2], raw, atol=1e-7)
    assert found.action_valid.tolist() == [True] * 17 + [False]
    assert not found.actions[:, 2:6].any()
    assert found.actions[:17, 6].all()
    assert not found.proprio_valid.any()
    assert source.metadata(0) == {
        "episode": 27,
        "fps": 4.0,
        "file": "annotation/test/example.json",
    }


def test_damaged_clips_are_named_or_counted(
    droid: ClipFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(
        copytree(
            DROID,
            tmp_path / "clips",
            copy_function=lambda a, b: Path(b).write_bytes(Path(a).read_bytes()),
        )
    )
    file = folder / "annotation/train/6.json"
    file.write_text("{")
    with pytest.raises(UserError, match=r"6\.json: not an annotation"):
        ClipFolder(folder, DROID_CLIPS)
    source = ClipFolder(folder, DROID_CLIPS, skip_corrupt=True)
    assert (len(source), source.skipped) == (1, 1)
    assert "left out" in caplog.text
    (folder / "videos/val/199/0.mp4").write_bytes(b"none")
    with pytest.raises(UserError, match=r"0\.mp4: not a video"):
        source.frames(0, [0])
    with pytest.raises(UserError, match="camera=front"):
        source.frames(0, [0], "front")
    wrong = annotation("val/199")
    wrong["observation.state.cartesian_position"] = [[0.0, 1.0]] * 97
    (folder / "annotation/val/199.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match="2 values a row, expected 6"):
        ClipFolder(folder, DROID_CLIPS, skip_corrupt=True).signals(0)
    (folder / "annotation/train/6.json").write_text('{"states": 1}')
    with pytest.raises(UserError, match=r"folder of clips needs a spec .* states"):
        ClipFolder(folder)
    assert not recognised(tmp_path)
