"""An arm of the ablation from end to end by its real commands, two steps each."""

from pathlib import Path

import numpy as np
import pytest

from selfflow.configs.entry import compose
from selfflow.datasets.store import EpisodeRecord, StoreHeader, StoreWriter
from selfflow.eval import ablation
from selfflow.eval.ablation_config import AblationConfig
from selfflow.eval.ablation_plan import chosen
from selfflow.eval.ablation_records import curve_of, read_records

SMALL = (
    "layout.height=32 layout.width=32 batch=4 warmup=1 model.hidden=24 model.depth=3 model.heads=2"
)


def words(overrides: str) -> str:
    """As a list on the command line, where what has an = needs quotes."""
    return "[" + ",".join(f"'{word}'" for word in overrides.split()) + "]"


def truthful(folder: Path, seeds: range) -> Path:
    """Episodes that hold what the probe reads."""
    rng, n = np.random.default_rng(0), 12
    header = StoreHeader("google_robot", "open_drawer_place", ("overhead_camera",), "fake")
    pose = np.tile(np.float32([0.2, 0.1, 0, 1, 0, 0, 0]), (n, 1))
    with StoreWriter(folder, "000", header) as writer:
        for seed in seeds:
            apple = pose + np.float32([1, 1, 1, 0, 0, 0, 0]) * rng.random((n, 7), np.float32)
            drawers = rng.random((n, 3), np.float32)
            proprio = np.tile(np.float32([0.5, 0, 0.8, 1, 0, 0, 0, 1]), (n, 1))
            proprio[:, -1] = rng.random(n)
            record = EpisodeRecord(
                images={"overhead_camera": list(rng.integers(0, 256, (n, 32, 32, 3), np.uint8))},
                proprio=proprio,
                actions=rng.uniform(0, 0.1, (n, 7)).astype(np.float32),
                executed=np.zeros((n, 7), np.float32),
                terminate=np.arange(n) == n - 1,
                instruction=["open top drawer"] * n,
                seed=seed,
                success=True,
                privileged={"drawers": drawers, "apple": apple, "base": pose},
            )
            writer.append(record)
    return folder


@pytest.mark.slow
def test_an_arm_runs_through_and_is_reported(tmp_path: Path) -> None:
    data, heldout = truthful(tmp_path / "data", range(4)), truthful(tmp_path / "not", range(4, 8))
    given = [f"{key}={tmp_path}/{key}" for key in ("out", "records")]
    given += [f"document={tmp_path}/ablation.md", f"data={data}", f"heldout={heldout}"]
    given += ["trainings=1", "only=[repa]", "~sizes.smaller", "~sizes.larger"]
    given += ["threads=1", "workers=1", "episodes=1"]
    given += ["pretrain_steps=4", "curve_points=2", "finetune_steps=2"]
    given += [f"pretrain={words(SMALL)}", f"finetune={words(SMALL + ' execute=8')}"]
    given += [f"curve={words('frames=3 starts=2 folds=2 bootstrap=10')}"]
    given += [f"video={words('starts=1 horizon=1 steps=1 bootstrap=10')}"]
    given += [f"rollout={words('backend=fake')}"]
    config = compose(AblationConfig, "ablation", given)
    ablation.check(config)
    ablation.main(config)
    records = read_records(Path(config.records))
    assert records.keys() == {job.name for job in chosen(config)}
    assert len(records) == 7
    steps, losses = curve_of(records["main/repa/0/curve"], "loss")
    assert steps == [2, 4]
    assert all(0 < loss < 100 for loss in losses)
    assert "cosine" in records["main/repa/0/pretrain"]["log"][-1]
    assert "psnr, all frames" in records["main/repa/0/video"]["cells"]["4"]
    assert len(records["main/repa/0/rollout-000002"]["success"]) == 1
    text = Path(config.document).read_text()
    assert "1 runs of 8 planned are done" in text
    assert "| repa |" in text
    ablation.main(config)  # again: nothing is left
    assert read_records(Path(config.records)) == records
