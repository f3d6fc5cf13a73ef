"""RT-1's data set: its conventions by hand, and made-up shards in its exact schema."""

import json
from pathlib import Path

import numpy as np
import pytest

from selfflow.datasets.fractal import (
    CLOSE,
    CLOSED,
    FRACTAL,
    IMAGE,
    INSTRUCTION,
    MOVE,
    POSE,
    SCHEMA,
    TERMINATE,
    TURN,
    absolute_gripper,
    convert,
)
from selfflow.datasets.rlds import RldsSource
from selfflow.datasets.rlds_schema import read_schema
from selfflow.datasets.rotations import compose, from_axis_angle, from_rpy, to_axis_angle, to_matrix
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import UserError
from selfflow.datasets.synthetic import episode, write_fractal
from selfflow.datasets.tfrecord import parse_example, read_records
from selfflow.datasets.windows import Mixture, WindowSpec

PUBLISHED = Path(__file__).parents[2] / "shared/samples/fractal_schema/features.regenerated.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fractal(tmp_path_factory.mktemp("fractal"), episodes=5, steps=12, shards=2, seed=3)


@pytest.fixture(scope="module")
def source(place: Path) -> RldsSource:
    found = open_source(str(place.parents[1]))
    assert isinstance(found, RldsSource)
    return found


@pytest.mark.parametrize(
    ("closing", "opening"),
    [
        ([0, 0, 1, 0, 0, -1, 0], [1, 1, 0, 0, 0, 1, 1]),  # open, as the first command closes
        ([0, -1, 0, 1], [0, 1, 1, 0]),  # closed, as the first command opens
        ([0, 0.05, -0.09, 0], [1, 1, 1, 1]),  # no command: open
        ([0.4, 0.02, -0.3], [0, 0, 1]),  # half commands count, small ones do not
        ([-1.0], [1]),
    ],
)
def test_relative_gripper_commands(closing: list[float], opening: list[float]) -> None:
    np.testing.assert_array_equal(absolute_gripper(np.array(closing, float)), opening)


def numbers(steps: int = 3) -> dict[str, np.ndarray]:
    pose = np.tile([0.5, -0.1, 0.8, 0.5, -0.5, 0.1, -0.7], (steps, 1))
    pose[:, 3:] /= np.linalg.norm(pose[:, 3:], axis=1, keepdims=True)
    return {
        MOVE: np.arange(3.0 * steps).reshape(steps, 3) / 100,
        TURN: np.tile([0.3, -0.2, 0.5], (steps, 1)),
        CLOSE: np.array([0.0, 1, 0])[:steps, None],
        TERMINATE: np.array([[0.0, 1, 0], [0, 1, 0], [1, 0, 0]])[:steps],
        POSE: pose,
        CLOSED: np.array([0.0, 0.25, 1.5])[:steps, None],
    }


def test_values_by_hand() -> None:
    signals = convert(numbers(), ["pick apple"] * 3)
    np.testing.assert_allclose(signals.actions[1, :3], [0.03, 0.04, 0.05], rtol=1e-6)
    np.testing.assert_allclose(
        to_matrix(from_axis_angle(signals.actions[0, 3:6].astype(np.float64))),
        to_matrix(from_rpy([0.3, -0.2, 0.5])),
        atol=1e-7,
    )
    assert signals.actions[:, 6].tolist() == [1, 0, 0]
    assert signals.action_valid.all()
    assert signals.terminate.tolist() == [False, False, True]
    # xyzw (.5, -.5, .1, -.7) is wxyz (.7, -.5, .5, -.1) with w >= 0
    np.testing.assert_allclose(signals.proprio[0], [0.5, -0.1, 0.8, 0.7, -0.5, 0.5, -0.1, 1], 1e-6)
    assert signals.proprio[:, 7].tolist() == [1, 0.75, 0]
    assert signals.proprio_valid.all()


def test_a_pose_without_a_rotation_is_invalid() -> None:
    raw = numbers()
    raw[POSE][1, 3:] = 0
    signals = convert(raw, ["pick apple"] * 3)
    assert signals.proprio_valid.tolist() == [True, False, True]
    assert not signals.proprio[1].any()
    assert np.isfinite(signals.proprio).all()


def test_made_up_shards_have_the_schema_of_the_real_ones(place: Path) -> None:
    if not PUBLISHED.is_file():
        pytest.skip(f"no schema at {PUBLISHED}")
    assert json.loads((place / "features.json").read_text()) == json.loads(PUBLISHED.read_text())


