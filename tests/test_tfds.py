"""Our reader and writer of RLDS against TFDS itself, in a Python that has TensorFlow.

The one that runs the tests, with the extra `rlds`, or SELFFLOW_TFDS_PYTHON. TFDS runs in a process
of its own: TensorFlow takes 1.3 GB and 7 s to import.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from selfflow.datasets.episodes import DatasetSpec, EpisodeSource, no_signals
from selfflow.datasets.fractal import FRACTAL, SCHEMA
from selfflow.datasets.rlds import RldsSource
from selfflow.datasets.rlds_schema import TEXT, Leaf, described, image
from selfflow.datasets.rlds_writer import write_rlds
from selfflow.datasets.source import open_source
from selfflow.datasets.synthetic import write_fractal

pytestmark = pytest.mark.slow
SIDE = Path(__file__).with_name("tfds_side.py")
DATASETS = ("bridge", "written by TFDS", "made up", "of Bridge", "of a store")
OTHER = described(
    {
        "about/task": TEXT,
        "about/weight": Leaf("float32"),
        "steps/joints": Leaf("float32", (3, 8), "zlib"),
        "steps/raw": Leaf("uint16", (4,), "bytes"),
        "steps/words": Leaf("int32", (5,)),
        "steps/png": Leaf("image", (16, 24, 3), "png"),
        "steps/jpeg": image(24, 16),
    }
)
OTHER_SPEC = DatasetSpec(
    embodiment=FRACTAL.embodiment,
    cameras={"sharp": "steps/png", "blurred": "steps/jpeg"},
    instruction="about/task",
    numbers={},
    convert=lambda numbers, instruction: no_signals(instruction),
)
SAMPLES = Path(__file__).parents[2] / "shared/samples"


def python() -> str:
    """The interpreter that has TFDS and TensorFlow."""
    if other := os.environ.get("SELFFLOW_TFDS_PYTHON"):
        return other
    if all(map(importlib.util.find_spec, ("tensorflow", "tensorflow_datasets"))):
        return sys.executable
    return pytest.skip(
        "no TensorFlow: pip install 'selfflow[rlds]', or set SELFFLOW_TFDS_PYTHON to a Python "
        "that has it; reading and writing RLDS is not compared with TFDS"
    )


@dataclass(frozen=True)
class Sides:
    """A dataset as both read it, and what it was written from, if we wrote it."""

    ours: RldsSource
    theirs: dict[str, np.ndarray]  # by "episode key"
    original: EpisodeSource | None = None


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory, store: Path) -> dict[str, Sides]:
    """All datasets, read by TFDS in one process."""
    if not SAMPLES.is_dir():
        pytest.skip(f"no samples at {SAMPLES}")
    interpreter, place = python(), tmp_path_factory.mktemp("tfds")
    bridge, recorded = open_source(str(SAMPLES / "octo_bridge_debug")), open_source(str(store))
    published = (SAMPLES / "fractal_schema/features.regenerated.json").read_text()
    for name, text in {"Fractal20220817Data": published, "Other": json.dumps(OTHER)}.items():
        (place / name).mkdir()
        (place / name / "features.json").write_text(text)
    folders = {
        "bridge": SAMPLES / "octo_bridge_debug/bridge_dataset/1.0.0",
        "written by TFDS": place / "theirs/fractal20220817_data/0.1.0",
        "other": place / "theirs/other/0.1.0",
        "made up": write_fractal(place / "made_up", episodes=3, steps=6, shards=2),
        "of Bridge": write_rlds(bridge, place / "of_bridge", per_shard=10).place,
        "of a store": write_rlds(recorded, place / "of_store").place,
    }
    arguments = []
    for name in ("Fractal20220817Data", "Other"):
        arguments += ["write", str(place / "theirs"), str(place / name)]
    for name, folder in folders.items():
        arguments += ["dump", str(folder), str(place / f"{name}.npz")]
    done = subprocess.run([interpreter, str(SIDE), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    originals = {"of Bridge": bridge, "of a store": recorded}
    found = {}
    for name, folder in folders.items():
        ours = open_source(str(folder), OTHER_SPEC if name == "other" else None)
        assert isinstance(ours, RldsSource)
        with np.load(place / f"{name}.npz") as theirs:
            found[name] = Sides(ours, dict(theirs), originals.get(name))
    return found


@pytest.mark.parametrize("name", [*DATASETS, "other"])
def test_every_feature_is_equal_to_the_bit(sides: dict[str, Sides], name: str) -> None:
    ours, theirs = sides[name].ours, sides[name].theirs
    keys = {key.partition(" ")[2] for key in theirs}
    assert keys == ours.schema.keys()
    assert len(theirs) == len(ours) * len(keys)
    for i in range(len(ours)):
        about, signals = ours.metadata(i), ours.signals(i)
        texts = {ours.spec.instruction: signals.instruction}
        pictures = {
            ours.spec.cameras[c]: ours.frames(i, range(ours.length(i)), c) for c in ours.cameras
        }
        for key in keys:
            value = theirs[f"{i} {key}"]
            mine = about.get(key, texts.get(key, pictures.get(key, ours.measured(i, key))))
            np.testing.assert_array_equal(np.asarray(mine), value, err_msg=f"{i} {key}")
            if key.startswith("steps/") and key not in texts:
                assert np.asarray(mine).dtype == value.dtype, key


@pytest.mark.parametrize("name", DATASETS)
def test_actions_are_equal_to_the_bit(sides: dict[str, Sides], name: str) -> None:
    ours, theirs = sides[name].ours, sides[name].theirs
    spec = ours.spec
    for i in range(len(ours)):
        raw = {
            k: theirs[f"{i} {k}"].astype(float).reshape(ours.length(i), -1) for k in spec.numbers
        }
        expected = spec.convert(raw, list(theirs[f"{i} {spec.instruction}"]))
        for field in ("actions", "proprio", "terminate", "action_valid"):
            mine = getattr(ours.signals(i), field)
            np.testing.assert_array_equal(mine, getattr(expected, field))


@pytest.mark.parametrize("name", ["of Bridge", "of a store"])
def test_what_we_wrote_is_what_it_was_written_from(sides: dict[str, Sides], name: str) -> None:
    ours, original = sides[name].ours, sides[name].original
    assert original is not None
    assert len(ours) == len(original)
    for i in range(len(ours)):
        mine, was = ours.signals(i), original.signals(i)
        valid = was.action_valid
        np.testing.assert_allclose(mine.actions[valid, :6], was.actions[valid, :6], atol=1e-6)
        np.testing.assert_array_equal(mine.actions[valid, 6], was.actions[valid, 6] >= 0.5)
        assert mine.instruction == was.instruction
        np.testing.assert_array_equal(mine.terminate, was.terminate)


def test_tfds_wrote_two_shards_in_the_published_schema(sides: dict[str, Sides]) -> None:
    ours = sides["written by TFDS"].ours
    assert sorted(map(ours.length, range(len(ours)))) == [1, 4, 5, 9]
    assert ours.schema == SCHEMA
    assert ours.spec is FRACTAL
