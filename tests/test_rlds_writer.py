"""Episodes of any source as RLDS in RT-1's schema: what comes back, what is lost, resuming."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.datasets.episodes import EpisodeSource, Metadata, Signals
from selfflow.datasets.fractal import SCHEMA, absolute_gripper, relative_gripper
from selfflow.datasets.rlds import RldsSource, decode_image
from selfflow.datasets.rlds_index import shard_files
from selfflow.datasets.rlds_schema import described, read_schema
from selfflow.datasets.rlds_writer import write_rlds
from selfflow.datasets.rotations import canonical
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import EMBODIMENTS, Embodiment, UserError
from selfflow.datasets.synthetic import write_fractal
from selfflow.datasets.tfrecord import parse_example, read_records

BRIDGE_SAMPLE = Path(__file__).parents[2] / "shared/samples/octo_bridge_debug/bridge_dataset"


class Drawn:
    """Random episodes of 3, 4, 5, ... steps, held in memory."""

    name, cameras, skipped = "drawn", ("front", "wrist"), 0

    def __init__(
        self, episodes: int = 5, size: tuple[int, int] = (512, 640), robot: str = "google_robot"
    ) -> None:
        self.embodiment: Embodiment = EMBODIMENTS[robot]
        self.episodes, self.size, self.stop_at = episodes, size, episodes

    def __len__(self) -> int:
        return self.episodes

    def length(self, i: int) -> int:
        return 3 + i

    def frames(self, i: int, steps: Sequence[int], camera: str | None = None) -> list[np.ndarray]:
        if i >= self.stop_at:
            raise KeyboardInterrupt
        return [np.full((*self.size, 3), (40 * i, 20 * s, 99), np.uint8) for s in steps]

    def signals(self, i: int) -> Signals:
        rng, t = np.random.default_rng(i), self.length(i)
        proprio = rng.normal(size=(t, 8))
        proprio[:, 3:7] = canonical(proprio[:, 3:7])
        proprio[:, 7] = rng.uniform(size=t)
        actions = rng.uniform(-1, 1, (t, 7))
        actions[:, 3:6] *= 1.5
        actions[:, 6] = rng.integers(0, 2, t)
        return Signals(
            proprio=proprio.astype(np.float32),
            proprio_valid=np.ones(t, bool),
            actions=actions.astype(np.float32),
            action_valid=np.ones(t, bool),
            terminate=np.arange(t) == t - 1 - i % 2,
            instruction=[f"first {i}"] * (t - 1) + ["zweitens: größer"],
        )

    def metadata(self, i: int) -> Metadata:
        return {"seed": i, "success": i % 2 == 0, "attributes/env_name": "kitchen"}


class Holes(Drawn):
    """With a step without an action, one without a pose, and a half open gripper."""

    def signals(self, i: int) -> Signals:
        whole, t = super().signals(i), self.length(i)
        valid, posed = np.arange(t) != 1, np.arange(t) != 2
        actions = np.where(valid[:, None], whole.actions, np.float32(0))
        actions[0, 6] = 0.75
        proprio = np.where(posed[:, None], whole.proprio, np.float32(0))
        return replace(
            whole, actions=actions, action_valid=valid, proprio=proprio, proprio_valid=posed
        )


def reopened(place: Path) -> RldsSource:
    found = open_source(str(place))
    assert isinstance(found, RldsSource)
    return found


def test_the_stand_in_is_a_source() -> None:
    assert isinstance(Drawn(), EpisodeSource)


def test_signals_come_back(tmp_path: Path) -> None:
    original = Drawn()
    written = write_rlds(original, tmp_path, per_shard=2)
    assert written.place == tmp_path / "fractal20220817_data/0.1.0"
    assert (written.episodes, written.steps) == (5, 25)
    assert written.notes == {"frames resized to 256×320": 25}
    assert len(shard_files(written.place, "train")) == 3
    source = reopened(tmp_path)
    assert len(source) == 5
    assert source.embodiment == original.embodiment
    for i in range(5):
        was, mine = original.signals(i), source.signals(i)
        np.testing.assert_allclose(mine.actions, was.actions, atol=1e-6)
        np.testing.assert_array_equal(mine.actions[:, 6], was.actions[:, 6])
        np.testing.assert_allclose(mine.proprio, was.proprio, atol=1e-6)
        np.testing.assert_array_equal(mine.terminate, was.terminate)
        assert mine.instruction == was.instruction
        assert mine.action_valid.all()
        assert mine.proprio_valid.all()
        frame = source.frames(i, [2])[0].astype(int)
        assert frame.shape == (256, 320, 3)
        assert np.abs(frame - [40 * i, 40, 99]).max() <= 3
        about = source.metadata(i)
        assert about["success"] == (i % 2 == 0)
        assert about["attributes/env_name"] == "kitchen"
        terminal = source.measured(i, "steps/is_terminal")
        assert terminal is not None
        assert terminal.tolist() == [False] * (2 + i) + [i % 2 == 0]
        reward = source.measured(i, "steps/reward")
        assert reward is not None
        assert reward.tolist() == [0] * (2 + i) + [float(i % 2 == 0)]


def test_files_are_in_the_published_schema_with_right_checksums(tmp_path: Path) -> None:
    place = write_rlds(Drawn(2), tmp_path).place
    assert json.loads((place / "features.json").read_text()) == described(SCHEMA)
    (shard,) = shard_files(place, "train")
    record = parse_example(read_records(shard)[1])
    assert record.keys() == SCHEMA.keys()
    for key, leaf in SCHEMA.items():
        count = 4 if key.startswith("steps/") else 1
        size = 1 if leaf.dtype == "image" else int(np.prod(leaf.shape))
        assert len(record[key]) == count * size, key
    assert not np.any(record["steps/observation/workspace_bounds"])
    (split,) = json.loads((place / "dataset_info.json").read_text())["splits"]
    assert split["shardLengths"] == ["2"]
    assert split["numBytes"] == str(shard.stat().st_size)
    assert not list(tmp_path.rglob("*.part"))


def test_what_the_schema_cannot_say_is_counted(tmp_path: Path) -> None:
    source = Holes(3, size=(64, 64))
    written = write_rlds(source, tmp_path)
    assert written.notes == {
        "steps without a valid action, written as no motion": 3,
        "gripper targets between open and closed, rounded": 3,
        "poses that are not valid, written as zeros": 3,
    }
    mine, was = reopened(tmp_path).signals(1), source.signals(1)
    assert not mine.actions[1, :6].any()
    assert mine.actions[1, 6] == mine.actions[0, 6] == 1  # held
    assert mine.proprio_valid.tolist() == was.proprio_valid.tolist()
    np.testing.assert_array_equal(mine.actions[2:, 6], was.actions[2:, 6])
    assert read_schema(written.place)["steps/observation/image"].shape == (64, 64, 3)


def test_rt1s_own_episodes_are_copied_whole(tmp_path: Path) -> None:
    place = write_fractal(tmp_path / "a", episodes=3, steps=4, shards=3)
    written = write_rlds(reopened(place), tmp_path / "b", per_shard=3)
    assert written.notes == {}
    before = [r for path in shard_files(place, "train") for r in read_records(path)]
    (shard,) = shard_files(written.place, "train")
    assert read_records(shard) == before


def test_bridge_keeps_its_robot_and_its_pictures(tmp_path: Path) -> None:
    if not BRIDGE_SAMPLE.is_dir():
        pytest.skip(f"no real Bridge episodes at {BRIDGE_SAMPLE}")
    original = open_source(str(BRIDGE_SAMPLE))
    with pytest.raises(UserError, match="is read as RT-1's robot, this is widowx"):
        write_rlds(original, tmp_path, name="fractal20220817_data")
    written = write_rlds(original, tmp_path)
    assert written.place.parent.name == "widowx_in_fractal_schema"
    assert written.notes == {"steps without a valid action, written as no motion": 25}
    source = reopened(tmp_path)
    assert source.embodiment == original.embodiment
    assert source.cameras == original.cameras[:1]
    for i in range(0, 25, 6):
        np.testing.assert_array_equal(source.frames(i, [3])[0], original.frames(i, [3])[0])
        was, mine = original.signals(i), source.signals(i)
        np.testing.assert_allclose(mine.actions[1:], was.actions[1:], atol=1e-6)
        np.testing.assert_allclose(mine.proprio, was.proprio, atol=1e-6)
    (written.place / "selfflow.json").write_text("{}")
    with pytest.raises(UserError, match=r"selfflow.json: not what selfflow wrote"):
        reopened(tmp_path)


def test_an_interrupted_writer_goes_on_behind_the_last_shard(tmp_path: Path) -> None:
    whole = write_rlds(Drawn(6), tmp_path / "whole", per_shard=2)
    source = Drawn(6)
    source.stop_at = 3  # within the second shard
    with pytest.raises(KeyboardInterrupt):
        write_rlds(source, tmp_path / "cut", per_shard=2)
    assert not (tmp_path / "cut/fractal20220817_data/0.1.0").exists()
    with pytest.raises(UserError, match="not recognised"):
        open_source(str(tmp_path / "cut"))
    (first,) = (tmp_path / "cut").rglob("fractal*00000-of-00003")
    written = first.stat().st_mtime_ns
    with pytest.raises(UserError, match=r"was begun with .*'shards': 3.*now .*'shards': 2"):
        write_rlds(Drawn(6), tmp_path / "cut", per_shard=3)
    source.stop_at = 6
    resumed = write_rlds(source, tmp_path / "cut", per_shard=2)
    assert resumed.notes == whole.notes
    for path in whole.place.iterdir():
        assert (resumed.place / path.name).read_bytes() == path.read_bytes()
    assert (resumed.place / first.name).stat().st_mtime_ns == written
    with pytest.raises(UserError, match="already there"):
        write_rlds(source, tmp_path / "cut")


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 episodes"):
        write_rlds(Drawn(0), tmp_path)
    with pytest.raises(UserError, match="letters, digits and _ only"):
        write_rlds(Drawn(), tmp_path, name="../mine")
    assert not list(tmp_path.iterdir())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_relative_commands_say_the_same_targets(steps: list[tuple[bool, bool]]) -> None:
    opening, valid = np.array(steps).T
    back = absolute_gripper(relative_gripper(opening, valid))
    np.testing.assert_array_equal(back[valid], opening[valid])


def test_jpegs_of_the_size_are_not_encoded_again(tmp_path: Path) -> None:
    place = write_fractal(tmp_path / "a", episodes=1, steps=2)
    original = reopened(place).encoded(0, [1])[0]
    copied = reopened(write_rlds(reopened(place), tmp_path / "b").place).encoded(0, [1])[0]
    assert original == copied
    assert decode_image(copied).shape == (256, 320, 3)
