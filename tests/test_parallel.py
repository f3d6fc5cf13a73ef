"""Two processes train like one: losses, weights, skips, stops, and checkpoints of either form.

The slow tests start this file under torchrun with gloo on the CPU, once for all that they check.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfflow.policies import finetune as policy
from selfflow.policies.finetune_config import FinetuneConfig
from selfflow.policies.head import head_loss
from selfflow.policies.student import build
from selfflow.worldmodel import checkpoint, flow, objective, parallel
from selfflow.worldmodel.batches import Inputs
from selfflow.worldmodel.checkpoint import CheckpointError
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.loop import LoopConfig, State, generator, start
from selfflow.worldmodel.parallel import World
from selfflow.worldmodel.run_folder import open_run
from selfflow.worldmodel.train_config import ModelSize, TrainConfig

META = {"format": 1, "kind": "policy"}
STEPS, BATCH = 4, 8
ATTENTION = ("prefix", "full")


class Backbone(nn.Module):
    """Blocks of a width that two processes cannot share evenly, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        states = [self.enter(x)]
        for block in (*self.blocks, self.blocks[0]):
            states.append(states[-1] + block(states[-1]))
        return states


class Student(nn.Module):
    """As the real one: a backbone, a projector, and a part that no loss uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Backbone()
        self.projector = nn.Linear(5, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states = self.backbone(x)
        return states[-1], self.projector(states[1])


def config(out: Path, mode: str, **keys: Any) -> LoopConfig:
    known = {"steps": STEPS, "batch": BATCH, "lr": 0.05, "warmup": 0, "ema": 0.9}
    run = {"data": "none", "out": str(out), "parallel": mode, "device": "cpu", "threads": 1}
    return LoopConfig(**(known | run | keys))


def batch_of(step: int) -> Tensor:
    """The whole batch of a step."""
    return torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(step))


def advance(state: State, step: int, poison: bool = False) -> dict[str, float]:
    """One step on this process's part of the step's batch."""
    world, parts = state.world, state.config.accumulate
    rows = batch_of(step).chunk(world.size)[world.rank]
    for x in rows.chunk(parts):
        y, feature = state.model(x * float("nan") if poison else x)
        with torch.no_grad():
            aim = state.average(x)[0]
        generation = (y - x.sum(1, keepdim=True)).square().mean()
        values = {"generation": generation, "rep": (feature - aim).square().mean()}
        state.backward(values | {"loss": values["generation"] + values["rep"]})
    return state.update(BATCH, f"batch {step}")


def whole(state: State) -> dict[str, Tensor]:
    """All tensors of the state, on every process."""
    kept = state.training()
    parts = {"average": kept.average, "student": kept.student, "optimizer": kept.optimizer}
    named = {f"{part}.{k}": v for part, ts in parts.items() for k, v in ts.items()}
    return {k: v.clone() for k, v in parallel.gather(named, keep=True).items()}


def train(config: LoopConfig, world: World, stop_at: int = -1) -> tuple[list[dict], State]:
    """A run as the scripts have it."""
    state, rows = State(Student(), config, world), []
    with open_run(config, state, "test", {"made up": [1, 1]}) as run:
        for step, _ in run.batches(range(state.step, config.steps)):
            if step == stop_at and world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            values = advance(state, step)
            rows.append(values | {"step": step})
            run.log(BATCH, tokens=BATCH, **values)
            if run.due():
                run.save(META, {})
        run.save(META, {})
        try:
            run.finish()
        except KeyboardInterrupt:
            rows.append({"stopped": state.step})
    return rows, state


MODELS = {
    "prefix": {},
    "full": {"attention": "full", "activation_checkpointing": True},
    "flux": {"model": ModelSize(48, 4, 2, 2.0, family="flux", double_blocks=2, positions="rope")},
}


SIZES = {"model": ModelSize(32, 4, 2, 2.0), "layout": Layout(32, 32, 16, chunk=4, stride=2)}
SHORT = {"batch": 4, "precision": "fp32", "lr": 0.01, "warmup": 0}


def given(config: TrainConfig, step: int) -> tuple[Inputs, flow.Noised, torch.Generator]:
    """A step's whole batch and noise, and the generator that drew them."""
    model, random = config.transformer, generator(0, step)
    clean = {
        m.name: torch.randn(4, m.length, m.channels, generator=random) for m in model.modalities
    }
    noised = flow.draw(clean, model, config.noise, random)
    mask = {m.name: torch.ones_like(clean[m.name]) for m in model.targets}
    return Inputs(clean, {}, mask), noised, random


def pretrain(world: World, name: str, steps: int = 3, **keys: Any) -> list[dict[str, float]]:
    """The real student and its losses on this process's part of a batch, and of its noise."""
    config = TrainConfig(**SIZES | MODELS[name] | SHORT | {"text_dropout": 0.0} | keys)
    torch.manual_seed(0)
    state, values = State(objective.Student(config.transformer), config, world), []
    for step in range(steps):
        inputs, noised, random = given(config, step)
        with patch.object(flow, "draw", return_value=part_of(noised, world)):
            whose = part_of(inputs, world), config, random
            state.backward(objective.losses(state.model, state.average, *whose))
        values.append(state.update(4))
    return values


