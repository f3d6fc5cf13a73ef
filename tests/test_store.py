"""The episode store gives back what was recorded, whatever happened to its writer."""

import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.datasets.episodes import EpisodeSource
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import UserError
from selfflow.datasets.store import Content, EpisodeRecord, EpisodeStore, StoreHeader, StoreWriter

HEADER = StoreHeader("google_robot", "open_drawer_place", ("overhead_camera", "side"), "mujoco")


def smooth_image(rng: np.random.Generator, h: int = 16, w: int = 24) -> np.ndarray:
    """A gradient, so that JPEG keeps it nearly unchanged."""
    corners = rng.integers(0, 255, (3, 3))
    y, x = np.mgrid[0 : 1 : h * 1j, 0 : 1 : w * 1j][..., None]
    return (
        (corners[0] * (1 - x) * (1 - y) + corners[1] * x + corners[2] * y).clip(0, 255).astype("u1")
    )


def make_record(seed: int, steps: int = 5, extra: int = 0) -> EpisodeRecord:
    rng = np.random.default_rng(seed)
    n = steps + extra
    return EpisodeRecord(
        images={c: [smooth_image(rng) for _ in range(n)] for c in HEADER.cameras},
        proprio=rng.normal(size=(n, 8)).astype(np.float32),
        actions=rng.normal(size=(steps, 7)).astype(np.float32),
        executed=rng.normal(size=(steps, 7)).astype(np.float32),
        terminate=np.arange(steps) == steps - 1,
        instruction=["open top drawer"] * 2 + ["place apple into top drawer"] * (n - 2),
        seed=seed,
        success=bool(seed % 2),
        privileged={"drawers": rng.normal(size=(n, 3)), "apple": rng.normal(size=(n, 7))},
        draws={"robot_x": float(rng.normal()), "cell": 3},
        meta={"note": "ä", "latency": [1.5, None]},
    )


def write(folder: Path, seeds: range, shard: str = "000", extra: int = 0) -> list[EpisodeRecord]:
    records = [make_record(seed, extra=extra) for seed in seeds]
    with StoreWriter(folder, shard, HEADER) as writer:
        for record in records:
            writer.append(record)
    return records


def assert_same(a: EpisodeRecord, b: EpisodeRecord) -> None:
    for f in fields(EpisodeRecord):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if f.name == "images":
            assert x.keys() == y.keys()
            for camera in x:
                assert np.abs(np.array(x[camera], int) - np.array(y[camera], int)).max() <= 12
        else:
            np.testing.assert_equal(x, y, f.name)


@pytest.mark.parametrize("extra", [0, 1])
def test_a_record_comes_back_whole(tmp_path: Path, extra: int) -> None:
    records = write(tmp_path, range(3), extra=extra)
    store = EpisodeStore(tmp_path)
    assert len(store) == 3
    assert store.skipped == 0
    for i, record in enumerate(records):
        assert_same(store.record(i), record)
        assert store.length(i) == len(record.proprio)


def test_signals_are_aligned_with_observations(tmp_path: Path) -> None:
    (record,) = write(tmp_path, range(1), extra=1)
    source = open_source(str(tmp_path))
    assert isinstance(source, EpisodeSource)
    signals = source.signals(0)
    np.testing.assert_array_equal(signals.actions[:5], record.actions)
    np.testing.assert_array_equal(signals.action_valid, [True] * 5 + [False])
    np.testing.assert_array_equal(signals.terminate, [False] * 4 + [True, True])
    assert signals.instruction == record.instruction
    assert signals.proprio_valid.all()
    first, again = source.frames(0, [2, 0])
    np.testing.assert_array_equal(source.frames(0, [0], "overhead_camera")[0], again)
    assert not np.array_equal(first, again)
    with pytest.raises(UserError, match="overhead_camera, side"):
        source.frames(0, [0], "wrist")


def test_shards_and_failures_and_seeds(tmp_path: Path) -> None:
    write(tmp_path, range(2), "a")
    write(tmp_path, range(10, 12), "b")
    with StoreWriter(tmp_path, "b") as writer:
        writer.note_failure(12, "apple fell")
    store = EpisodeStore(tmp_path)
    assert [store.record(i).seed for i in range(4)] == [0, 1, 10, 11]
    assert store.failures == {12: "apple fell"}
    assert store.seeds() == {0, 1, 10, 11, 12}


def test_one_writer_a_shard_but_several_a_store(tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path, "a", HEADER),
        StoreWriter(tmp_path, "b", HEADER),
        pytest.raises(UserError, match="another process"),
    ):
        StoreWriter(tmp_path, "a", HEADER)
    StoreWriter(tmp_path, "a", HEADER).close()


def test_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an episode store"):
        EpisodeStore(tmp_path)
    with pytest.raises(UserError, match="not an episode store"):
        StoreWriter(tmp_path / "new")
    with pytest.raises(UserError, match="google_robot, widowx"):
        StoreWriter(tmp_path / "new", header=replace(HEADER, embodiment="panda"))
    write(tmp_path, range(1))
    with pytest.raises(UserError, match="choose another folder"):
        StoreWriter(tmp_path, header=replace(HEADER, task="pick_coke_can"))
    (tmp_path / "store.json").write_text('{"version": 99, "cameras": []}')
    with pytest.raises(UserError):
        EpisodeStore(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"executed": np.zeros((4, 7), np.float32)},
        {"instruction": ["x"] * 4},
        {"terminate": np.zeros(2, bool)},
        {"privileged": {"apple": np.zeros((4, 7))}},
        {"images": {"overhead_camera": []}},
        {"proprio": np.zeros((7, 8), np.float32)},
    ],
)
def test_a_record_with_unequal_lengths_is_refused(tmp_path: Path, change: dict) -> None:
    with StoreWriter(tmp_path, header=HEADER) as writer:
        with pytest.raises(ValueError, match="an episode of"):
            writer.append(replace(make_record(0), **change))
        with pytest.raises(TypeError, match="JSON"):
            writer.append(replace(make_record(0), meta={"x": object()}))
    assert len(EpisodeStore(tmp_path)) == 0
    assert EpisodeStore(tmp_path).skipped == 0


