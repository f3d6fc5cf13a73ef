"""How the processes of a run come to be: torchrun, SLURM, submitit; and what each of them draws."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest

from selfflow.configs.entry import FOLDER
from selfflow.datasets.loading import prefetch
from selfflow.datasets.source import open_sources
from selfflow.datasets.store import EpisodeRecord, StoreHeader, StoreWriter
from selfflow.datasets.windows import Mixture
from selfflow.worldmodel import checkpoint, parallel
from selfflow.worldmodel.batches import window
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.parallel import World


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of 200 steps with random signals."""
    folder, rng, n = tmp_path_factory.mktemp("data") / "store", np.random.default_rng(0), 200
    header = StoreHeader("google_robot", "open_top_drawer", ("overhead_camera",), "fake")
    with StoreWriter(folder, "000", header) as writer:
        for seed in range(2):
            actions = rng.uniform(0, 0.1, (n, 7)).astype(np.float32)
            writer.append(
                EpisodeRecord(
                    images={"overhead_camera": [np.zeros((32, 32, 3), np.uint8)] * n},
                    proprio=np.tile(np.array([0.5, 0.5, 0.5, 1, 0, 0, 0, 1], np.float32), (n, 1)),
                    actions=actions,
                    executed=actions,
                    terminate=np.arange(n) == n - 1,
                    instruction=["open top drawer"] * n,
                    seed=seed,
                    success=True,
                    privileged={},
                    draws={},
                    meta={},
                )
            )
    return folder


def test_every_process_draws_its_own_samples(store: Path) -> None:
    sources, weights = open_sources([str(store)])
    layout = Layout(32, 32, 16, chunk=4, stride=2)
    mixture = Mixture(sources, weights, window(layout), seed=0)
    share = World(size=2).share(8)
    for step in range(3):
        drawn = [mixture.batch(step, share, rank, 2).ids for rank in range(2)]
        assert len({*drawn[0], *drawn[1]}) == 8
        for rank in range(2):  # what the loop's prefetching hands out
            coming = prefetch(mixture, [step], share, rank, 2)
            assert next(coming).ids == drawn[rank]


@pytest.mark.slow
def test_a_job_of_two_tasks_and_then_one_process(store: Path, tmp_path: Path) -> None:
    """The scripts themselves, as SLURM would start them, and then as a laptop does."""
    pytest.importorskip("submitit", reason="no submitit: extra slurm")
    script = str(Path(__file__).parents[1] / "worldmodel" / "train.py")
    keys = "batch=4 warmup=1 schedule=constant precision=fp32 threads=1 save_every=2 device=cpu"
    size = "model.hidden=32 model.depth=4 model.heads=2 layout.height=32 layout.width=32"
    common = [f"data=[{store}]", *keys.split(), *size.split()]
    job = ["-m", "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sharing = [*job, *common, f"out={tmp_path}", "parallel=fsdp", "steps=3"]
    subprocess.run([sys.executable, script, *sharing], env=environment, check=True, timeout=200)
    run = tmp_path / "0"
    assert checkpoint.is_sharded(checkpoint.resolve(run))
    alone = [*common, f"out={run}", "steps=4"]
    subprocess.run([sys.executable, script, *alone], env=environment, check=True, timeout=100)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    state = checkpoint.load_training_state(checkpoint.resolve(run))
    assert (state["step"], state["samples"]) == (4, 16)
    assert not checkpoint.is_sharded(checkpoint.resolve(run))


def test_the_slurm_launcher_composes() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="extra slurm")
    with hydra.initialize_config_dir(str(FOLDER), version_base=None):
        keys = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.nodes=8"]
        composed = hydra.compose("train", keys, return_hydra_config=True)
    launcher = composed.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.partition, launcher.nodes, launcher.tasks_per_node) == ("gpu", 8, 8)
    assert launcher.tasks_per_node == launcher.gpus_per_node


def test_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in (*names, "SUBMITIT_EXECUTOR", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert parallel.place("auto", "cpu") == World()
    sharding = parallel.place("fsdp", "cpu")  # fine before a job is submitted
    with pytest.raises(RunError, match="torchrun --standalone"), parallel.join(sharding):
        pass
    slurm = {"STEP_NUM_TASKS": 16, "PROCID": 9, "LOCALID": 1, "JOB_ID": 123456}
    for name, value in slurm.items():
        monkeypatch.setenv("SLURM_" + name, str(value))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[007-008]")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what place sets is taken back
        monkeypatch.delenv(name)
    world = parallel.place("auto", "cpu")
    assert (world.rank, world.size, world.mode, world.main) == (9, 16, "ddp", False)
    assert os.environ["MASTER_ADDR"] == "gpu007"
    assert (os.environ["MASTER_PORT"], os.environ["LOCAL_RANK"]) == ("23456", "1")
    assert parallel.place("fsdp", "cpu").mode == "fsdp"
    assert world.share(64) == 4
    with pytest.raises(RunError, match="batch=60 does not divide by 16 processes"):
        world.share(60)
    with pytest.raises(RunError, match="parallel=none: 16 processes"):
        parallel.place("none", "cpu")
    with pytest.raises(RunError, match="give device=cuda"):
        parallel.place("auto", "cuda:1")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("a,b", "a"), ("gpu[003-005,9]", "gpu003"), ("rack-2-[12,14]", "rack-2-12")],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert parallel.first_host(nodes) == host


def test_a_submitted_job_of_several_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="no submitit: extra slurm")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    values = {"NTASKS": 4, "GLOBALID": 3, "LOCALID": 3, "NODEID": 0, "JOB_NUM_NODES": 1}
    for name, value in values.items():
        monkeypatch.setenv("SUBMITIT_LOCAL_" + name, str(value))
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "7")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    world = parallel.place("auto", "cpu")
    assert (world.rank, world.size, world.mode) == (3, 4, "ddp")
