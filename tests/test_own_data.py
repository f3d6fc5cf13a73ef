"""docs/your_own_data.md as it stands, and one mixture of four formats stopped and gone on with."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.convert import ConvertConfig, convert
from selfflow.datasets.loading import prefetch
from selfflow.datasets.source import open_source, open_sources
from selfflow.datasets.store import EpisodeRecord, StoreHeader, StoreWriter
from selfflow.datasets.windows import Mixture, resize
from selfflow.worldmodel import train
from selfflow.worldmodel.batches import window
from selfflow.worldmodel.train_config import TrainConfig

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/your_own_data.md").read_text()
TEXTS = ("open top drawer", "place apple into top drawer")
SMALL = "model.hidden=32 model.depth=4 model.heads=2 layout.height=32 layout.width=40 "
QUICK = SMALL + "layout.patch=8 batch=6 warmup=1 schedule=constant precision=fp32 threads=1"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def command(line: str, folder: Path, status: int = 0) -> str:
    """Runs a line of the page in the folder; returns what it printed."""
    script, *words = line.removeprefix("python ").split()
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def as_hdf5(folder: Path) -> Path:
    """The page's own writing of my_data/store, and its description of it."""
    (folder / "my_robot.yaml").write_text(blocks("yaml")[0])
    subprocess.run([sys.executable, "-c", blocks("python")[0]], cwd=folder, check=True, timeout=60)
    return folder / "my_data/demos.hdf5"


