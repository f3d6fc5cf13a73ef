"""A run folder: whom it admits, what is refused in a line, and what shows without a terminal."""

import os
import signal
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from selfflow.worldmodel import checkpoint, trackers
from selfflow.worldmodel.errors import RunError
from selfflow.worldmodel.loop import LoopConfig, State, start
from selfflow.worldmodel.run_folder import check_run, open_run

DATA = {"made up": [2, 24]}
META = {"format": 1, "kind": "policy"}


@pytest.fixture
def config(tmp_path: Path) -> LoopConfig:
    return LoopConfig(data="a", out=str(tmp_path / "out"), steps=3, warmup=0)


def train(config: LoopConfig) -> State:
    """Every step of a run of the smallest model."""
    state = State(nn.Linear(3, 2), config)
    with open_run(config, state, "test", DATA) as run:
        for _, x in run.batches(torch.ones(4, 3) for _ in range(config.steps)):
            loss = state.student(x).square().mean()
            state.backward({"loss": loss})
            run.log(4, **state.update(4))
        run.save(META, {})
        run.finish()
    return state


def message(config: LoopConfig) -> str:
    with pytest.raises(RunError) as caught:
        check_run(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_of_another_config_is_refused(config: LoopConfig) -> None:
    train(config)
    check_run(replace(config, steps=9, threads=2))
    assert "lr (was 0.0003, now 0.1)" in message(replace(config, lr=0.1))


def test_a_run_without_a_checkpoint_may_begin_again(config: LoopConfig) -> None:
    with open_run(config, State(nn.Linear(3, 2), config), "test", DATA):
        pass  # it ended before its first checkpoint
    other = replace(config, data="b", lr=0.1)
    check_run(other)
    train(other)
    assert "lr (was 0.1" in message(config)


def test_what_is_no_run_folder_is_left_alone(config: LoopConfig) -> None:
    out = Path(config.out)
    out.mkdir()
    for text, says in (("", "cannot be read"), ("[1]", "not an object"), ("{}", "not a training")):
        (out / "config.json").write_text(text)
        assert says in message(config)
    train(replace(config, out=str(out / "run")))
    assert "is a checkpoint" in message(replace(config, out=str(checkpoint.last(out / "run"))))
    (out / "run" / "config.json").unlink()
    assert "cannot be read" in message(replace(config, out=str(out / "run")))
    assert "name at least one source" in message(LoopConfig())
    with (
        pytest.raises(RunError, match="cannot be written"),
        open_run(
            replace(config, out=str(out / "config.json")), State(nn.Linear(1, 1), config), "", {}
        ),
    ):
        pass


def test_changed_data_is_refused(config: LoopConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config)
    monkeypatch.setitem(DATA, "made up", [3, 30])
    before = (Path(config.out) / "log.jsonl").read_text()
    with pytest.raises(RunError, match="made up has 3 episodes of 30 steps now, had 2 of 24"):
        train(replace(config, steps=5))
    assert (Path(config.out) / "log.jsonl").read_text() == before


def test_one_process_at_a_time(config: LoopConfig) -> None:
    with open_run(config, State(nn.Linear(3, 2), config), "test", DATA):
        assert "another process trains in it" in message(config)
        with pytest.raises(RunError, match="another process trains in it"):
            train(config)
    check_run(config)
    train(config)  # the lock ended with the block


def test_a_missing_cuda_device_is_a_line_before_anything_is_written(config: LoopConfig) -> None:
    if torch.cuda.is_available():
        config = replace(config, device="cuda:99")
    else:
        config = replace(config, device="cuda")
    assert "CUDA devices" in message(config)
    with pytest.raises(RunError, match="CUDA devices"), start(config):
        pass
    assert not Path(config.out).exists()


def test_progress_is_told_without_a_terminal(
    config: LoopConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    train(config)
    assert "test step" not in capsys.readouterr().out  # 30 s are not over
    monkeypatch.setattr(trackers, "TELL_SECONDS", 0.0)
    train(replace(config, out=config.out + "2"))
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("test step")]
    assert len(lines) == 3
    assert lines[2].startswith("test step 3 of 3, loss ")
    assert lines[2].endswith(" samples/s")


def test_keys_that_came_later_count_as_their_defaults(config: LoopConfig) -> None:
    train(config)
    path = Path(config.out) / "config.json"
    old = checkpoint.read_json(path)
    later = ("betas", "accumulate", "parallel", "log", "save_async")
    checkpoint.write_json(path, {k: v for k, v in old.items() if k not in later})
    check_run(replace(config, accumulate=2, parallel="auto", save_async=True, log=["tensorboard"]))
    assert "betas (was [0.9, 0.999], now [0.8, 0.9])" in message(replace(config, betas=[0.8, 0.9]))


@dataclass(frozen=True)
class Nested:
    size: int = 3
    added: int = 0


@dataclass(frozen=True)
class Wider(LoopConfig):
    model: Nested = field(default_factory=Nested)


def test_nested_keys_that_came_later_too(config: LoopConfig) -> None:
    wide = Wider(data="a", out=config.out, steps=1)
    train(wide)
    path = Path(config.out) / "config.json"
    checkpoint.write_json(path, checkpoint.read_json(path) | {"model": {"size": 3}})
    check_run(wide)
    assert "model (was" in message(replace(wide, model=Nested(added=1)))


def test_a_checkpoint_is_written_while_training_goes_on(
    config: LoopConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, save_async=True, save_every=1, keep=3, steps=4)
    save, order = checkpoint.save, []

    def slow(*arguments: Any) -> Path:
        time.sleep(0.05)
        order.append(threading.current_thread() is threading.main_thread())
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    state = State(nn.Linear(3, 2), config)
    want: list[list[torch.Tensor]] = []
    with open_run(config, state, "test", DATA) as run:
        for _, x in run.batches(torch.ones(4, 3) for _ in range(config.steps)):
            state.backward({"loss": state.student(x).square().mean()})
            run.log(4, **state.update(4))
            want.append([m.weight.detach().clone() for m in (state.student, state.average)])
            run.save(META, {})
        run.finish()
    assert order == [False] * 4
    for step in (2, 3, 4):  # as they were at their step, not as they are when written
        kept = checkpoint.load_training(checkpoint.folder(Path(config.out), step))
        assert torch.equal(kept.student["weight"], want[step - 1][0])
        assert torch.equal(kept.average["weight"], want[step - 1][1])


def test_what_goes_wrong_while_saving_is_raised(
    config: LoopConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> Path:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save", fails)
    with pytest.raises(OSError, match="no space left"):
        train(replace(config, save_async=True))


def test_submitit_is_told_after_the_save(config: LoopConfig) -> None:
    seen: list[int | None] = []

    def handler(number: int, frame: object) -> None:
        kept = checkpoint.last(Path(config.out))
        seen.append(checkpoint.step_of(kept) if kept else None)

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        state = State(nn.Linear(3, 2), config)
        with open_run(config, state, "test", DATA) as run:
            for _, x in run.batches(torch.ones(4, 3) for _ in range(config.steps)):
                state.backward({"loss": state.student(x).square().mean()})
                run.log(4, **state.update(4))
                os.kill(os.getpid(), signal.SIGUSR2)
            run.save(META, {})
            assert seen == []
            run.finish()
        assert seen == [1]
    finally:
        signal.signal(signal.SIGUSR2, before)