def finetune(world: World, attention: str, steps: int = 3) -> list[dict[str, float]]:
    """The same of a policy that keeps the Self-Flow loss."""
    keep = {"text_dropout": 0.0, "attention": attention}
    config = FinetuneConfig(**SIZES | SHORT, keep_self_flow=0.5, pretraining=keep)
    torch.manual_seed(0)
    state, values = State(build(config)[0], config, world), []
    for step in range(steps):
        inputs, noised, random = given(config.kept, step)
        noise = torch.randn(4, config.draws, *inputs.tokens["action"].shape[1:], generator=random)
        tau = torch.rand(4, config.draws, generator=random)
        own = [part_of(x, world).transpose(0, 1) for x in (noise, tau)]
        with (
            patch.object(flow, "draw", return_value=part_of(noised, world)),
            patch.object(policy, "head_loss", lambda *seen, own=own: head_loss(*seen[:4], *own)),
        ):
            whose = part_of(inputs, world), config, random, world.device
            state.backward(policy.policy_losses(state, *whose))
        values.append(state.update(4))
    return values


def part_of(value: Any, world: World) -> Any:
    """This process's rows of every tensor in it."""
    if isinstance(value, dict):
        return {k: part_of(v, world) for k, v in value.items()}
    if isinstance(value, (flow.Noised, Inputs)):
        return replace(value, **{k: part_of(v, world) for k, v in vars(value).items()})
    return value if value is None else value.chunk(world.size)[world.rank]


def work(out: Path, resume: Path, world: World) -> None:
    """What each of two processes does in a mode; `resume` is a run of one process."""
    mode = world.mode
    keys = {"save_every": 2, "save_async": mode == "fsdp"}
    report: dict[str, Any] = {"rank": world.rank, "size": world.size}
    report["rows"], state = train(config(out / mode, mode, **keys), world)
    report["kept"] = sum(parallel.local(p).numel() for p in state.student.parameters())
    before = whole(state)
    poisoned = advance(state, STEPS, poison=world.rank == 1)
    after = whole(state)
    report["poisoned"] = {k: str(v) for k, v in poisoned.items()}
    report["skipped"] = state.skipped
    report["same"] = all(torch.equal(before[k], after[k]) for k in before)
    report["accumulated"], _ = train(config(out / f"{mode}_2", mode, accumulate=2), world)
    stopped, _ = train(config(out / f"{mode}_stopped", mode, steps=9), world, stop_at=1)
    report["stopped"] = stopped[-1]
    restored = State(Student(), config(resume, mode), world)
    restored.restore(checkpoint.resolve(resume))
    want = load_file(out / "one.safetensors")
    report["restored"] = all(torch.equal(v, want[k]) for k, v in whole(restored).items())
    report["next"] = advance(restored, STEPS)
    report["pretrained"] = {name: pretrain(world, name) for name in MODELS}
    report["finetuned"] = {name: finetune(world, name) for name in ATTENTION}
    report["half"] = pretrain(world, "prefix", precision="bf16", shard_dtype="bfloat16")
    if world.main:
        save_file(before, out / f"{mode}.safetensors")
    (out / f"{mode}_{world.rank}.json").write_text(json.dumps(report))
    print("AUDIBLE" if world.main else "SILENT")


def launch(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*start, f"--nproc-per-node={processes}", __file__, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    return subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], State]:
    """The same run by one process, beside which the others are put."""
    out = tmp_path_factory.mktemp("parallel")
    rows, state = train(config(out / "one", "none", save_every=STEPS), parallel.ALONE)
    save_file(whole(state), out / "one.safetensors")
    return out, rows, state


