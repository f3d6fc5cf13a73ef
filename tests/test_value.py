"""Best of N: progress as a target, the value head beside its checkpoint, and the choice by it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from selfflow.configs.entry import compose
from selfflow.datasets.normalize import denormalize_action
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import UserError
from selfflow.datasets.windows import Place
from selfflow.eval.parts import RolloutConfig
from selfflow.policies import export, finetune, value
from selfflow.policies.export import ExportConfig
from selfflow.policies.finetune_config import FinetuneConfig
from selfflow.policies.flow_policy import FlowPolicy, load_policy
from selfflow.policies.joint_policy import JointPolicy
from selfflow.policies.judging import (
    ABOUT,
    WEIGHTS,
    Eyes,
    Judge,
    Sharing,
    ValueHead,
    ValueSizes,
    repeated,
    save_value,
)
from selfflow.policies.progress import Progress, runs, share
from selfflow.policies.value import ValueConfig
from selfflow.worldmodel.checkpoint import load, resolve
from selfflow.worldmodel.dream import Sampling, dream
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.train_config import ModelSize

BUNDLED = Path(__file__).parents[1] / "checkpoints" / "twin"
LAYOUT = Layout(32, 32, 16, chunk=4, stride=2)
SMALL: dict[str, Any] = {"batch": 4, "warmup": 1, "precision": "fp32", "threads": 1}
SIZES = ValueSizes(width=32, block=3, queries=2, hidden=8, steps=2)


def observation(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "images": {"overhead_camera": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)},
        "proprio": np.array([0.1, 0.2, 0.3, 1, 0, 0, 0, 0.5], np.float32),
        "instruction": "open top drawer",
    }


@pytest.fixture(scope="module")
def made(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that kept its whole backbone, with random weights; it never terminates."""
    out = tmp_path_factory.mktemp("runs") / "policy"
    model = ModelSize(hidden=32, depth=4, heads=2, mlp_ratio=2.0)
    keys = {"data": str(store), "out": str(out), "steps": 1, "keep_backbone": True}
    finetune.main(FinetuneConfig(**keys, model=model, layout=LAYOUT, **SMALL))
    file = resolve(out) / "model.safetensors"
    random = torch.Generator().manual_seed(0)
    weights = {k: torch.randn(v.shape, generator=random) / 10 for k, v in load_file(file).items()}
    for output in ("head.output", "backbone.outputs.action"):
        weights[f"{output}.weight"][7], weights[f"{output}.bias"][7] = 0, 10
    save_file(weights, file)
    return file.parent


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "policy"))


def with_head(checkpoint: Path) -> Path:
    torch.manual_seed(1)
    other = {"format": 99}  # a checkpoint's
    save_value(checkpoint, SIZES, ValueHead(SIZES).state_dict(), other)
    return checkpoint


def test_progress_is_the_share_of_the_subtask_that_is_done(store: Path):
    begins, ends = runs(["a", "a", "a", "b", "a"])
    assert (begins.tolist(), ends.tolist()) == ([0, 0, 0, 3, 4], [2, 2, 2, 3, 4])
    assert [share(t, 2, 6) for t in (2, 3, 6, 9)] == [0, 0.25, 1, 1]
    assert share(3, 3, 3) == 0  # a subtask of one step has only begun
    sources, _ = open_sources([str(store)])
    done, weight = Progress(sources, ahead=2).of([Place(0, 0, 0), Place(0, 1, 10)])
    torch.testing.assert_close(done, torch.tensor([2 / 11, 1.0]))
    assert weight.tolist() == [1, 1]
    # formats write it as they like
    for yes, no in ((True, False), (1, 0), (np.True_, np.False_), (None, 0.0)):
        told = [{"success": yes}, {"success": no}]
        sources[0].metadata = told.__getitem__  # type: ignore[method-assign]
        assert Progress(sources, 2).of([Place(0, 0, 0), Place(0, 1, 10)])[1].tolist() == [1, 0]


def painted(bright: torch.Tensor) -> torch.Tensor:
    return (128 + 30 * bright).byte()[:, None, None, None].expand(-1, 32, 32, 3)


class Painter(Eyes):
    """Imagines frames as bright as the chunk's first action is large, and sees brightness."""

    def imagine(self, tokens, valid, chunks, steps, generator, alike=False):
        assert alike
        return painted(chunks[:, 0, 0])

    def features(self, frames, tokens, block):
        return frames.float().mean((1, 2, 3))[:, None, None]


class Bright(ValueHead):
    def forward(self, features):
        return features[:, 0, 0]


