"""What is logged, where, and that a resumed run logs every step once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from selfflow.worldmodel import run_folder, trackers
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.loop import LoopConfig, State
from selfflow.worldmodel.run_folder import check_run, open_run

META = {"format": 1, "kind": "policy"}


@pytest.fixture
def config(tmp_path: Path) -> LoopConfig:
    return LoopConfig(data="a", out=str(tmp_path / "out"), steps=4, warmup=0)


def train(
    config: LoopConfig, dies_after: int = 99, flops: float | None = None, cosine: float = 0.0
) -> None:
    state = State(nn.Linear(3, 2), config)
    with open_run(config, state, "test", {"made up": [1, 1]}, flops) as run:
        for step, x in run.batches(torch.ones(4, 3) for _ in range(config.steps)):
            loss = state.student(x).square().mean()
            state.backward({"loss": loss, "cosine": torch.tensor(cosine)})
            run.log(4, tokens=40, **state.update(4))
            if run.due():
                run.save(META, {})
            if step + 1 == dies_after:
                return
        run.save(META, {})
        run.finish()


def rows(config: LoopConfig) -> list[dict]:
    return [json.loads(x) for x in (Path(config.out) / "log.jsonl").read_text().splitlines()]


def test_a_row_says_how_it_goes(config: LoopConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train(replace(config, peak_flops=1e9), flops=1e4)
    row = rows(config)[-1]
    keys = "step loss cosine grad_norm lr skipped samples_per_s data_wait_s tokens_per_s mfu"
    assert list(row) == keys.split()
    assert row["tokens_per_s"] == pytest.approx(10 * row["samples_per_s"], rel=0.01)
    # FLOPs of a step of 4 samples
    assert row["mfu"] == pytest.approx(1e4 * row["samples_per_s"] / 4 / 1e9, abs=1e-4)
    monkeypatch.setattr(run_folder, "_peak", lambda *_: None)
    train(replace(config, out=config.out + "2"), flops=1e4)
    assert "mfu" not in rows(replace(config, out=config.out + "2"))[-1]


def test_every_nth_step_is_logged(config: LoopConfig) -> None:
    train(replace(config, log_every=2))
    assert [row["step"] for row in rows(config)] == [2, 4]


def test_peaks_go_by_the_device_s_name() -> None:
    known = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H200": 989e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA T1000": None,
    }
    assert {name: trackers.peak_flops(name) for name in known} == known


def test_early_saturation_is_told_once(config: LoopConfig, capsys: pytest.CaptureFixture) -> None:
    train(replace(config, steps=100, minutes=0.0), dies_after=8, cosine=0.95)
    told = [row["step"] for row in rows(config) if "warning" in row]
    assert told == [1]
    assert "cosine 0.95 at step 1, before 5% of the run" in rows(config)[0]["warning"]
    assert capsys.readouterr().out.count("warning: cosine 0.95") == 1
    late = replace(config, out=config.out + "2", steps=100)
    train(late, dies_after=8, cosine=0.85)
    assert not any("warning" in row for row in rows(late))
    short = replace(config, out=config.out + "3", steps=4)  # 5 % of it are over before a step
    train(short, cosine=0.95)
    assert not any("warning" in row for row in rows(short))


def test_a_log_of_a_killed_run_is_cut_to_its_checkpoint(config: LoopConfig) -> None:
    train(replace(config, save_every=2), dies_after=3)
    path = Path(config.out) / "log.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # torn
    train(config)
    assert [row["step"] for row in rows(config)] == [1, 2, 3, 4]


def test_tensorboard_has_every_step_once(config: LoopConfig) -> None:
    pytest.importorskip("tensorboard", reason="no tensorboard: extra log")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, log=["tensorboard"], save_every=2)
    train(config, dies_after=3)
    train(config)
    read = EventAccumulator(str(Path(config.out) / "tensorboard"))
    read.Reload()
    assert [e.step for e in read.Scalars("loss")] == [1, 2, 3, 4]
    assert [e.value for e in read.Scalars("loss")] == pytest.approx(
        [row["loss"] for row in rows(config)]
    )
    assert set(read.Tags()["scalars"]) == set(rows(config)[0]) - {"step"}


def test_wandb_works_offline_without_a_key(
    config: LoopConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="no wandb: extra log")
    calls: list[tuple] = []

    class Fake:
        def log(self, values: dict, step: int) -> None:
            calls.append((step, values["loss"]))

        def finish(self) -> None:
            calls.append(("finish",))

    def init(**keys: object) -> Fake:
        calls.append((keys["mode"], keys["id"], keys["dir"]))
        return Fake()

    monkeypatch.setattr(wandb, "init", init)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    train(replace(config, log=["wandb"], steps=2))
    monkeypatch.setenv("WANDB_API_KEY", "made up")
    train(replace(config, log=["wandb"], steps=3))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(replace(config, log=["wandb"], steps=4))
    modes = [c for c in calls if len(c) == 3]
    assert [mode for mode, _, _ in modes] == ["offline", "online", "disabled"]
    assert len({(name, str(where)) for _, name, where in modes}) == 1
    assert [c for c in calls if len(c) == 2] == [(r["step"], r["loss"]) for r in rows(config)]
    assert calls.count(("finish",)) == 3


def test_a_missing_package_is_a_line(config: LoopConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"log=wandb: not installed; pip install 'selfflow\[log\]'"):
        check_run(replace(config, log=["wandb"]))
