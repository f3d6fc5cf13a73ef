"""Converting: everything comes back equal, whatever stops it, and damage is named."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from selfflow.configs.entry import compose
from selfflow.datasets import cache_writer, checksums
from selfflow.datasets.cache_writer import partition
from selfflow.datasets.checksums import verify
from selfflow.datasets.convert import ConvertConfig, check, convert
from selfflow.datasets.episodes import EpisodeSource, Measures, Signals
from selfflow.datasets.lerobot_writer import write_lerobot
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import Embodiment, UserError
from selfflow.datasets.store import EpisodeStore, StoreHeader, StoreWriter
from selfflow.datasets.synthetic import write_fractal
from selfflow.datasets.windows import resize

SCRIPT = Path(__file__).parents[1] / "datasets/convert.py"
BRIDGE = Path(__file__).parents[2] / "shared/samples/octo_bridge_debug/bridge_dataset"
ROBOT = Embodiment("my_robot", 12.5, ("front", "wrist"), "tool", (0.5,) * 7)
SIGNALS = ("proprio", "proprio_valid", "actions", "action_valid", "terminate")
YAML = """
embodiment: {name: my_arm, control_hz: 10.0}
cameras: {front: images}
text: lift the cube
state: {position: "state[0:3]", gripper: "state[3]", open: 1.0, closed: 0.0}
action: {kind: delta, position: "action[0:3]", gripper: "action[3]", open: 1.0, closed: 0.0}
"""


class Smooth:
    """Three episodes of a gradient that moves, seen by two cameras, with steps not valid."""

    name, embodiment, cameras, skipped = "smooth", ROBOT, ROBOT.cameras, 0
    measures = ("force",)

    def __len__(self) -> int:
        return 3

    def length(self, i: int) -> int:
        return (9, 14, 5)[i]

    def frames(self, i: int, steps: Sequence[int], camera: str | None = None) -> list[np.ndarray]:
        y, x = np.mgrid[0:48, 0:64] / 40
        turn = np.pi * (camera == "wrist")
        waves = [[np.sin(x + turn + step / 3), np.cos(y + i), np.sin(x + y)] for step in steps]
        return [np.stack([127 + 100 * c for c in w], axis=-1).astype(np.uint8) for w in waves]

    def signals(self, i: int) -> Signals:
        t, rng = self.length(i), np.random.default_rng(i)
        valid = np.arange(t) % 4 < 3
        proprio = rng.normal(size=(t, 8)) * valid[:, None]
        return Signals(
            proprio=proprio.astype(np.float32),
            proprio_valid=valid,
            actions=(rng.normal(size=(t, 7)) * ~valid[:, None]).astype(np.float32),
            action_valid=~valid,
            terminate=np.arange(t) == 3,
            instruction=["open"] * 3 + [f"place {i}"] * (t - 3),
        )

    def metadata(self, i: int) -> dict:
        return {"episode": 7 * i, "note": "ä", "success": i != 1}

    def measured(self, i: int, key: str) -> np.ndarray:
        return np.arange(2 * self.length(i)).reshape(-1, 2) + i


def hdf5(folder: Path) -> str:
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    (folder / "arm.yaml").write_text(YAML)
    with h5py.File(folder / "arm.hdf5", "w") as file:
        for i, t in enumerate((6, 9)):
            demo = file.create_group(f"data/demo_{i}")
            demo["state"], demo["action"] = rng.uniform(size=(t, 4)), rng.uniform(size=(t, 4))
            demo["images"] = np.stack(Smooth().frames(i, range(t)))
    return f"{folder / 'arm.hdf5'}::{folder / 'arm.yaml'}"


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory, store: Path) -> dict[str, str]:
    """Entries of data, by format."""
    folder = tmp_path_factory.mktemp("sources")
    write_lerobot(Smooth(), folder / "smooth")
    fractal = write_fractal(folder, episodes=3, steps=6)
    found = {"store": store, "lerobot": folder / "smooth", "fractal": fractal}
    return {k: str(v) for k, v in found.items()} | {"hdf5": hdf5(folder)}


@pytest.fixture
def bridge() -> str:
    if not BRIDGE.is_dir():
        pytest.skip(f"no real Bridge episodes at {BRIDGE}: converting them is not tested")
    return str(BRIDGE)


def config(source: str, out: Path, **changes: object) -> ConvertConfig:
    return replace(ConvertConfig(str(out), source), **changes)


def same_signals(a: Signals, b: Signals, tolerance: float = 0.0) -> None:
    assert a.instruction == b.instruction
    for name in SIGNALS:
        x, y = getattr(a, name), getattr(b, name)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=name)


def same(source: EpisodeSource, found: EpisodeSource) -> None:
    """Equal in all but the frames."""
    assert (found.embodiment, found.cameras) == (source.embodiment, source.cameras)
    assert [found.length(i) for i in range(len(found))] == [
        source.length(i) for i in range(len(source))
    ]
    for i in range(len(source)):
        same_signals(source.signals(i), found.signals(i))


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).mean())


def same_in_a_cache(source: EpisodeSource, found: EpisodeStore) -> None:
    same(source, found)
    assert found.skipped == 0
    for i in range(len(source)):
        assert found.metadata(i) == source.metadata(i)
        steps = [source.length(i) - 1, 0]
        for camera in source.cameras:
            for a, b in zip(
                source.frames(i, steps, camera), found.frames(i, steps, camera), strict=True
            ):
                assert error(a, b) < 1.5
    if isinstance(source, Measures):
        assert set(found.measures) == set(source.measures)
        for key in source.measures:
            np.testing.assert_array_equal(found.measured(0, key), source.measured(0, key), key)


@pytest.mark.parametrize("kind", ["store", "lerobot", "fractal", "hdf5"])
def test_a_cache_gives_back_all(kind: str, entries: dict[str, str], tmp_path: Path) -> None:
    source = open_source(entries[kind])
    found = open_source(str(convert(config(entries[kind], tmp_path / "out"))))
    assert isinstance(found, EpisodeStore)
    same_in_a_cache(source, found)
    assert verify(tmp_path / "out") > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_real_bridge_episodes_in_a_cache(bridge: str, tmp_path: Path) -> None:
    source = open_source(bridge)
    found = open_source(str(convert(config(bridge, tmp_path / "out", measures=[]))))
    assert isinstance(found, EpisodeStore)
    same(source, found)
    for i in range(len(source)):
        assert found.metadata(i) == source.metadata(i)
    for i in (0, 24):  # the very JPEG data, so the very pixels
        np.testing.assert_array_equal(found.frames(i, [3])[0], source.frames(i, [3])[0])


def test_a_recording_stays_one(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_writer, "SHARD_BYTES", 40_000)
    again, before = (
        EpisodeStore(folder) for folder in (convert(config(str(store), tmp_path / "out")), store)
    )
    assert again.header == before.header
    assert len(list((tmp_path / "out").glob("*.blob"))) == 2
    a, b = again.record(1), before.record(1)
    np.testing.assert_array_equal(a.executed, b.executed)
    np.testing.assert_array_equal(a.images["overhead_camera"], b.images["overhead_camera"])
    assert (a.seed, a.success, a.draws, a.meta) == (b.seed, b.success, b.draws, b.meta)


def test_raw_frames_are_those_a_model_sees(entries: dict[str, str], tmp_path: Path) -> None:
    changes = {"frames": "raw", "size": [24, 32], "cameras": ["wrist"], "measures": []}
    found = open_source(str(convert(config(entries["lerobot"], tmp_path / "out", **changes))))
    assert found.cameras == ("wrist",)
    (frame,) = found.frames(1, [7])
    (original,) = open_source(entries["lerobot"]).frames(1, [7], "wrist")
    np.testing.assert_array_equal(frame, resize(original, 24, 32))
    assert not frame.flags.writeable
    assert isinstance(found, EpisodeStore)
    assert found.encoded(1, [7]) is None
    assert found.header.image_size == (24, 32)


@pytest.mark.parametrize("kind", ["store", "fractal", "hdf5"])
def test_lerobot_gives_back_all_signals(
    kind: str, entries: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = convert(config(entries[kind], tmp_path / "out", format="lerobot"))
    same(open_source(entries[kind]), open_source(str(out)))
    assert "not carried: exact pixels" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["store", "fractal", "hdf5", "lerobot"])
def test_rlds_gives_back_what_its_schema_can_say(
    kind: str, entries: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source(entries[kind])
    camera = source.cameras[-1]
    out = convert(config(entries[kind], tmp_path / "out", format="rlds", cameras=[camera]))
    found = open_source(str(out))
    assert (found.cameras, found.embodiment) == ((camera,), source.embodiment)
    for i in range(len(source)):
        a, b = source.signals(i), found.signals(i)
        assert a.instruction == b.instruction
        valid = a.action_valid & b.action_valid
        np.testing.assert_allclose(a.actions[valid, :6], b.actions[valid, :6], atol=1e-5)
        poses = a.proprio_valid & b.proprio_valid
        np.testing.assert_allclose(a.proprio[poses, :3], b.proprio[poses, :3], atol=1e-6)
    assert ("not carried" in capsys.readouterr().out) == (kind != "fractal")


def test_the_plan_comes_first_and_is_about_right(
    bridge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = convert(config(bridge, tmp_path / "out", size=[64, 64], measures=[]))
    text = capsys.readouterr().out
    assert "25 episodes" in text
    assert "0 records left out" in text
    assert "worldmodel/encode.py" in text
    promised = float(text.split("about ")[1].split(" MB")[0])
    written = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    assert promised == pytest.approx(written, rel=0.3)


def test_too_large_for_the_disk(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="are free"):
        convert(config(str(store), tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def many(folder: Path, episodes: int = 40, steps: int = 30) -> Path:
    """A store large enough to be stopped while it is converted."""
    source, rng = Smooth(), np.random.default_rng(0)
    images = list(rng.integers(0, 256, (steps, 96, 128, 3), dtype=np.uint8))
    header = StoreHeader("google_robot", "t", ("front",), "fake")
    content = cache_writer.content(source, 1, [])
    arrays = {k: np.resize(v, (steps, *v.shape[1:])) for k, v in content.arrays.items()}
    with StoreWriter(folder, "000", header) as writer:
        for seed in range(episodes):
            one = replace(content, arrays=arrays, instruction=["x"] * steps)
            one = replace(one, values={**content.values, "about": {"seed": seed}})
            writer.write({"front": images}, one, raw=True)
    return folder


def lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("*.jsonl"))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_gone_on_with(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = many(tmp_path / "source")
    arguments = [f"source={source}", f"out={tmp_path}/out", "size=[80,112]", f"workers={workers}"]
    command = [sys.executable, str(SCRIPT), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    draft = tmp_path / ".out.part"
    while lines(draft) < 5 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.2)  # until its own processes have noticed
    before = {path.name: path.read_bytes() for path in draft.rglob("*.jsonl")}
    assert not (tmp_path / "out").exists()
    assert 5 <= lines(draft) < 40
    convert(config(str(source), tmp_path / "out", size=[80, 112], workers=workers))
    assert "going on where it was stopped" in capsys.readouterr().out
    for name, text in before.items():  # nothing was written twice
        assert (tmp_path / "out" / name).read_bytes().startswith(text)
    found, original = EpisodeStore(tmp_path / "out"), EpisodeStore(source)
    assert [found.metadata(i)["seed"] for i in range(len(found))] == list(range(40))
    for i in (0, 19, 39):
        same_signals(found.signals(i), original.signals(i))
    assert all(found.intact(i) for i in range(40))
    assert not draft.exists()


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_another_plan_does_not_go_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_writer, "write_episode", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(config(str(store), tmp_path / "out"))
    with pytest.raises(UserError, match=r"begun with frames=jpeg; go on so, or delete"):
        convert(config(str(store), tmp_path / "out", frames="raw"))
    with open(tmp_path / ".out.part/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            convert(config(str(store), tmp_path / "out"))


def damaged_frames(store: Path, folder: Path) -> Path:
    """The store with the JPEG data of its first episode overwritten."""
    folder.mkdir()
    for path in store.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    data = bytearray((folder / "000.blob").read_bytes())
    data[:500] = bytes(500)
    (folder / "000.blob").write_bytes(data)
    return folder


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_cannot_be_read(
    workers: int, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(damaged_frames(store, tmp_path / "bad"))
    wanted = config(source, tmp_path / "out", size=[16, 16], workers=workers)
    with pytest.raises(UserError, match="a frame of episode 0 cannot be decoded"):
        convert(wanted)
    assert not (tmp_path / ".out.part").exists()  # seen in the samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfflow.datasets.convert_plan.EPISODES", 0)
        with pytest.raises(UserError, match="a frame of episode 0 cannot be decoded"):
            convert(wanted)
    (tmp_path / ".out.part").rename(tmp_path / "first")
    convert(replace(wanted, skip_corrupt=True))
    text = capsys.readouterr().out
    assert "left out: episode 0" in text
    assert "episodes: 1 written, 1 left out" in text
    found = EpisodeStore(tmp_path / "out")
    assert len(found) == 1
    same_signals(found.signals(0), EpisodeStore(store).signals(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["format=latents"], r"worldmodel/encode.py data=\[CACHE\]"),
        (["format=zarr"], "cache, lerobot, rlds"),
        (["frames=png"], "jpeg, raw"),
        (["size=128"], r"give \[height, width\]"),
        (["size=[128,0]"], r"give \[height, width\]"),
        (["format=rlds", "workers=2"], "for format=cache only"),
        (["workers=0"], "at least 1"),
    ],
)
def test_mistakes_in_the_config(changes: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        compose(ConvertConfig, "convert", ["source=x", f"out={tmp_path}/out", *changes])


def test_mistakes_before_anything_is_written(entries: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="is required"):
        check(ConvertConfig(str(out)))
    for changes, message in (
        ({"cameras": ["left"]}, "front, wrist"),
        ({"cameras": []}, "front, wrist"),
        ({"measures": ["mass"]}, "observation.state"),
        ({"cameras": ["front", "wrist"], "format": "rlds"}, "one camera"),
    ):
        with pytest.raises(UserError, match=message):
            convert(config(entries["lerobot"], out, **changes))
    assert not list(tmp_path.iterdir())
    out.mkdir()
    with pytest.raises(UserError, match="exists"):
        check(config("x", out))


def test_shards_are_of_equal_work() -> None:
    assert partition([5], 10, 4) == ((0, 1),)
    assert partition([3] * 8, 10, 1) == ((0, 8),)
    shards = partition([1, 1, 1, 97, 50, 50], 3 << 30, 1)
    assert [stop for _, stop in shards][-1] == 6
    assert [first for first, _ in shards][1:] == [stop for _, stop in shards][:-1]
    assert 2 <= len(shards) <= 3


def test_a_plan_is_plain_json(store: Path, tmp_path: Path) -> None:
    noted = json.loads((convert(config(str(store), tmp_path / "o")) / checksums.NAME).read_text())
    assert noted.keys() == {"00000.blob", "00000.index.jsonl", "store.json"}
