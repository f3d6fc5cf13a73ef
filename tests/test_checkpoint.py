"""Checkpoints are whole or absent, hold safetensors and JSON only, and say what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from selfflow.worldmodel import checkpoint
from selfflow.worldmodel.checkpoint import CheckpointError, Training
from selfflow.worldmodel.loop import LoopConfig, State, generator

META = {"format": 1, "kind": "policy"} | {key: {} for key in checkpoint.KEYS["policy"]}


def trained(steps: int = 3) -> State:
    torch.manual_seed(0)
    state = State(nn.Linear(3, 2), LoopConfig(lr=0.1, warmup=0, steps=10))
    for step in range(steps):
        x = torch.randn(4, 3, generator=generator(0, step))
        state.backward({"loss": state.student(x).square().mean()})
        state.update(4)
    return state


def save(run: Path, state: State, dtype: str = "float32") -> Path:
    training = state.training()
    return checkpoint.save(run, training.average, META, {"r": {"n": 1}}, training, dtype, keep=2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_training_goes_on_exactly(tmp_path: Path, dtype: str) -> None:
    save(tmp_path, trained(3), dtype)
    resumed = trained(0)
    resumed.restore(checkpoint.resolve(tmp_path))
    x = torch.randn(4, 3, generator=generator(0, 3))
    resumed.backward({"loss": resumed.student(x).square().mean()})
    resumed.update(4)
    uninterrupted = trained(4)
    for a, b in (
        (resumed.student, uninterrupted.student),
        (resumed.average, uninterrupted.average),
    ):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)
    assert (resumed.step, resumed.samples) == (4, 16)


def test_what_a_user_loads_is_the_moving_average(tmp_path: Path) -> None:
    state = trained()
    loaded = checkpoint.load(save(tmp_path, state, "float16"), "policy")
    assert loaded.weights["weight"].dtype == torch.float16
    assert torch.allclose(loaded.weights["weight"].float(), state.average.weight, atol=1e-3)
    assert not torch.allclose(state.average.weight, state.student.weight, atol=1e-3)
    assert loaded.statistics == {"r": {"n": 1}}


def test_only_the_last_ones_are_kept_and_a_run_resolves_to_its_last(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".draft-1").mkdir(parents=True)  # of a killed process
    backup = tmp_path / "checkpoints" / "step-000009.bak"
    backup.mkdir()
    for steps in (1, 2, 3):
        save(tmp_path, trained(steps))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000003",
        backup.name,
    ]
    last = tmp_path / "checkpoints" / "step-000003"
    assert checkpoint.resolve(tmp_path) == last == checkpoint.resolve(last)


def test_a_kill_while_saving_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, trained())
    assert checkpoint.last(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.resolve(tmp_path)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    files = [p for p in save(tmp_path, trained(), "float16").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json"}
    assert len(files) == 7


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.load(tmp_path / "nowhere")
    path = save(tmp_path, trained())
    with pytest.raises(CheckpointError, match="is a policy, not a world model"):
        checkpoint.load(path, "worldmodel")
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.fill(nn.Linear(4, 2), checkpoint.load(path).weights, "it")
    (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(path)
    (path / "stats.json").unlink()
    with pytest.raises(CheckpointError, match=r"stats\.json is missing"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_training(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ([1], "holds a list, not an object"),
        (META | {"format": 2}, "format is 2, not 1"),
        ({"kind": "policy"}, "format is None, not 1"),
        ({"format": 1}, "kind missing"),
        ({k: v for k, v in META.items() if k != "head"}, r"config\.json: head missing"),
        (META | {"kind": ["policy"]}, r"is of kind \['policy'\], not a policy"),
    ],
)
def test_a_foreign_config_is_named(tmp_path: Path, config: object, says: str) -> None:
    path = save(tmp_path, trained(1))
    checkpoint.write_json(path / "config.json", config)
    with pytest.raises(CheckpointError, match=says) as caught:
        checkpoint.load(path, "policy" if says.startswith("is ") else None)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_training_state_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, trained(1))
    whole = json.loads((path / "train" / "state.json").read_text())
    checkpoint.write_json(path / "train" / "state.json", whole | {"samples": None})
    with pytest.raises(CheckpointError, match=r"state\.json: samples missing"):
        trained(0).restore(path)
    checkpoint.write_json(path / "train" / "state.json", whole)
    checkpoint._write_tensors(path / "train" / "optimizer.safetensors", {"x:step": torch.ones(1)})
    with pytest.raises(CheckpointError, match="KeyError: 'x'"):
        trained(0).restore(path)


def test_moving_average_moves_every_step() -> None:
    from selfflow.worldmodel.ema import decay_at, update

    average, student = nn.Linear(2, 1), nn.Linear(2, 1)
    want = 0.75 * average.weight.detach() + 0.25 * student.weight.detach()
    update(average, student, 0.75)
    assert torch.allclose(average.weight, want)
    assert decay_at(0, 0.9999, warmup=True) == 0.1
    assert decay_at(10**6, 0.9999, warmup=True) == 0.9999
    assert decay_at(0, 0.9999, warmup=False) == 0.9999


def test_state_is_readable(tmp_path: Path) -> None:
    state = json.loads((save(tmp_path, trained()) / "train" / "state.json").read_text())
    assert state == {"step": 3, "samples": 12, "skipped": 0, "skipped_in_row": 0, "seed": 0}
    assert isinstance(checkpoint.load_training(checkpoint.resolve(tmp_path)), Training)