def test_the_chunk_is_executed_whose_end_is_worth_most(made: Path):
    plain = load_policy(made, seed=3)
    assert isinstance(plain, FlowPolicy)
    parts, count = plain.parts, 5
    eyes = Painter(parts.model.backbone, parts.layout, parts.codec)
    how = replace(plain.decoding, best_of=count)
    policy = FlowPolicy(parts, plain.robot, how, 3, Judge(eyes, Bright(SIZES)))
    found = policy.act(observation()).actions
    with torch.no_grad():
        field = plain._field(*plain._observer.tokens(observation(), 0))
        x = torch.randn(count, 4, 8, generator=torch.Generator().manual_seed(3))
        for k in range(plain.steps):
            x = x - field(x, 1 - k / plain.steps) / plain.steps
    first = x[:, 0, 0]
    assert len(painted(first).unique()) == count
    best = denormalize_action(x[int(first.argmax()), : plain.execute, :7].numpy(), parts.statistics)
    np.testing.assert_allclose(found[:, :6], best[:, :6], atol=1e-5)


def test_one_chunk_is_what_it_was_and_a_seed_fixes_the_choice(checkpoint: Path):
    plain = [load_policy(checkpoint, seed=1).act(observation(i)).actions for i in range(2)]
    with_head(checkpoint)
    same = [load_policy(checkpoint, seed=1, best_of=1).act(observation(i)) for i in range(2)]
    np.testing.assert_array_equal(plain, [chunk.actions for chunk in same])
    for decode in ("head", "joint"):
        again = []
        for _ in range(2):
            policy = load_policy(checkpoint, seed=1, best_of=3, decode=decode, steps=2)
            again.append([policy.act(observation(i)).actions for i in range(2)])
        np.testing.assert_array_equal(*again)
    assert isinstance(policy, JointPolicy)


@pytest.mark.parametrize("attention", ["prefix", "full"])
def test_conditions_are_read_once_for_candidates_that_share_them(made: Path, attention: str):
    policy = load_policy(made)
    assert isinstance(policy, FlowPolicy)
    model = policy.parts.model.backbone
    model.config = replace(model.config, attention=attention)
    tokens, valid = (repeated(x, 3) for x in policy._observer.tokens(observation(), 0))
    chunks = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 4, 768, generator=torch.Generator().manual_seed(5)).expand(3, -1, -1)
    how = Sampling(steps=2)
    given, start = {"action": chunks}, {"video": noise}
    found = [
        dream(m, tokens, valid, how, torch.Generator(), given, noise=start)["video"]
        for m in (model, Sharing(model))
    ]
    torch.testing.assert_close(*found)
    eyes = Eyes(model, policy.parts.layout, policy.parts.codec)
    random = torch.Generator().manual_seed(5)
    frames = eyes.imagine(tokens, valid, chunks, 2, random, alike=True)
    np.testing.assert_array_equal(frames, policy.parts.codec.decode(found[1])[:, 0])
    assert (frames[0] != frames[1]).any()  # by the actions alone


def test_an_imagined_frame_is_read_as_a_real_one_without_proprioception(made: Path):
    policy = load_policy(made)
    assert isinstance(policy, FlowPolicy)
    codec = policy.parts.codec
    eyes = Eyes(policy.parts.model.backbone, policy.parts.layout, codec)
    tokens, _ = policy._observer.tokens(observation(), 0)
    real = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    imagined = codec.decode(codec.encode(real[:, None]))[:, -1]
    moved = tokens | {"proprio": tokens["proprio"] + 1, "context": tokens["context"] + 1}
    seen = [eyes.features(real, tokens, 3), eyes.features(imagined, moved, 3)]
    assert torch.equal(*seen)
    other = tokens | {"text": tokens["text"] + 1}
    assert not torch.allclose(seen[0], eyes.features(real, other, 3))


def test_a_bundle_takes_the_head_along_and_a_rollout_knows_it(checkpoint: Path, tmp_path: Path):
    bundle = tmp_path / "bundle"
    export.main(ExportConfig(str(with_head(checkpoint)), str(bundle)))
    told = []
    for folder in (checkpoint, bundle):
        policy = load_policy(folder, seed=1, best_of=3)
        told.append(policy.act(observation()).actions)
    np.testing.assert_array_equal(*told)
    config = compose(RolloutConfig, "rollout", [f"checkpoint={checkpoint}", "best_of=3"])
    assert config.decoding["best_of"] == 3
    before = config.identity()
    assert before["best_of"] == 3
    assert "best_of" not in replace(config, best_of=1).identity()
    save_value(checkpoint, SIZES, ValueHead(SIZES).state_dict(), {})  # another head
    assert config.identity()["checkpoint"] != before["checkpoint"]


