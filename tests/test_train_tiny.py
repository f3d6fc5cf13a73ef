"""Both training scripts on real episodes, and that a killed run goes on to the same losses."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from selfflow.configs.entry import compose
from selfflow.datasets.normalize import FEATURES
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import ACTION_DIM, UserError
from selfflow.datasets.text import TEXT_DIM, text_encoder
from selfflow.datasets.windows import Mixture
from selfflow.policies import finetune
from selfflow.policies.finetune import FinetuneConfig
from selfflow.policies.flow_policy import load_policy
from selfflow.worldmodel import batches, checkpoint, loop, train
from selfflow.worldmodel.batches import Inputs
from selfflow.worldmodel.layout import (
    ACTION_CHANNELS,
    PROPRIO_CHANNELS,
    TEXT_CHANNELS,
    Extra,
    Layout,
)
from selfflow.worldmodel.objective import Student, losses
from selfflow.worldmodel.train_config import ModelSize, TrainConfig

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT.parent / "shared" / "samples"
BRIDGE = SAMPLES / "octo_bridge_debug"
CLIP = SAMPLES / "maniskill2_real2sim" / "rt1_real_standing_coke_can_1.mp4"
SIZE = ModelSize(hidden=32, depth=4, heads=2, mlp_ratio=2.0)
real = pytest.mark.skipif(not BRIDGE.exists(), reason="no ../shared/samples: real episodes")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pretraining(store: Path, out: Path, data: list[str] | None = None) -> TrainConfig:
    return TrainConfig(
        data=data or [str(store)],
        out=str(out),
        steps=6,
        batch=3,
        warmup=1,
        schedule="constant",
        precision="fp32",
        threads=1,
        save_every=2,
        model=SIZE,
        layout=Layout(32, 32, 16, chunk=4, stride=2),
    )


def finetuning(store: Path, out: Path, init: Path | None = None) -> FinetuneConfig:
    return FinetuneConfig(
        data=str(store),
        out=str(out),
        steps=6,
        batch=3,
        warmup=1,
        schedule="constant",
        precision="fp32",
        threads=1,
        save_every=2,
        init=str(init) if init else None,
        model=SIZE,
        layout=Layout(32, 32, 16, future=0, chunk=4, stride=2),
        jitter=0.2,
        proprio_dropout=0.3,
        export="float16",
    )


SCRIPTS = {"train": (train.main, pretraining), "finetune": (finetune.main, finetuning)}


def read(config: TrainConfig, size: int) -> Inputs:
    """One batch of the config's data as tokens, without statistics."""
    sources, weights = open_sources(config.sources)
    batch = Mixture(sources, weights, train.request(config), 0).batch(0, size)
    codec = batches.codec_of(config.layout)
    return train.read_with(config, sources, {}, codec, None).tokens(batch)


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def logged(out: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in log(out)]


@real
def test_trains_on_real_episodes_and_a_clip_without_actions(store: Path, tmp_path: Path) -> None:
    data = [f"{BRIDGE}@0.5", f"{CLIP}@0.25", f"{store}@0.25"]
    config = replace(pretraining(store, tmp_path / "out", data), batch=8, lr=1e-3)
    train.main(config)
    rows = log(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite([row["video"], row["action"], row["rep"]]).all() for row in rows)
    assert rows[0]["cosine"] == pytest.approx(1 - rows[0]["rep"])
    assert rows[-1]["loss"] < rows[0]["loss"]
    kept = checkpoint.load(tmp_path / "out", "worldmodel")
    assert set(kept.statistics) == {"widowx", "google_robot"}
    assert kept.config["provenance"]["step"] == 6


@real
def test_a_clips_actions_are_absent_from_the_loss(store: Path, tmp_path: Path) -> None:
    config = pretraining(store, tmp_path, [str(CLIP)])
    inputs = read(config, 4)
    assert not inputs.valid["action"].any()
    assert (inputs.mask["action"] == 0).all()
    assert inputs.valid["video"].any()
    student = Student(config.transformer)
    average = Student(config.transformer)

    def gradients(actions: torch.Tensor) -> list[torch.Tensor]:
        tokens = inputs.tokens | {"action": actions}
        changed = replace(inputs, tokens=tokens)
        values = losses(student, average, changed, config, loop.generator(0, 0))
        assert values["action"] == 0
        student.zero_grad(set_to_none=False)
        values["loss"].backward()
        return [p.grad.clone() for p in student.parameters() if p.grad is not None]

    before = gradients(inputs.tokens["action"])
    after = gradients(inputs.tokens["action"] + 100)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(before, after, strict=True))