def test_every_field_of_the_schema_is_on_the_wire(place: Path) -> None:
    (shard, _) = sorted(place.glob("*.tfrecord*"))
    record = parse_example(read_records(shard)[0])
    assert record.keys() == read_schema(place).keys()
    for key, leaf in read_schema(place).items():
        value, count = record[key], 12 if key.startswith("steps/") else 1
        if leaf.dtype in ("text", "image"):
            assert isinstance(value, list)
            assert len(value) == count
        else:
            assert np.asarray(value).dtype == ("f4" if leaf.dtype == "float32" else "i8"), key
            assert len(value) == count * np.prod(leaf.shape, dtype=int), key


def test_made_up_episodes_agree_with_themselves(source: RldsSource) -> None:
    assert (len(source), source.name) == (5, "fractal20220817_data/train")
    assert source.embodiment.name == "google_robot"
    for i in range(5):
        s = source.signals(i)
        assert source.length(i) == len(s.instruction) == 12
        moved = np.diff(s.proprio[:, :3], axis=0)
        np.testing.assert_allclose(s.actions[:-1, :3], moved, atol=1e-6)
        q = s.proprio[:, 3:7].astype(np.float64)
        reached = to_axis_angle(compose(q[1:], q[:-1] * [1, -1, -1, -1]))
        np.testing.assert_allclose(s.actions[:-1, 3:6], reached, atol=1e-6)
        assert np.linalg.norm(s.actions[:, :3], axis=1).max() < 0.3
        # the gripper is where the action before wanted it
        np.testing.assert_array_equal(s.proprio[1:, 7], s.actions[:-1, 6])
        assert set(s.actions[:, 6]) == {0, 1}
        assert s.terminate.tolist() == [False] * 11 + [True]
        first, last = source.frames(i, [0, 11])
        assert first.shape == (256, 320, 3)
        assert np.abs(first.astype(int) - last).mean() > 1
        ((text, vector),) = source.text_embeddings(i).items()
        assert text == s.instruction[0]
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_all_that_is_no_action_is_there_as_it_was_written(source: RldsSource) -> None:
    raw = episode([3, 2], 12)
    for key in source.measures:
        found, leaf = source.measured(2, key), SCHEMA[key]
        assert found is not None
        assert found.shape == (12, *leaf.shape)
        assert found.dtype == leaf.dtype
        np.testing.assert_array_equal(found.ravel(), raw[key], err_msg=key)
    assert "steps/action/base_displacement_vector" in source.measures
    missing = {k for k in SCHEMA if k.startswith("steps/")} - {*source.measures}
    assert missing == {IMAGE, INSTRUCTION}
    about = source.metadata(2)
    assert about["success"] is True
    assert about["aspects/undesirable"] is False
    assert about["attributes/task_family"] == 0
    assert about["attributes/task_family_name"] == ""
    assert (about["file"], about["record"], about["fps"]) == (
        "fractal20220817_data-train.tfrecord-00000-of-00002",
        2,
        3.0,
    )


def test_windows_and_partial_downloads(place: Path, tmp_path: Path) -> None:
    second = sorted(place.glob("*.tfrecord*"))[1]
    for path in (second, place / "features.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    half = open_source(str(tmp_path))
    assert len(half) == 2
    spec = WindowSpec(frames=(0, 4, 8), chunk=4, height=64, width=80)
    batch = Mixture([half], [1.0], spec, seed=0).batch(0, 6)
    assert batch.frames.shape == (6, 3, 64, 80, 3)
    assert batch.action_valid[:, 0].all()


def test_the_same_seed_writes_the_same_bytes(place: Path, tmp_path: Path) -> None:
    again = write_fractal(tmp_path, episodes=5, steps=12, shards=2, seed=3)
    for path in place.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    other = episode([4, 0], 12)["steps/action/world_vector"]
    assert not np.array_equal(other, episode([3, 0], 12)["steps/action/world_vector"])
    with pytest.raises(UserError, match="already there"):
        write_fractal(tmp_path)
    with pytest.raises(ValueError, match="3 shards"):
        write_fractal(tmp_path / "other", episodes=2, shards=3)


def test_the_camera_is_simplers(source: RldsSource) -> None:
    assert tuple(FRACTAL.cameras) == source.embodiment.cameras