def test_a_head_that_does_not_belong_is_refused_in_a_line(checkpoint: Path):
    with pytest.raises(UserError, match=r"best_of=2: no value\.safetensors.*policies/value\.py"):
        load_policy(checkpoint, best_of=2)
    with pytest.raises(UserError, match=r"cannot imagine frames.*keep_backbone=true"):
        load_policy(BUNDLED, best_of=2)
    with pytest.raises(UserError, match="best_of=0"):
        load_policy(BUNDLED, best_of=0)
    with_head(checkpoint)
    about = json.loads((checkpoint / ABOUT).read_text())
    (checkpoint / ABOUT).write_text(json.dumps(about | {"backbone": "another"}))
    with pytest.raises(UserError, match="reads a backbone of other weights"):
        load_policy(checkpoint, best_of=2)
    (checkpoint / ABOUT).write_text(json.dumps(about | {"sizes": {}}))
    with pytest.raises(UserError, match="damaged or foreign"):
        load_policy(checkpoint, best_of=2)
    wide = about["sizes"] | {"hidden": 9}
    (checkpoint / ABOUT).write_text(json.dumps(about | {"sizes": wide}))
    with pytest.raises(UserError, match="does not fit this model"):
        load_policy(checkpoint, best_of=2)
    (checkpoint / WEIGHTS).write_bytes(b"nothing")
    (checkpoint / ABOUT).write_text(json.dumps(about))
    with pytest.raises(UserError, match="cannot be read"):
        load_policy(checkpoint, best_of=2)
    assert load_policy(checkpoint).act(observation())


def configured(checkpoint: Path, store: Path, *more: str) -> ValueConfig:
    out = checkpoint.parent / "value"
    keys = [f"init={checkpoint}", f"data={store}", f"out={out}", "batch=4", "threads=1"]
    return compose(ValueConfig, "value", [*keys, "precision=fp32", "lr=0.01", *more])


def test_training_puts_a_head_beside_its_checkpoint_and_goes_on(
    checkpoint: Path, store: Path, capsys: pytest.CaptureFixture[str]
):
    config = configured(checkpoint, store, "steps=3", "accumulate=2", "imagine_steps=1")
    value.check(config)
    value.main(config)
    policy = load_policy(checkpoint, best_of=2)
    assert policy.act(observation()).actions.shape == (4, 7)
    first = (checkpoint / WEIGHTS).read_bytes()
    config = replace(config, steps=4, heldout=[str(store)])
    value.main(config)
    assert (checkpoint / WEIGHTS).read_bytes() != first
    note = json.loads((checkpoint / ABOUT).read_text())
    assert note["step"] == 4
    assert note["held_out"]["real"]["frames"] == note["held_out"]["imagined"]["frames"] == 24
    rows = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["failed"] == 0 for row in rows)
    assert "held out, imagined frames" in capsys.readouterr().out


def test_a_head_learns_progress_from_frames_that_show_it(checkpoint: Path, store: Path):
    """Of frames of one brightness each: the brighter, the further."""
    config = configured(checkpoint, store)
    watcher = value.watch(load(checkpoint), config, torch.device("cpu"))
    torch.manual_seed(0)
    head = ValueHead(watcher.sizes)
    bright = torch.linspace(0, 1, 16)
    frames = painted(4 * bright - 2)
    tokens = {"text": torch.zeros(16, 1, 384), "robot": torch.zeros(16, 1, 17)}
    features = watcher.eyes.features(frames, tokens, watcher.sizes.block)
    optimizer = torch.optim.AdamW(head.parameters(), 0.01)
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(features), bright)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    guess = head(features).sigmoid()
    assert value.quality(bright, guess.detach())["r2"] > 0.9


def test_a_run_does_not_go_on_with_another_backbone(checkpoint: Path, store: Path) -> None:
    """Its head would be sold as that backbone's."""
    config = configured(checkpoint, store, "steps=1", "imagined=0.0")
    value.main(config)
    value.check(config)
    weights = load_file(checkpoint / "model.safetensors")
    weights["head.output.bias"] += 1
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(UserError, match="holds a head for another backbone"):
        value.check(config)


def test_held_out_failures_are_left_out_and_counted(
    checkpoint: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configured(checkpoint, store, f"heldout=[{store}]")
    kind = type(open_sources([str(store)])[0][0])
    monkeypatch.setattr(kind, "metadata", lambda self, i: {"success": i == 1})
    watcher = value.watch(load(checkpoint), config, torch.device("cpu"))
    seen = [batch.ids for batch, _ in value.held_out(config, watcher)]
    assert {episode for ids in seen for _, episode, _ in ids} == {1}
    assert "1 episodes are failures and left out" in capsys.readouterr().out
    monkeypatch.setattr(kind, "metadata", lambda self, i: {"success": False})
    with pytest.raises(UserError, match="heldout: all of its episodes are failures"):
        value.check(config)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("imagined=2.0", "imagined=2.0"),
        ("queries=0", "queries"),
        ("parallel=fsdp", "too small to shard"),
        (f"init={BUNDLED}", "cannot imagine frames"),
    ],
)
def test_mistakes_are_one_line(key: str, says: str, checkpoint: Path, store: Path):
    with pytest.raises(UserError, match=says):
        value.check(configured(checkpoint, store, key))


def test_init_is_required():
    with pytest.raises(UserError, match=r"init=\.\.\. is required"):
        value.check(compose(ValueConfig, "value", ["data=x"]))