def test_no_gradient_reaches_the_teacher_and_every_objective_has_its_terms(store: Path) -> None:
    for objective, terms in (
        ("vanilla", {"loss", "video", "action"}),
        ("dual", {"loss", "video", "action"}),
        ("self_flow", {"loss", "video", "action", "rep", "cosine"}),
        ("sra", {"loss", "video", "action", "rep", "cosine"}),
        ("diffusion_forcing", {"loss", "video", "action"}),
        ("full_masking", {"loss", "video", "action"}),
    ):
        config = replace(pretraining(store, Path("unused")), objective=objective)
        state = loop.State(Student(config.transformer), config)
        state.average.requires_grad_(True)  # so that a missing stop-gradient would show
        inputs = read(config, 2)
        values = losses(state.student, state.average, inputs, config, loop.generator(0, 0))
        assert set(values) == terms
        values["loss"].backward()
        assert all(p.grad is None for p in state.average.parameters())
        total = values["video"] + values["action"] + 0.8 * values.get("rep", torch.zeros(()))
        assert values["loss"].item() == pytest.approx(total.item())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_run_goes_on_to_the_same_losses(
    script: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, make = SCRIPTS[script]
    main(make(store, tmp_path / "whole"))
    update = loop.State.update

    def dies(self: loop.State, *args: object, **kwargs: object) -> dict[str, float]:
        if self.step == 5:
            raise SystemExit  # step 5 is logged, the last checkpoint is of step 4
        return update(self, *args, **kwargs)

    monkeypatch.setattr(loop.State, "update", dies)
    with pytest.raises(SystemExit):
        main(make(store, tmp_path / "killed"))
    assert len(log(tmp_path / "killed")) == 5
    monkeypatch.setattr(loop.State, "update", update)
    main(make(store, tmp_path / "killed"))
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    a, b = (checkpoint.load(tmp_path / name).weights for name in ("whole", "killed"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_sigkill_and_again(store: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        keys = "steps=40 batch=3 warmup=1 precision=fp32 threads=1 save_every=5 save_minutes=9"
        size = "model.hidden=32 model.depth=4 model.heads=2 layout.height=32 layout.width=32"
        start = [sys.executable, str(ROOT / "worldmodel" / "train.py"), f"data=[{store}]"]
        return [*start, f"out={out}", *keys.split(), *size.split()]

    run: Callable[[Path], object] = lambda out: subprocess.run(command(out), check=True)  # noqa: E731
    run(tmp_path / "whole")
    process = subprocess.Popen(command(tmp_path / "killed"))
    path = tmp_path / "killed" / "log.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < 12:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run(tmp_path / "killed")
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert len(logged(tmp_path / "killed")) == 40


def test_a_signal_saves_and_stops(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = loop.State.update

    def interrupted(self: loop.State, *args: object, **kwargs: object) -> dict[str, float]:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *args, **kwargs)

    monkeypatch.setattr(loop.State, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(replace(pretraining(store, tmp_path), save_every=100))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_from_pretraining_to_actions(store: Path, tmp_path: Path) -> None:
    train.main(replace(pretraining(store, tmp_path / "pre"), steps=2))
    config = replace(finetuning(store, tmp_path / "policy", tmp_path / "pre"), steps=2)
    student, _ = finetune.build(config)
    pretrained = checkpoint.load(tmp_path / "pre").part("backbone")
    assert all(torch.equal(v, pretrained[k]) for k, v in student.backbone.state_dict().items())
    finetune.check(config)
    finetune.main(config)
    policy = load_policy(tmp_path / "policy", "google_robot")
    observation = {
        "images": {"overhead_camera": np.zeros((64, 80, 3), np.uint8)},
        "proprio": np.array([0.5, 0.5, 0.5, 1, 0, 0, 0, 1], np.float32),
        "instruction": "open top drawer",
    }
    chunk = policy.act(observation)
    assert chunk.actions.shape == (4, 7)
    # a policy can be the start of the next one
    finetune.main(replace(finetuning(store, tmp_path / "more", tmp_path / "policy"), steps=1))
    with pytest.raises(UserError, match="statistics"):
        load_policy(tmp_path / "policy", "widowx")
    with pytest.raises(UserError, match=r"finetune\.py"):
        load_policy(tmp_path / "pre", "google_robot")


def test_mistakes_are_one_line_before_any_work(store: Path, tmp_path: Path) -> None:
    def message(config: TrainConfig | FinetuneConfig) -> str:
        module = finetune if isinstance(config, FinetuneConfig) else train
        with pytest.raises(UserError) as caught:
            module.check(config)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    config = replace(pretraining(store, tmp_path / "run"), steps=1)
    train.main(config)
    train.check(replace(config, steps=9, minutes=1.0, threads=2))
    assert "lr (was 0.0003, now 0.1)" in message(replace(config, lr=0.1))
    assert "name at least one source" in message(TrainConfig())
    assert "no such folder" in message(finetuning(store, tmp_path / "x", tmp_path / "nowhere"))
    wide = replace(finetuning(store, tmp_path / "x", tmp_path / "run"), model=ModelSize(64, 4, 2))
    assert "hidden (init 32, here 64)" in message(wide)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="self_flow"):
        compose(TrainConfig, "train", ["objective=selfflow"])
    with pytest.raises(UserError, match="learning_rate"):
        compose(FinetuneConfig, "finetune", ["learning_rate=1"])
    with pytest.raises(UserError, match="execute=9"):
        compose(FinetuneConfig, "finetune", ["execute=9"])


@real
def test_data_that_cannot_be_used_leaves_no_folder(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    clip = f"{CLIP}@1e-9"  # found out, though it is hardly ever drawn
    with pytest.raises(UserError, match="no actions to learn from"):
        finetune.main(replace(finetuning(store, out), data=[str(store), clip]))
    with pytest.raises(UserError, match="not recognised"):
        train.main(replace(pretraining(store, out), data=str(tmp_path)))
    assert not out.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_needs_the_same_data(script: str, store: Path, tmp_path: Path) -> None:
    main, make = SCRIPTS[script]
    main(replace(make(store, tmp_path), steps=1))
    state = checkpoint.resolve(tmp_path) / "train" / "state.json"
    values = json.loads(state.read_text())
    assert values["data"] == {"store": [2, 24]}
    checkpoint.write_json(state, values | {"data": {"store": [3, 24]}})
    with pytest.raises(UserError, match="store has 2 episodes of 24 steps now, had 3 of 24"):
        main(replace(make(store, tmp_path), steps=2))
    checkpoint.write_json(state, {k: v for k, v in values.items() if k != "data"})
    main(replace(make(store, tmp_path), steps=2))  # a checkpoint of before the field


def test_a_damaged_init_is_one_line(store: Path, tmp_path: Path) -> None:
    train.main(replace(pretraining(store, tmp_path / "pre"), steps=1))
    path = checkpoint.resolve(tmp_path / "pre") / "config.json"
    values = json.loads(path.read_text())
    checkpoint.write_json(path, values | {"model": {"hidden": 32}})
    with pytest.raises(UserError, match=r"damaged or foreign \(KeyError: 'modalities'\)"):
        finetune.check(finetuning(store, tmp_path / "x", tmp_path / "pre"))


@pytest.mark.parametrize(
    "key", ["device=foo", "device=cuda:", "seed=-1", "threads=-1", "minutes=-1", "lr=nan"]
)
def test_values_out_of_range_are_one_line(key: str) -> None:
    for config, name in ((TrainConfig, "train"), (FinetuneConfig, "finetune")):
        with pytest.raises(UserError, match=key.split("=")[0]) as caught:
            compose(config, name, [key])
        assert "\n" not in str(caught.value)


def test_configs_and_defaults_are_the_same() -> None:
    assert compose(TrainConfig, "train", []) == TrainConfig()
    assert compose(FinetuneConfig, "finetune", []) == FinetuneConfig()
    added = compose(TrainConfig, "train", ["+extra.force={key: force, channels: 6, length: 8}"])
    assert added.extra == {"force": Extra("force", 6, 8)}
    large = compose(TrainConfig, "train", ["model=selfflow_675m", "attention=full"])
    assert large.blocks == (8, 20)
    assert compose(FinetuneConfig, "finetune", ["init=some/run"]).encoder.depth == 4


def test_what_both_sides_of_a_layer_hold_twice() -> None:
    assert (TEXT_CHANNELS["hash384"], PROPRIO_CHANNELS) == (TEXT_DIM, FEATURES)
    for name in ("hash384", "minilm", "table"):
        assert text_encoder(name).channels == TEXT_CHANNELS[name]
    assert ACTION_DIM + 1 == ACTION_CHANNELS
