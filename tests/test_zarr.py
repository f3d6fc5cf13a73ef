"""zarr replay buffers of both formats, as folders and as zip files."""

import json
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from selfflow.datasets.episodes import DatasetSpec, EpisodeSource, Measures, Signals
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import EMBODIMENTS, UserError
from selfflow.datasets.zarr_buffer import ReplayBuffer, recognised

zarr = pytest.importorskip("zarr")

ENDS = [4, 9, 16]
FORK = multiprocessing.get_context("fork")


def convert(numbers: dict[str, np.ndarray], instruction: list[str]) -> Signals:
    t = len(instruction)
    return Signals(
        proprio=np.zeros((t, 8), np.float32),
        proprio_valid=np.zeros(t, bool),
        actions=np.pad(numbers["action"], ((0, 0), (0, 5))).astype(np.float32),
        action_valid=np.ones(t, bool),
        terminate=np.zeros(t, bool),
        instruction=instruction,
    )


SPEC = DatasetSpec(
    embodiment=EMBODIMENTS["widowx"],
    cameras={"front": "img", "wrist": "none"},
    instruction=None,
    numbers={"action": 2},
    convert=convert,
    text="push it",
)

UMI = """
embodiment: {name: umi, control_hz: 60.0}
cameras: {wrist: camera0_rgb}
text: fold the cloth
state:
  position: robot0_eef_pos
  rotation: robot0_eef_rot_axis_angle
  rotation_as: rotvec
  gripper: robot0_gripper_width
  open: 0.08
  closed: 0.0
action: {kind: reached}
"""


def buffer(
    path: Path, version: int = 2, dtype: str = "uint8"
) -> tuple[Path, np.ndarray, np.ndarray]:
    """16 steps, images in chunks of 3, so that chunks cross episodes."""
    zipped = path.suffix == ".zip"
    store = zarr.storage.ZipStore(path, mode="w") if zipped else zarr.storage.LocalStore(path)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 6, 8, 3)).astype(dtype)
    actions = rng.normal(size=(16, 2)).astype(np.float32)
    root = zarr.create_group(store, zarr_format=version, attributes={"task": "push"})
    data, meta = root.create_group("data"), root.create_group("meta")
    for group, key, values, chunk in (
        (data, "img", images, (3, 6, 8, 3)),
        (data, "action", actions, (5, 2)),
        (meta, "episode_ends", np.array(ENDS), (3,)),
    ):
        array = group.create_array(key, shape=values.shape, dtype=values.dtype, chunks=chunk)
        array[:] = values
    store.close()
    return path, images, actions


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", ["b.zarr", "b.zarr.zip"])
def test_episodes_of_both_formats(tmp_path: Path, version: int, name: str) -> None:
    path, images, actions = buffer(tmp_path / name, version)
    assert recognised(path)
    source = ReplayBuffer(path, SPEC)
    assert isinstance(source, EpisodeSource)
    assert isinstance(source, Measures)
    assert [source.length(i) for i in range(len(source))] == [4, 5, 7]
    assert (source.cameras, source.measures) == (("front",), ("action",))
    np.testing.assert_array_equal(np.stack(source.frames(1, [4, 0, 4])), images[[8, 4, 8]])
    found = source.signals(2)
    np.testing.assert_array_equal(found.actions[:, :2], actions[9:])
    assert found.instruction == ["push it"] * 7
    np.testing.assert_array_equal(source.measured(0, "action"), actions[:4])
    assert source.measured(0, "img") is None
    assert source.metadata(2) == {"episode": 2, "file": name}


def test_a_umi_buffer_by_its_description(tmp_path: Path) -> None:
    """UMI records no actions: what the tool reached is what it was to do."""
    path, rng = tmp_path / "umi.zarr.zip", np.random.default_rng(3)
    position = rng.normal(size=(10, 3)).astype(np.float32)
    store = zarr.storage.ZipStore(path, mode="w")
    root = zarr.create_group(store, zarr_format=2)
    for key, values in (
        ("data/camera0_rgb", rng.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)),
        ("data/robot0_eef_pos", position),
        ("data/robot0_eef_rot_axis_angle", rng.normal(size=(10, 3)).astype(np.float32)),
        ("data/robot0_gripper_width", np.linspace(0, 0.08, 10, dtype=np.float32)[:, None]),
        ("meta/episode_ends", np.array([6, 10])),
    ):
        array = root.create_array(key, shape=values.shape, dtype=values.dtype)
        array[:] = values
    store.close()
    spec = tmp_path / "umi.yaml"
    spec.write_text(UMI)
    source = open_source(f"{path}::{spec}")
    found = source.signals(1)
    assert found.action_valid.tolist() == [True, True, True, False]
    np.testing.assert_allclose(found.actions[:3, :3], np.diff(position[6:], axis=0), atol=1e-6)
    np.testing.assert_allclose(found.proprio[:, 7], np.arange(6, 10) / 9, atol=1e-6)
    assert found.instruction[0] == "fold the cloth"
    assert source.frames(1, [3])[0].shape == (8, 8, 3)


