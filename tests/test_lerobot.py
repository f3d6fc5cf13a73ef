"""LeRobot datasets: written and read again, v2.1 by a spec, exact frames, incomplete downloads."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import simplejpeg

from selfflow.datasets import fractal, lerobot_video, lerobot_writer
from selfflow.datasets.episodes import EpisodeSource, Measures, Signals
from selfflow.datasets.lerobot import LeRobotSource
from selfflow.datasets.lerobot_stats import Pixels
from selfflow.datasets.lerobot_writer import write_lerobot
from selfflow.datasets.rotations import canonical
from selfflow.datasets.source import open_source, open_sources
from selfflow.datasets.spec import Embodiment, UserError

ROBOT = Embodiment("my_robot", 12.5, ("front", "wrist"), "tool", (0.5,) * 7)
SIGNALS = ("proprio", "proprio_valid", "actions", "action_valid", "terminate")
LENGTHS = (9, 14, 5)


class Smooth:
    """Episodes of a gradient that moves, in which the instruction changes half way."""

    name, embodiment, cameras, skipped = "smooth", ROBOT, ROBOT.cameras, 0

    def __init__(
        self, lengths: tuple[int, ...] = LENGTHS, size: tuple[int, int] = (64, 96)
    ) -> None:
        self.lengths, self.size = lengths, size

    def __len__(self) -> int:
        return len(self.lengths)

    def length(self, i: int) -> int:
        return self.lengths[i]

    def frames(self, i: int, steps: Any, camera: str | None = None) -> list[np.ndarray]:
        y, x = np.mgrid[0 : self.size[0], 0 : self.size[1]] / 40
        turn = np.pi * (camera == "wrist")
        waves = [[np.sin(x + turn + step / 3), np.cos(y + i), np.sin(x + y)] for step in steps]
        return [np.stack([127 + 100 * c for c in w], axis=-1).astype(np.uint8) for w in waves]

    def signals(self, i: int) -> Signals:
        t, rng = self.lengths[i], np.random.default_rng(i)
        valid = np.arange(t) < t - 1
        proprio = rng.normal(size=(t, 8))
        proprio[:, 3:7] = canonical(proprio[:, 3:7])
        return Signals(
            proprio=proprio.astype(np.float32),
            proprio_valid=np.ones(t, bool),
            actions=(rng.normal(size=(t, 7)) * valid[:, None]).astype(np.float32),
            action_valid=valid,
            terminate=~valid,
            instruction=["open"] * (t // 2) + [f"place {i}"] * (t - t // 2),
        )

    def metadata(self, i: int) -> dict:
        return {"seed": 100 + i, "success": i != 1, "episode": 7 * i}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lerobot") / "smooth"
    write_lerobot(Smooth(), folder)
    return folder


def same(source: EpisodeSource, found: EpisodeSource, least: float) -> None:
    assert (len(found), found.cameras) == (len(source), source.cameras)
    assert found.embodiment == source.embodiment
    for i in range(len(source)):
        assert found.length(i) == source.length(i)
        wanted, got = source.signals(i), found.signals(i)
        for name in SIGNALS:
            np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), name)
        assert got.instruction == wanted.instruction
        assert source.metadata(i).items() <= found.metadata(i).items()
        for camera in source.cameras:
            steps = [source.length(i) - 1, 0, 3]
            pairs = zip(
                found.frames(i, steps, camera), source.frames(i, steps, camera), strict=True
            )
            assert min(psnr(*pair) for pair in pairs) > least


def test_what_is_written_is_read_again(written: Path) -> None:
    found = open_source(str(written))
    assert isinstance(found, LeRobotSource)
    assert isinstance(found, EpisodeSource)
    assert isinstance(found, Measures)
    same(Smooth(), found, least=36)
    assert found.metadata(1)["fps"] == 12.5
    assert found.measured(0, "action").shape == (9, 7)
    assert found.measured(0, "no such") is None
    with pytest.raises(UserError, match="front, wrist"):
        found.frames(0, [0], "left")


def test_av1_many_files_and_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot_video, "VIDEO_MB", -1)
    monkeypatch.setattr(lerobot_writer, "DATA_MB", 0)
    monkeypatch.setattr(lerobot_writer, "FLUSH", 1)
    monkeypatch.setattr(Smooth, "cameras", ("wrist",))
    write_lerobot(Smooth(), tmp_path / "av1", codec="av1", cameras=["wrist"])
    assert len(list((tmp_path / "av1").rglob("*.mp4"))) == 3
    assert len(list((tmp_path / "av1").rglob("data/*/*.parquet"))) == 3
    same(Smooth(), LeRobotSource(tmp_path / "av1"), least=30)
    write_lerobot(Smooth(size=(33, 35)), tmp_path / "odd", episodes=[2, 0], crf=10)
    odd = LeRobotSource(tmp_path / "odd")
    assert [odd.metadata(i)["seed"] for i in range(2)] == [102, 100]
    assert psnr(odd.frames(1, [8])[0], Smooth(size=(33, 35)).frames(0, [8], "wrist")[0]) > 36


def test_the_files_are_as_lerobot_has_them(written: Path) -> None:
    info = json.loads((written / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 28, 4)
    assert (info["fps"], info["robot_type"], info["splits"]) == (12.5, "my_robot", {"train": "0:3"})
    assert info["features"]["observation.images.front"]["shape"] == [64, 96, 3]
    assert info["features"]["action"]["names"][-1] == "gripper_open"
    stats = json.loads((written / "meta/stats.json").read_text())
    rows = np.concatenate([Smooth().signals(i).actions for i in range(3)]).astype(np.float64)
    for name, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        np.testing.assert_allclose(stats["action"][name], np.quantile(rows, q, axis=0))
    np.testing.assert_allclose(stats["action"]["std"], rows.std(axis=0))
    assert np.shape(stats["observation.images.front"]["mean"]) == (3, 1, 1)
    assert set(stats) == set(info["features"])
    tasks = pyarrow.parquet.read_table(written / "meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    episodes = pyarrow.parquet.read_table(written / "meta/episodes/chunk-000/file-000.parquet")
    first = episodes.to_pylist()[1]
    assert (first["dataset_from_index"], first["dataset_to_index"]) == (9, 23)
    assert first["videos/observation.images.front/from_timestamp"] == pytest.approx(9 / 12.5)
    assert first["tasks"] == ["open", "place 1"]
    data = pyarrow.parquet.ParquetFile(written / "data/chunk-000/file-000.parquet")
    assert data.num_row_groups == 3  # one an episode
    assert data.read().column("index").to_pylist() == list(range(28))


def test_statistics_of_pixels() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 40, 60, 3), dtype=np.uint8)
    seen, other = Pixels(), Pixels()
    for frame in frames:
        (seen if frame[0, 0, 0] % 2 else other).add(frame)
    seen.merge(other)
    found, values = seen.statistics(), frames.reshape(-1, 3) / 255
    np.testing.assert_allclose(np.ravel(found["mean"]), values.mean(axis=0))
    np.testing.assert_allclose(np.ravel(found["std"]), values.std(axis=0))
    np.testing.assert_allclose(np.ravel(found["q90"]), np.quantile(values, 0.9, 0), atol=1 / 255)
    assert found["count"] == [5]


def test_nothing_stays_of_what_was_not_written(tmp_path: Path) -> None:
    class Breaking(Smooth):
        def frames(self, i: int, steps: Any, camera: str | None = None) -> list[np.ndarray]:
            if i == 1:
                raise KeyboardInterrupt
            return super().frames(i, steps, camera)

    with pytest.raises(KeyboardInterrupt):
        write_lerobot(Breaking(), tmp_path / "out")
    with pytest.raises(UserError, match="no episode"):
        write_lerobot(Smooth(()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.partial/old").mkdir(parents=True)  # of a killed process
    write_lerobot(Smooth((3,)), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="out: exists"):
        write_lerobot(Smooth(), tmp_path / "out")
    with pytest.raises(UserError, match="codec=vp9: choose one of h264, av1"):
        write_lerobot(Smooth(), tmp_path / "new", codec="vp9")
    with pytest.raises(UserError, match="odd size"):
        write_lerobot(Smooth(size=(33, 35)), tmp_path / "new", codec="av1")


def test_downloads_that_are_not_complete(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(written, folder)
    video = next(folder.glob("videos/*front/*/*.mp4"))
    whole = video.read_bytes()
    video.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    found = LeRobotSource(folder)
    assert (len(found), found.skipped) == (0, 3)
    video.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"file-000\.mp4: not a video that can be decoded"):
        LeRobotSource(folder).frames(0, [0])
    data = next(folder.glob("data/*/*.parquet"))
    data.write_bytes(data.read_bytes()[:-9])  # never finalised
    with pytest.raises(UserError, match=r"file-000\.parquet: not a whole parquet file"):
        LeRobotSource(folder).signals(0)
    table = folder / "meta/episodes/chunk-000/file-000.parquet"
    whole = table.read_bytes()
    table.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"file-000\.parquet: not a whole parquet file"):
        LeRobotSource(folder)
    table.write_bytes(whole)
    (folder / "meta/tasks.parquet").unlink()
    with pytest.raises(UserError, match=r"tasks\.parquet: not a whole parquet file"):
        LeRobotSource(folder)


def mp4(path: Path, frames: list[np.ndarray], fps: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def numbered(number: int) -> np.ndarray:
    """A frame that shows its number in eight stripes."""
    bits = (number >> np.arange(8)) & 1
    return (
        np.repeat(20 + 215 * bits, 16)[:, None, None].repeat(128, 1).repeat(3, 2).astype(np.uint8)
    )


def test_threads_have_their_own_decoders(written: Path) -> None:
    found = LeRobotSource(written)
    wanted = [found.frames(i % 3, [0, 4]) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: found.frames(i % 3, [0, 4]), range(24)))
    np.testing.assert_array_equal(got, wanted)


TASKS = ["close middle drawer", "pick apple from white bowl"]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """RT-1's data in LeRobot's v2.1 (features of IPEC-COMMUNITY's), made up; pictures too."""
    folder, rng = tmp_path / "old", np.random.default_rng(0)
    motors = [{"dtype": "float32", "shape": [n], "names": {"motors": []}} for n in (8, 7)]
    image = {"dtype": "video", "shape": [128, 128, 3], "info": {"video.is_depth_map": False}}
    features = {
        "observation.images.image": image,
        "observation.images.depth": image | {"info": {"video.is_depth_map": True}},
        "observation.images.still": image | {"dtype": "image"},
        "observation.state": motors[0],
        "action": motors[1],
        "task_index": {"dtype": "int64", "shape": [1], "names": None},
    }
    info = {
        "codebase_version": "v2.1",
        "robot_type": "google_robot",
        "fps": 3,
        "chunks_size": 2,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/ep_{episode_index:06d}.mp4",
        "features": features,
    }
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
    episodes = [{"episode_index": i, "tasks": [TASKS[i % 2]], "length": 6 + i} for i in range(3)]
    for name, lines in (("tasks", tasks), ("episodes", episodes)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"meta/{name}.jsonl").write_text(text)
    for i in range(3):
        n, place = 6 + i, f"chunk-{i // 2:03d}"
        frames = [numbered(16 * i + t) for t in range(n)]
        video = folder / f"videos/{place}/observation.images.image/ep_{i:06d}.mp4"
        mp4(video, frames, 3)
        state = rng.normal(size=(n, 8)).astype(np.float32)
        state[:, 3:7] /= np.linalg.norm(state[:, 3:7], axis=1, keepdims=True)
        stills = [{"bytes": simplejpeg.encode_jpeg(f, quality=95), "path": ""} for f in frames]
        columns = {
            "observation.state": state.tolist(),
            "action": rng.uniform(size=(n, 7)).astype(np.float32).tolist(),
            "observation.images.still": stills,
            "task_index": [i % 2] * n,
            "episode_index": [i] * n,
        }
        path = folder / f"data/{place}/episode_{i:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=4)
    return folder


def test_version_2_by_a_spec_says_what_rlds_says(old: Path) -> None:
    found = open_source(f"{old}::fractal_lerobot")
    assert isinstance(found, LeRobotSource)
    assert [found.length(i) for i in range(len(found))] == [6, 7, 8]
    assert found.metadata(2) == {"task": TASKS[0], "episode": 2, "fps": 3.0}
    assert psnr(found.frames(2, [5])[0], numbered(37)) > 25
    got, state = found.signals(1), found.measured(1, "observation.state")
    action = found.measured(1, "action")
    done = np.zeros((7, 3))
    done[-1, 0] = 1
    numbers = {
        fractal.MOVE: action[:, :3],
        fractal.TURN: action[:, 3:6],
        fractal.CLOSE: np.zeros((7, 1)),
        fractal.POSE: state[:, :7],
        fractal.CLOSED: state[:, 7:],
        fractal.TERMINATE: done,
    }
    wanted = fractal.convert(numbers, [TASKS[1]] * 7)
    for name in SIGNALS:
        a, b = getattr(got, name), getattr(wanted, name)
        n = 6 if name == "actions" else None  # the gripper's action is absolute here
        np.testing.assert_allclose(a[..., :n] if n else a, b[..., :n] if n else b, atol=1e-6)
    np.testing.assert_allclose(got.actions[:, 6], action[:, 6], atol=1e-6)
    assert got.instruction == wanted.instruction


def test_pictures_in_parquet_and_joint_data(old: Path, tmp_path: Path) -> None:
    spec = tmp_path / "robot.yaml"
    robot = "embodiment: {name: arm, control_hz: 3.0}\n"
    spec.write_text(robot + "cameras: {still: observation.images.still}\ninstruction: task\n")
    (found, other), weights = open_sources([f"{old}::{spec}@0.25", f"{old}::{spec}"])
    assert weights == [0.25, 1.0]
    assert (len(other), found.embodiment.name) == (3, "arm")
    for step, frame in zip((6, 0, 4), found.frames(1, [6, 0, 4]), strict=True):
        assert psnr(frame, numbered(16 + step)) > 30
    assert not found.signals(1).action_valid.any()
    assert found.signals(1).instruction == [TASKS[1]] * 7
    assert found.measures == ("observation.state", "action")
    shutil.rmtree(old / "data/chunk-000")
    rest = open_source(f"{old}::{spec}")
    assert (len(rest), rest.skipped, rest.length(0)) == (1, 2, 8)


def test_what_the_data_do_not_say(old: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"observation\.images\.image \(camera 128×128×3\)"
    ) as found:
        open_source(str(old))
    assert "depth" not in str(found.value)
    assert "my_robot.yaml" in str(found.value)
    text = "embodiment: widowx\ncameras: {a: front}\ntext: go\n"
    (tmp_path / "a.yaml").write_text(text + "state: {position: observation.state.eef}")
    with pytest.raises(UserError, match=r"front, observation\.state\.eef is not there; it has"):
        open_source(f"{old}::{tmp_path / 'a.yaml'}")
    info = json.loads((old / "meta/info.json").read_text())
    (old / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v1.6"}))
    with pytest.raises(UserError, match=r"LeRobot format v1\.6; v3\.0"):
        open_source(str(old))
    (old / "meta/info.json").write_text("{}")
    with pytest.raises(UserError, match=r"info\.json: not a LeRobot dataset's"):
        open_source(str(old))


def test_the_hub(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, repo_type: str) -> str:
        if name != "me/smooth":
            raise FileNotFoundError("no network\nsecond line")
        assert repo_type == "dataset"
        return str(written)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (found,), weights = open_sources(["hf://me/smooth@2"])
    assert (len(found), weights) == (3, [2.0])
    assert open_source("hf://me/smooth?camera:wrist").cameras[0] == "wrist"
    with pytest.raises(UserError, match=r"hf://me/none: cannot be downloaded \(no network\)$"):
        open_source("hf://me/none")
    with pytest.raises(UserError, match="give hf://owner/name"):
        open_source("hf://smooth")
