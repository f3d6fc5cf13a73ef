"""Many shards: found once, known again, few of them open; and shards from elsewhere."""

import logging
import os
import pickle
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import simplejpeg

from selfflow.datasets import rlds_index
from selfflow.datasets.episodes import DatasetSpec, Signals, no_signals
from selfflow.datasets.fractal import FRACTAL
from selfflow.datasets.rlds import MAPPED, RldsSource
from selfflow.datasets.rlds_index import index_shard
from selfflow.datasets.source import open_source, with_options
from selfflow.datasets.spec import EMBODIMENTS, UserError
from selfflow.datasets.synthetic import write_fractal
from selfflow.datasets.tfrecord import CorruptRecord, encode_example, write_records

JPEG = simplejpeg.encode_jpeg(np.full((8, 8, 3), 99, np.uint8))
SHARDS = 1000


def only_text(numbers: dict[str, np.ndarray], instruction: list[str]) -> Signals:
    return no_signals(instruction)


PICTURES = DatasetSpec(
    embodiment=EMBODIMENTS["widowx"],
    cameras={"front": "steps/image"},
    instruction=None,
    numbers={},
    convert=only_text,
    text="tidy up",
)


def write_shards(folder: Path, count: int, of: int | None = None) -> Path:
    """Shards of two episodes each, of 1 + n % 7 and 2 steps."""
    folder.mkdir()
    (folder / "features.json").write_text("{}")
    for n in range(count):
        records = [encode_example({"steps/image": [JPEG] * steps}) for steps in (1 + n % 7, 2)]
        write_records(folder / f"many-train.tfrecord-{n:05d}-of-{of or count:05d}", records)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "many", SHARDS)


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rlds_index, "MIN_KEPT", 0)
    return write_shards(tmp_path / "few", 20)


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are walked through from now on."""
    names: list[str] = []

    def spy(file: Path, key: str, check_crc: bool = False) -> rlds_index.Shard:
        names.append(file.name)
        return index_shard(file, key, check_crc)

    monkeypatch.setattr(rlds_index, "index_shard", spy)
    return names


def test_a_thousand_shards_open_at_once_the_second_time(many: Path, walked: list[str]) -> None:
    first = RldsSource(many, PICTURES)
    assert len(walked) == SHARDS
    start = time.monotonic()
    again = RldsSource(many, PICTURES)
    assert time.monotonic() - start < 2  # seconds; 0.05 measured
    assert len(walked) == SHARDS
    lengths = [again.length(i) for i in range(len(again))]
    assert lengths == [steps for n in range(SHARDS) for steps in (1 + n % 7, 2)]
    assert lengths == [first.length(i) for i in range(len(first))]
    before = len(os.listdir("/proc/self/fd"))
    for i in range(0, 2 * SHARDS, 5):
        assert again.frames(i, [again.length(i) - 1])[0].mean() == 99
    assert len(os.listdir("/proc/self/fd")) - before <= MAPPED
    other = pickle.loads(pickle.dumps(again))  # as a worker of another process gets it
    assert other.signals(7).instruction == ["tidy up"] * 2


def test_only_what_changed_is_walked_anew(few: Path, walked: list[str]) -> None:
    RldsSource(few, PICTURES)
    walked.clear()
    changed = sorted(few.glob("*.tfrecord*"))[3]
    old = changed.read_bytes()
    write_records(changed, [encode_example({"steps/image": [JPEG] * 9})])
    assert RldsSource(few, PICTURES).length(6) == 9
    assert walked == [changed.name]
    changed.write_bytes(old)
    assert RldsSource(few, PICTURES).length(6) == 4
    walked.clear()
    RldsSource(few, PICTURES, check_crc=True)
    assert len(walked) == 20  # they were not checked before
    RldsSource(few, PICTURES)
    assert len(walked) == 20
    (few / ".index-train.npz").write_bytes(b"PK damaged")
    assert len(RldsSource(few, PICTURES)) == 40
    assert len(walked) == 40


def test_a_read_only_folder_is_known_by_the_cache(
    few: Path, walked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for _ in range(2):
        RldsSource(few, PICTURES)
    assert len(walked) == 20
    assert not (few / ".index-train.npz").exists()
    (kept,) = tmp_path.rglob("index-*.npz")
    assert kept.is_relative_to(tmp_path / "cache/selfflow/rlds")


def test_an_interrupted_walk_goes_on(
    few: Path, walked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = rlds_index.index_shard

    def impatient(file: Path, key: str, check_crc: bool = False) -> rlds_index.Shard:
        if len(walked) == 7:
            raise KeyboardInterrupt
        return patient(file, key, check_crc)

    monkeypatch.setattr(rlds_index, "index_shard", impatient)
    with pytest.raises(KeyboardInterrupt):
        RldsSource(few, PICTURES)
    assert len(walked) == 7
    monkeypatch.setattr(rlds_index, "index_shard", patient)
    assert len(RldsSource(few, PICTURES)) == 40
    assert len(walked) == 20


def test_what_is_left_out_is_counted_and_named_also_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rlds_index, "MIN_KEPT", 0)
    folder = write_shards(tmp_path / "some", 3, of=5)
    first, second, third = sorted(folder.glob("*.tfrecord*"))
    first.write_bytes(first.read_bytes()[:-20])  # its second record is cut
    write_records(second, [b"\xff\xff", encode_example({"steps/image": [JPEG]})])
    data = bytearray(third.read_bytes())
    data[40] ^= 1  # within the first record's picture
    third.write_bytes(data)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            source = RldsSource(folder, PICTURES, check_crc=True, skip_corrupt=True)
        assert (len(source), source.skipped) == (3, 3)
        assert "3 shards are here, 2 are not" in caplog.text
        assert f"{first}: record 1: the file ends within its data" in caplog.text
        assert f"{second}: record 0: " in caplog.text
        assert f"{third}: record 0: its checksum does not match" in caplog.text
        assert source.metadata(2) == {"file": third.name, "record": 1, "fps": 5.0}
        with pytest.raises(CorruptRecord, match=f"{first}: record 1: the file ends"):
            RldsSource(folder, PICTURES)


def test_options_behind_the_path(tmp_path: Path) -> None:
    assert with_options("a/b?split:val?shards:8?check_crc?skip_corrupt") == (
        "a/b",
        {"split": "val", "shards": 8, "check_crc": True, "skip_corrupt": True},
    )
    (tmp_path / "what?").mkdir()
    assert with_options(f"{tmp_path}/what?") == (f"{tmp_path}/what?", {})
    place = write_fractal(tmp_path, episodes=3, steps=2, shards=3)
    assert len(open_source(f"{place}?shards:2")) == 2
    for wrong in ("shards:0", "shards", "fast", "split:"):
        with pytest.raises(UserError, match=f"no option '{wrong}'; there are split:NAME"):
            open_source(f"{place}?{wrong}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no option shards for this format"):
        open_source(f"{tmp_path}/empty?shards:2")


def test_urls_are_downloaded_once_and_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = write_fractal(tmp_path, episodes=4, steps=3, shards=4)
    bucket = fsspec.filesystem("memory")
    bucket.put(str(place), "/bucket/fractal20220817_data/0.1.0", recursive=True)
    url = "memory://bucket"
    two = open_source(f"{url}?shards:2")
    (cached,) = (tmp_path / "cache/selfflow/remote").iterdir()
    shards = sorted(p.name for p in cached.glob("*.tfrecord*"))
    assert shards == sorted(p.name for p in place.glob("*.tfrecord*"))[:2]
    assert (len(two), two.name) == (2, "fractal20220817_data/train")
    written = {path: path.stat().st_mtime_ns for path in cached.iterdir()}
    (cached / shards[1]).write_bytes(b"cut")  # of another size than there: fetched again
    all_four = open_source(url)
    assert len(all_four) == 4
    assert (cached / shards[0]).stat().st_mtime_ns == written[cached / shards[0]]
    ours = RldsSource(place, FRACTAL)
    for i in range(4):
        np.testing.assert_array_equal(all_four.signals(i).actions, ours.signals(i).actions)
    assert len(open_source(f"{url}?shards:2")) == 2  # though four are there by now
    bucket.rm("/bucket", recursive=True)
    in_place = open_source(f"file://{place}")
    assert isinstance(in_place, RldsSource)
    assert in_place.folder == place


def test_urls_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"memory://nothing: no features.json there"):
        open_source("memory://nothing")
    with pytest.raises(UserError, match=r"nope://x: cannot be fetched"):
        open_source("nope://x")
    bucket = fsspec.filesystem("memory")
    bucket.pipe("/full/features.json", b"{}")
    bucket.pipe("/full/a-train.tfrecord-00000-of-00001", b"12345")
    usage = type("Usage", (), {"free": 3})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"0.0 GB free at .*\?shards:8"):
        open_source("memory://full")
    bucket.rm("/full", recursive=True)