def recorded(folder: Path, episodes: int = 4) -> Path:
    """A store of moving noise with two instructions, T observations and as many actions."""
    rng = np.random.default_rng(0)
    header = StoreHeader("google_robot", "open_drawer_place", ("overhead_camera",), "fake")
    with StoreWriter(folder, "000", header) as writer:
        for seed in range(episodes):
            n = 15 + 3 * seed
            pose = rng.uniform(-1, 1, (n, 8)).astype(np.float32)
            pose[:, 3:7] = (1, 0, 0, 0)
            pose[:, 7] = rng.uniform(0, 1, n)
            actions = rng.uniform(-0.05, 0.05, (n, 7)).astype(np.float32)
            actions[:, 6] = rng.integers(0, 2, n)
            frame = np.kron(rng.integers(0, 256, (8, 10, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            writer.append(
                EpisodeRecord(
                    images={"overhead_camera": [np.roll(frame, 2 * t, 1) for t in range(n)]},
                    proprio=pose,
                    actions=actions,
                    executed=actions,
                    terminate=np.arange(n) == n - 1,
                    instruction=[TEXTS[t >= n // 2] for t in range(n)],
                    seed=seed,
                    success=True,
                )
            )
    return folder


@pytest.mark.sim
def test_the_page_from_recording_to_rollout(tmp_path: Path) -> None:
    lines = [line for block in blocks("bash") for line in block.strip().splitlines()]
    record, ask, look, statistics, convert_, tune, roll = lines
    command(record.replace("episodes=5", "episodes=2"), tmp_path)
    as_hdf5(tmp_path)
    told = command(ask, tmp_path, status=2)
    assert len(told.splitlines()) == 1
    assert "obs/eef_pos" in told
    assert "docs/your_own_data.md" in told
    assert TEXTS[0] in command(look, tmp_path)
    command(statistics, tmp_path)
    assert "google_robot" in json.loads((tmp_path / "outputs/my_stats/stats.json").read_text())
    command(convert_, tmp_path)
    store, cache = (open_source(str(tmp_path / "my_data" / name)) for name in ("store", "cache"))
    steps = cache.length(0)
    assert steps >= store.length(0) - 1
    np.testing.assert_allclose(
        cache.signals(0).actions, store.signals(0).actions[:steps], atol=1e-6
    )
    np.testing.assert_allclose(
        cache.signals(0).proprio, store.signals(0).proprio[:steps], atol=1e-6
    )
    command(f"{tune} {QUICK} steps=2", tmp_path)
    told = command(f"{roll.replace('episodes=2', 'episodes=1')} videos=0 execute=8", tmp_path)
    assert "outputs" in told


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of configs/experiment/four_formats.yaml, made as it says of a small store."""
    pytest.importorskip("h5py")
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("own")
    store = recorded(folder / "my_data/store")
    for kind in ("rlds", "lerobot", "cache"):
        convert(ConvertConfig(str(folder / "data/four" / kind), str(store), kind))
    made = as_hdf5(folder)
    for path in (made, folder / "my_robot.yaml"):
        os.replace(path, folder / "data/four" / path.name)
    return folder


def config(formats: Path, out: str, *words: str) -> TrainConfig:
    """The experiment, tiny, with its paths where the data lie."""
    given = compose(TrainConfig, "train", ["experiment=four_formats"]).sources
    data = ",".join(entry.replace("data/four", str(formats / "data/four")) for entry in given)
    few = [f"data=[{data}]", f"out={formats / out}", *QUICK.split(), "save_every=2", *words]
    return compose(TrainConfig, "train", ["experiment=four_formats", *few])


def test_the_four_formats_hold_the_same(formats: Path) -> None:
    sources, weights = open_sources(config(formats, "none").sources)
    assert weights == [0.4, 0.3, 0.2, 0.1]
    assert len({type(source) for source in sources}) == 4
    for source in sources:
        assert [source.length(i) for i in range(4)] == [15, 18, 21, 24]
        found, expected = source.signals(2), sources[3].signals(2)
        np.testing.assert_allclose(found.actions, expected.actions, atol=1e-5)
        np.testing.assert_allclose(found.proprio, expected.proprio, atol=1e-5)
        assert found.instruction == expected.instruction
        assert found.terminate.tolist() == expected.terminate.tolist()
        here, there = (
            resize(s.frames(2, [3])[0], 32, 40).astype(int) for s in (source, sources[3])
        )
        assert np.abs(here - there).mean() < 12  # mp4 of noise


@pytest.mark.parametrize("workers", [0, 2])
def test_one_mixture_of_four_formats_goes_on_to_the_same_batches(
    formats: Path, workers: int
) -> None:
    """Stopped after 3 of 6 steps, in the middle of every source's epoch."""
    names = {0: ("whole", "parts"), 2: ("whole2", "parts2")}[workers]
    train.main(config(formats, names[0], "steps=6"))
    loader = f"workers={workers}"
    train.main(config(formats, names[1], "steps=3", loader))
    first = rows(formats / names[1])
    assert len(first) == 3
    train.main(config(formats, names[1], "steps=6", loader))
    whole, parts = rows(formats / names[0]), rows(formats / names[1])
    assert [row["step"] for row in parts] == [1, 2, 3, 4, 5, 6]
    epochs = [key for key in whole[0] if key.startswith("epoch/")]
    assert len(epochs) == 4
    assert all(0 < whole[-1][key] < 1 for key in epochs)
    same = ("loss", "video", "action", "grad_norm", *epochs)
    assert [[r[k] for k in same] for r in whole] == [[r[k] for k in same] for r in parts]


def test_the_batches_themselves(formats: Path) -> None:
    """Of steps 3 to 8, drawn after others and drawn at once, with and without workers."""
    given = config(formats, "none")
    sources, weights = open_sources(given.sources)
    spec = window(given.layout, augment=given.augment)
    whole = list(prefetch(Mixture(sources, weights, spec, 0), range(8), 10))
    for workers in (0, 2):
        mixture = Mixture(*open_sources(given.sources), spec, 0)
        coming = prefetch(mixture, range(3, 8), 10, workers=workers, data=given.sources)
        for found, expected in zip(coming, whole[3:], strict=True):
            assert found.ids == expected.ids
            np.testing.assert_array_equal(found.frames, expected.frames)
            np.testing.assert_array_equal(found.actions, expected.actions)
    ids = [place for batch in whole for place in batch.ids]
    assert len(set(ids)) == len(ids)
    by_source = [sum(name == s.name for name, _, _ in ids) for s in sources]
    np.testing.assert_allclose(by_source, [32, 24, 16, 8], atol=1.5)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