def test_damage_within_the_blob_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    blob = tmp_path / "000.blob"
    data = bytearray(blob.read_bytes())
    data[10] ^= 1
    blob.write_bytes(data)
    store = EpisodeStore(tmp_path)
    with pytest.raises(UserError, match="seed 0"):
        store.record(0)
    store.record(1)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """Three episodes and the size of the blob after each."""
    folder, sizes = tmp_path_factory.mktemp("store"), []
    for seed in range(3):
        write(folder, range(seed, seed + 1))
        sizes.append((folder / "000.blob").stat().st_size)
    return folder, sizes


def copy_truncated(original: Path, folder: Path, blob: int, index: int) -> None:
    (folder / "store.json").write_bytes((original / "store.json").read_bytes())
    (folder / "000.blob").write_bytes((original / "000.blob").read_bytes()[:blob])
    (folder / "000.index.jsonl").write_bytes((original / "000.index.jsonl").read_bytes()[:index])


@settings(max_examples=40, deadline=None)
@given(where=st.tuples(st.floats(0, 1), st.floats(0, 1)), writers=st.integers(1, 2))
def test_truncated_anywhere_it_reads_what_is_whole_and_goes_on(
    original: tuple[Path, list[int]], where: tuple[float, float], writers: int
) -> None:
    source, sizes = original
    text = (source / "000.index.jsonl").read_bytes()
    blob, index = round(where[0] * sizes[-1]), round(where[1] * len(text))
    lines = text[:index].split(b"\n")
    written = sum(
        line in text.split(b"\n")[:3] for line in lines
    )  # a line whole but for its \n is read
    whole = min(written, sum(size <= blob for size in sizes))
    with TemporaryDirectory() as name:
        folder = Path(name)
        copy_truncated(source, folder, blob, index)
        store = EpisodeStore(folder)
        assert [store.record(i).seed for i in range(len(store))] == list(range(whole))
        torn = bool(lines[-1]) and written < len(lines)
        assert store.skipped == written - whole + torn
        for seed in range(100, 100 + writers):
            write(folder, range(seed, seed + 1))
        after = EpisodeStore(folder)
        assert after.skipped == store.skipped
        expected = [*range(whole), *range(100, 100 + writers)]
        assert [after.record(i).seed for i in range(len(after))] == expected


def test_the_last_index_line_cut_in_many_places(
    original: tuple[Path, list[int]], tmp_path: Path
) -> None:
    source, sizes = original
    text = (source / "000.index.jsonl").read_bytes()
    last = text[:-1].rindex(b"\n") + 1
    for cut in (*range(last, len(text) - 3, 29), *range(len(text) - 3, len(text) + 1)):
        copy_truncated(source, tmp_path, sizes[-1], cut)
        assert len(EpisodeStore(tmp_path)) == (3 if cut >= len(text) - 1 else 2)
        with StoreWriter(tmp_path) as writer:
            writer.note_failure(7, "after the crash")
        assert EpisodeStore(tmp_path).failures == {7: "after the crash"}


def test_a_crashed_writer_does_not_revive_a_lost_episode(
    original: tuple[Path, list[int]], tmp_path: Path
) -> None:
    """The blob lost episode 2; the next writer put bytes there and died before its line."""
    source, sizes = original
    copy_truncated(source, tmp_path, sizes[1] + 10, 10**9)
    StoreWriter(tmp_path).close()
    with open(tmp_path / "000.blob", "ab") as blob:
        blob.write(b"\0" * sizes[-1])
    assert len(EpisodeStore(tmp_path)) == 2


WRITER = """
import sys
from selfflow.datasets.store import StoreWriter
import importlib.util
spec = importlib.util.spec_from_file_location("store_test", sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with StoreWriter(sys.argv[1], header=module.HEADER) as writer:
    print("ready", flush=True)
    for seed in range(10**6):
        writer.append(module.make_record(seed, steps=20))
"""


def test_killed_in_mid_append(tmp_path: Path) -> None:
    total = 0
    for attempt in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path), __file__]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        while len(EpisodeStore(tmp_path)) == total and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = EpisodeStore(tmp_path)
        assert len(store) > total
        expected = make_record(len(store) - total - 1, steps=20)
        assert_same(store.record(len(store) - 1), expected)
        total = len(store)


def test_what_fails_in_mid_episode_leaves_nothing(tmp_path: Path) -> None:
    def frames():
        yield smooth_image(np.random.default_rng(0))
        raise UserError("no more")

    record = make_record(0)
    arrays = {name: getattr(record, name) for name in ("proprio", "actions", "terminate")}
    with StoreWriter(tmp_path, header=replace(HEADER, cameras=("front",))) as writer:
        with pytest.raises(UserError, match="no more"):
            writer.write({"front": frames()}, Content(arrays, record.instruction))
        assert (tmp_path / "000.blob").stat().st_size == 0
        mixed = [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)]
        with pytest.raises(UserError, match="cannot be raw; give size"):
            writer.write({"front": mixed}, Content(arrays, record.instruction), raw=True)
    assert len(EpisodeStore(tmp_path)) == EpisodeStore(tmp_path).skipped == 0
