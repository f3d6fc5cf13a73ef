"""Conversions that were stopped and taken up again, and what they keep of a view of the data."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from selfflow.datasets import cache_writer
from selfflow.datasets.checksums import verify
from selfflow.datasets.convert import ConvertConfig, convert
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import UserError
from selfflow.datasets.store import EpisodeStore, StoreWriter

YAML = """
embodiment: {name: my_arm, control_hz: 10.0}
cameras: {front: images}
text: lift the cube
state: {position: "state[0:3]", gripper: "state[3]", open: 1.0, closed: 0.0}
"""


def arm(folder: Path) -> tuple[Path, Path]:
    """A demonstration in HDF5 and the file that describes it."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "arm.hdf5", "w") as file:
        file["data/demo_0/state"] = np.random.default_rng(0).uniform(size=(6, 4))
        file["data/demo_0/images"] = np.zeros((6, 48, 64, 3), np.uint8)
    (folder / "arm.yaml").write_text(YAML)
    return folder / "arm.hdf5", folder / "arm.yaml"


def config(source: str, out: Path, **changes: object) -> ConvertConfig:
    return replace(ConvertConfig(str(out), source), **changes)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_corrected_spec_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, spec = arm(tmp_path)
    with monkeypatch.context() as stopped:
        stopped.setattr(cache_writer, "write_episode", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(config(f"{data}::{spec}", tmp_path / "out"))
    spec.write_text(spec.read_text().replace("open: 1.0, closed: 0.0", "open: 0.0, closed: 1.0"))
    with pytest.raises(UserError, match="begun with signals_by_the_spec="):
        convert(config(f"{data}::{spec}", tmp_path / "out"))


@pytest.mark.parametrize("form", ["cache", "rlds"])
def test_stopped_while_checksums_are_taken(
    form: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr("selfflow.datasets.convert.write_checksums", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(config(str(store), tmp_path / "out", format=form))
    convert(config(str(store), tmp_path / "out", format=form))
    assert verify(tmp_path / "out") > 0
    assert len(open_source(str(tmp_path / "out"))) == len(EpisodeStore(store))


def test_a_part_of_the_pictures_keeps_what_was_seen_in_them(store: Path, tmp_path: Path) -> None:
    header = replace(EpisodeStore(store).header, photographs=("a_room",), image_size=None)
    with StoreWriter(tmp_path / "seen", header=header) as writer:
        writer.append(EpisodeStore(store).record(0))
    convert(config(f"{tmp_path / 'seen'}?crop:0-0-50-50", tmp_path / "out"))
    found = EpisodeStore(tmp_path / "out").header
    assert found.photographs == ("a_room",)