@pytest.fixture(scope="module")
def together(alone: tuple[Path, list[dict], State]) -> Path:
    """All that two processes do, in one launch."""
    out = alone[0]
    done = launch(str(out), str(out / "one"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "AUDIBLE" in done.stdout
    assert "SILENT" not in done.stdout
    return out


def reports(out: Path, mode: str) -> list[dict]:
    return [json.loads((out / f"{mode}_{rank}.json").read_text()) for rank in range(2)]


MODES = pytest.mark.parametrize("mode", ["ddp", "fsdp"])


@pytest.mark.slow
@MODES
def test_two_processes_train_as_one(mode: str, alone: tuple, together: Path) -> None:
    for report in reports(together, mode):
        assert (report["size"], report["stopped"]) == (2, {"stopped": 2})
        for rows in (report["rows"], report["accumulated"]):
            assert len(rows) == STEPS
            for row, want in zip(rows, alone[1], strict=True):
                assert row == pytest.approx(want, abs=1e-5)
    a, b = load_file(together / f"{mode}.safetensors"), load_file(together / "one.safetensors")
    assert a.keys() == b.keys()
    assert any(k.startswith("average.") for k in a)
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("name", MODELS)
def test_the_real_losses_are_those_of_one_process(mode: str, name: str, together: Path) -> None:
    want = pretrain(parallel.ALONE, name)
    assert want[0]["loss"] != want[1]["loss"]
    for report in reports(together, mode):
        for row, row_alone in zip(report["pretrained"][name], want, strict=True):
            assert row == pytest.approx(row_alone, abs=1e-5)


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("name", ATTENTION)
def test_the_kept_losses_are_those_of_one_process(mode: str, name: str, together: Path) -> None:
    want = finetune(parallel.ALONE, name)
    assert want[-1]["self_flow"] != want[0]["self_flow"]
    for report in reports(together, mode):
        for row, row_alone in zip(report["finetuned"][name], want, strict=True):
            assert row.keys() >= {"policy", "self_flow", "rep", "grad_norm"}
            assert row == pytest.approx(row_alone, abs=1e-5)


@pytest.mark.slow
def test_blocks_gathered_in_half_precision_train_alike(together: Path) -> None:
    want = pretrain(parallel.ALONE, "prefix", precision="bf16")
    for report in reports(together, "fsdp"):
        assert report["half"] != report["pretrained"]["prefix"]
        for row, row_alone in zip(report["half"], want, strict=True):
            assert row == pytest.approx(row_alone, rel=0.03, abs=0.01)


@pytest.mark.slow
def test_fsdp_keeps_a_part_of_everything(together: Path) -> None:
    count = sum(p.numel() for p in Student().parameters())
    assert [r["kept"] for r in reports(together, "ddp")] == [count, count]
    kept = [r["kept"] for r in reports(together, "fsdp")]
    assert sum(kept) == count
    assert max(kept) < 0.65 * count


@pytest.mark.slow
@MODES
def test_what_is_not_finite_on_one_is_skipped_on_both(mode: str, together: Path) -> None:
    for report in reports(together, mode):
        assert (report["skipped"], report["same"]) == (1, True)
        assert report["poisoned"]["loss"] == "nan"


@pytest.mark.slow
@MODES
def test_one_goes_on_where_two_have_saved(mode: str, together: Path) -> None:
    path = checkpoint.resolve(together / mode)
    assert checkpoint.is_sharded(path) == (mode == "fsdp")
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".safetensors", ".json"}
    state = State(Student(), config(together / mode, "none"))
    state.restore(path)
    saved, now = load_file(together / f"{mode}.safetensors"), whole(state)
    assert saved.keys() == now.keys()
    assert all(torch.equal(saved[k], now[k]) for k in saved)
    user = checkpoint._read_tensors(path / "model.safetensors")
    assert all(torch.equal(user[k], saved["average." + k]) for k in user)
    assert user.keys() == Student().state_dict().keys()


@pytest.mark.slow
@MODES
def test_two_go_on_where_one_has_saved(mode: str, alone: tuple, together: Path) -> None:
    state = State(Student(), config(together / "one", "none"))
    state.restore(checkpoint.resolve(together / "one"))
    want = advance(state, STEPS)
    for report in reports(together, mode):
        assert report["restored"]
        assert report["next"] == pytest.approx(want, abs=1e-5)


@pytest.mark.slow
def test_shards_that_do_not_fit_are_a_line(together: Path, tmp_path: Path) -> None:
    path = checkpoint.resolve(together / "fsdp")

    def message(student: nn.Module, where: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            State(student, config(tmp_path, "none")).restore(where)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    class Wider(Student):
        def __init__(self) -> None:
            super().__init__()
            self.projector = nn.Linear(5, 6)

    class More(Student):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(5, 6)

    assert "Size mismatch" in message(Wider(), path)
    assert "does not fit this model: average.more.bias" in message(More(), path)
    damaged = tmp_path / "damaged"
    shutil.copytree(path, damaged)
    shards = sorted((damaged / "train" / "shards").iterdir())
    assert len(shards) == 2
    shards[0].rename(tmp_path / "kept")
    assert "are missing" in message(Student(), damaged)
    (tmp_path / "kept").rename(shards[0])
    shards[0].write_bytes(b"damaged")
    assert "cannot be read" in message(Student(), damaged)


@pytest.mark.slow
def test_the_end_of_one_is_the_end_of_all(tmp_path: Path) -> None:
    before = time.monotonic()
    done = launch(str(tmp_path), "dies")
    assert done.returncode != 0
    assert time.monotonic() - before < 60


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with start(config(folder, "auto")) as joined:
        if sys.argv[2] == "dies":
            if joined.rank == 1:
                raise SystemExit(3)
            joined.first(0)
            joined.meet()
        else:
            work(folder, Path(sys.argv[2]), joined)  # ddp
            work(folder, Path(sys.argv[2]), replace(joined, mode="fsdp"))
