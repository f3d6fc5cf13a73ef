"""RLDS data that nobody knew of: described in YAML, and written in the less usual ways."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from selfflow.datasets.episodes import DatasetSpec, Signals, no_signals
from selfflow.datasets.rlds import RldsSource
from selfflow.datasets.rlds_schema import Leaf, described
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import EMBODIMENTS, UserError
from selfflow.datasets.tfrecord import CorruptRecord, encode_example, write_records

BRIDGE_SAMPLE = Path(__file__).parents[2] / "shared/samples/octo_bridge_debug/bridge_dataset"


def test_a_dataset_described_in_yaml(tmp_path: Path) -> None:
    if not BRIDGE_SAMPLE.is_dir():
        pytest.skip(f"no real Bridge episodes at {BRIDGE_SAMPLE}")
    real = open_source(str(BRIDGE_SAMPLE))
    described_by = tmp_path / "mine.yaml"
    described_by.write_text(
        """
        embodiment: {name: mine, control_hz: 4.0}
        cameras: {side: steps/observation/image_1}
        instruction: steps/language_instruction
        action:
          position: steps/action[0:3]
          rotation: steps/action[3:6]
          rotation_as: rpy
          gripper: steps/action[6]
          open: 1.0
          closed: 0.0
        """
    )
    source = open_source(f"{BRIDGE_SAMPLE}::{described_by}")
    assert (len(source), source.embodiment.name, source.cameras) == (25, "mine", ("side",))
    assert source.metadata(0)["fps"] == 4.0
    np.testing.assert_array_equal(source.frames(4, [2])[0], real.frames(4, [2], "image_1")[0])
    mine, known = source.signals(4), real.signals(4)
    np.testing.assert_allclose(mine.actions[1:, :6], known.actions[1:, :6], atol=1e-6)
    assert mine.instruction == known.instruction


def keep(numbers: dict[str, np.ndarray], instruction: list[str]) -> Signals:
    """The numbers as if they were actions."""
    actions = numbers["steps/joints"][:, :7].astype(np.float32)
    return replace(
        no_signals(instruction), actions=actions, action_valid=np.ones(len(actions), bool)
    )


def test_other_ways_of_writing_texts_and_numbers(tmp_path: Path) -> None:
    """Text as rows of bytes (Language-Table) or one an episode, arrays as packed bytes."""
    values = np.arange(24, dtype=np.float32).reshape(3, 8)
    rows = np.zeros((3, 6), np.int64)
    rows[:, :4] = list(b"push")
    record = {
        "about/task": [b"lift"],
        "about/success": np.array([1]),
        "steps/text": rows.ravel(),
        "steps/joints": [zlib.compress(row.tobytes()) for row in values],
        "steps/image": [simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))] * 3,
        "steps/raw": [row.tobytes() for row in values],
    }
    write_records(tmp_path / "other-train.tfrecord-00000-of-00001", [encode_example(record)])
    schema = {
        "about/task": Leaf("text"),
        "about/success": Leaf("bool"),
        "steps/text": Leaf("int32", (6,)),
        "steps/joints": Leaf("float32", (8,), "zlib"),
        "steps/image": Leaf("image", (8, 8, 3), "jpeg"),
        "steps/raw": Leaf("float32", (2, 4), "bytes"),
    }
    (tmp_path / "features.json").write_text(json.dumps(described(schema)))
    spec = DatasetSpec(
        EMBODIMENTS["widowx"], {"a": "steps/image"}, "steps/text", {"steps/joints": 0}, keep
    )
    source = RldsSource(tmp_path, spec)
    assert source.schema == schema
    assert source.measures == ("steps/joints", "steps/raw", "steps/text")
    np.testing.assert_array_equal(source.signals(0).actions, values[:, :7])
    assert source.signals(0).instruction == ["push"] * 3
    np.testing.assert_array_equal(source.measured(0, "steps/raw"), values.reshape(3, 2, 4))
    assert source.measured(0, "steps/image") is None
    about = source.metadata(0)
    assert (about["about/task"], about["about/success"]) == ("lift", True)
    one_text = RldsSource(tmp_path, replace(spec, instruction="about/task"))
    assert one_text.signals(0).instruction == ["lift"] * 3
    none = RldsSource(tmp_path, replace(spec, instruction=None, text="go"))
    assert none.signals(0).instruction == ["go"] * 3
    with pytest.raises(CorruptRecord, match=r"steps/joints has 24 values, expected 21"):
        RldsSource(tmp_path, replace(spec, numbers={"steps/joints": 7})).signals(0)
    with pytest.raises(UserError, match="names no camera"):
        RldsSource(tmp_path, replace(spec, cameras={}))