def test_float_frames_become_bytes(tmp_path: Path) -> None:
    path, images, _ = buffer(tmp_path / "b.zarr", dtype="float32")
    (frame,) = ReplayBuffer(path, SPEC).frames(0, [2])
    assert frame.dtype == np.uint8
    np.testing.assert_array_equal(frame, images[2])


def test_only_the_chunks_asked_for_are_read(tmp_path: Path) -> None:
    path, images, _ = buffer(tmp_path / "b.zarr")
    source = ReplayBuffer(path, SPEC)
    for chunk in (path / "data/img").glob("[1-9].0.0.0"):
        chunk.write_bytes(b"damaged")
    np.testing.assert_array_equal(np.stack(source.frames(0, [0, 2])), images[[0, 2]])


def test_damaged_and_unknown_data_are_named(tmp_path: Path) -> None:
    path, *_ = buffer(tmp_path / "b.zarr")
    (path / "data/img/1.0.0.0").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"b\.zarr: data/img is damaged"):
        ReplayBuffer(path, SPEC).frames(0, [3])
    about = path / "data/img/.zarray"
    coded = {"compressor": {"id": "imagecodecs_jpegxl"}}
    about.write_text(json.dumps(json.loads(about.read_text()) | coded))
    with pytest.raises(UserError, match=r"jpegxl.* pip install imagecodecs"):
        ReplayBuffer(path, SPEC)


def test_errors_name_the_buffer_and_the_key(tmp_path: Path) -> None:
    path, *_ = buffer(tmp_path / "b.zarr")
    texts = replace(SPEC, instruction="task")
    assert ReplayBuffer(path, texts).signals(0).instruction == ["push"] * 4
    for spec, message in (
        (replace(SPEC, numbers={"state": 5}), "no data/state; data/ has action, img"),
        (replace(SPEC, numbers={"action": 3}), "2 values a step, expected 3"),
        (replace(SPEC, instruction="words"), "no attribute 'words'"),
    ):
        with pytest.raises(UserError, match=message):
            ReplayBuffer(path, spec).signals(0)
    with pytest.raises(UserError, match="no camera of the spec; data/ has action, img"):
        ReplayBuffer(path, replace(SPEC, cameras={"x": "x"}))
    with pytest.raises(UserError, match=r"needs a spec .*img \(6x8x3 uint8\)"):
        ReplayBuffer(path)
    zarr.open_group(str(path), mode="a")["meta/episode_ends"][:] = [4, 9, 20]
    with pytest.raises(UserError, match="says 20 steps, action, img has fewer"):
        ReplayBuffer(path, SPEC)
    zarr.open_group(str(path), mode="a")["meta/episode_ends"][:] = [4, 3, 16]
    with pytest.raises(UserError, match="does not rise"):
        ReplayBuffer(path, SPEC)
    assert not recognised(tmp_path)
    with pytest.raises(UserError, match="no replay buffer"):
        ReplayBuffer(tmp_path, SPEC)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # of Python 3.12
def test_another_process_opens_its_own(tmp_path: Path) -> None:
    """What a loader's worker gets is a pickle, or a fork of this process."""
    path, images, _ = buffer(tmp_path / "b.zarr.zip")
    source = ReplayBuffer(path, SPEC)
    source.frames(0, [0])
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.frames(2, [6])[0], images[15])
    queue = FORK.Queue()
    child = FORK.Process(target=lambda: queue.put(source.frames(2, [6])[0]))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), images[15])
    child.join()


def test_threads_share_one_buffer(tmp_path: Path) -> None:
    path, images, _ = buffer(tmp_path / "b.zarr.zip")
    source = ReplayBuffer(path, SPEC)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(source.frames, 2, range(7)) for _ in range(12)]
    for job in jobs:
        np.testing.assert_array_equal(np.stack(job.result()), images[9:])
