"""What fine-tuning trains, what it keeps, and what stays to the bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from selfflow.configs.entry import compose
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import UserError
from selfflow.datasets.windows import Mixture
from selfflow.policies import finetune, lora
from selfflow.policies.finetune_config import FinetuneConfig, LoraSize
from selfflow.policies.flow_policy import load_policy
from selfflow.policies.head import PolicyModel
from selfflow.policies.student import build, trained, usable
from selfflow.worldmodel import batches, checkpoint, train
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.loop import State, generator
from selfflow.worldmodel.train_config import ModelSize, TrainConfig

SMALL: dict[str, Any] = {
    "batch": 3,
    "warmup": 1,
    "schedule": "constant",
    "precision": "fp32",
    "threads": 1,
    "model": ModelSize(hidden=32, depth=4, heads=2, mlp_ratio=2.0),
}
LAYOUT = Layout(32, 32, 16, chunk=4, stride=2)
PARTS = {
    "full": ("backbone.time", "backbone.inputs", "backbone.blocks.0", "backbone.blocks.2", "head"),
    "head": ("head",),
    "last": ("backbone.blocks.1", "backbone.blocks.2", "head"),
    "lora": ("backbone.blocks.0", "backbone.blocks.1", "backbone.blocks.2", "head"),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pretrained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pre"
    train.main(TrainConfig(data=str(store), out=str(out), steps=2, layout=LAYOUT, **SMALL))
    return out


@pytest.fixture
def config(store: Path, tmp_path: Path, pretrained: Path) -> FinetuneConfig:
    return FinetuneConfig(
        data=str(store),
        out=str(tmp_path / "policy"),
        steps=4,
        save_every=2,
        init=str(pretrained),
        layout=replace(LAYOUT, future=0),
        **SMALL,
    )


def whole(config: FinetuneConfig, **keys: Any) -> FinetuneConfig:
    return replace(config, layout=LAYOUT, **keys)


def logged(out: str) -> list[tuple]:
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def shortened(name: str) -> str:
    """backbone.blocks.1.mlp.0.weight -> backbone.blocks.1, and head. ... -> head."""
    part, *rest = name.split(".")
    if part != "backbone":
        return part
    return ".".join([part, *rest[: 2 if rest[0] == "blocks" else 1]])


adapters = pytest.mark.slow  # importing peft takes seconds


@pytest.mark.parametrize("mode", [*list(PARTS)[:3], pytest.param("lora", marks=adapters)])
def test_frozen_parameters_stay_to_the_bit(mode: str, config: FinetuneConfig) -> None:
    config = replace(config, train=mode, weight_decay=0.1)
    torch.manual_seed(0)
    before = {k: v.clone() for k, v in build(config)[0].state_dict().items()}
    finetune.main(config)
    after = checkpoint.load_training(checkpoint.resolve(config.out))
    assert before.keys() == after.student.keys()
    changed = {k for k, v in before.items() if not torch.equal(v, after.student[k])}
    assert all(trained(k, config) for k in changed)
    assert {shortened(k) for k in changed} >= set(PARTS[mode])
    still = before.keys() - changed
    assert all(torch.equal(after.average[k], before[k]) for k in still)
    if mode != "full":
        assert {shortened(k) for k in changed} == set(PARTS[mode])
    if mode == "lora":
        assert all(lora.is_adapter(k) for k in changed if k.startswith("backbone"))


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"train": "lora"}, marks=adapters),
        {"train": "last", "keep_self_flow": 0.5},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    keys: dict, config: FinetuneConfig, tmp_path: Path
) -> None:
    config = whole(config, **keys) if "keep_self_flow" in keys else replace(config, **keys)
    finetune.main(config)
    halves = replace(config, out=str(tmp_path / "halves"))
    finetune.main(replace(halves, steps=2))
    finetune.main(halves)
    assert logged(config.out) == logged(halves.out)
    a, b = (checkpoint.load_training(checkpoint.resolve(c.out)) for c in (config, halves))
    for mine, theirs in (
        (a.average, b.average),
        (a.student, b.student),
        (a.optimizer, b.optimizer),
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def random_adapters(config: FinetuneConfig) -> PolicyModel:
    student, _ = build(config)
    random = torch.Generator().manual_seed(1)
    for name, parameter in student.named_parameters():
        if lora.is_adapter(name):
            parameter.data.normal_(std=0.3, generator=random)
    return student.eval()


@adapters
def test_merged_adapters_compute_the_same(config: FinetuneConfig) -> None:
    config = replace(config, train="lora", lora=LoraSize(rank=3, alpha=5.0))
    student = random_adapters(config)
    plain = PolicyModel(config.encoder, config.head).eval()
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    plain.load_state_dict(usable(student.state_dict(), config))
    random = torch.Generator().manual_seed(2)
    tokens = {
        m.name: torch.randn(2, m.length, m.channels, generator=random)
        for m in config.encoder.modalities
    }
    with torch.inference_mode():
        a, b = student.memory(tokens, {}), plain.memory(tokens, {})
        assert (a - b).abs().max() < 1e-6 * a.abs().max()
        plain.load_state_dict(before)
        assert not torch.allclose(a, plain.memory(tokens, {}), atol=1e-3)


@adapters
def test_a_checkpoint_holds_adapters_merged(config: FinetuneConfig) -> None:
    finetune.main(replace(config, train="lora", steps=1))
    names = checkpoint.load(config.out, "policy").weights.keys()
    assert names == PolicyModel(config.encoder, config.head).state_dict().keys()
    load_policy(config.out)


def test_the_kept_loss_is_the_pretrainings(config: FinetuneConfig, pretrained: Path) -> None:
    config = whole(config, keep_self_flow=0.5, pretraining={"gamma": 0.3})
    finetune.main(config)
    rows = [json.loads(x) for x in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["self_flow"] == pytest.approx(row["video"] + row["action"] + 0.3 * row["rep"])
        assert row["loss"] == pytest.approx(row["policy"] + 0.5 * row["self_flow"])
    kept = checkpoint.load(config.out, "policy")
    assert kept.config["read_block"] == 3
    assert kept.config["layout"]["future"] == 1
    before = checkpoint.load(pretrained).part("backbone")
    assert kept.part("backbone").keys() == before.keys()
    assert not kept.part("projector")
    changed = {k for k, v in before.items() if not torch.equal(v, kept.part("backbone")[k])}
    assert {shortened(f"backbone.{k}") for k in changed} >= {
        "backbone.blocks.3",
        "backbone.outputs",
    }


def test_gradients_of_both_losses_add_up(config: FinetuneConfig) -> None:
    def gradient(weight: float) -> torch.Tensor:
        both = whole(config, keep_self_flow=weight)
        torch.manual_seed(0)
        state = State(build(both)[0], both)
        inputs = read(both)
        values = finetune.policy_losses(state, inputs, both, generator(0, 0), torch.device("cpu"))
        values["loss"].backward()
        assert all(p.grad is None for p in state.average.parameters())
        return state.student.backbone.blocks[0].attention.qkv.weight.grad.clone()  # type: ignore

    one, two, three = (gradient(w) for w in (1.0, 2.0, 3.0))
    assert torch.allclose(three - two, two - one, atol=1e-6)
    assert not torch.allclose(two, one, atol=1e-6)


def read(config: FinetuneConfig):
    sources, weights = open_sources(config.sources)
    batch = Mixture(sources, weights, batches.window(config.layout), 0).batch(0, 3)
    codec, text = batches.codec_of(config.layout), finetune.text_encoder("hash384")
    return batches.Reader(config.layout, batches.embodiments(sources), {}, codec, text).tokens(
        batch
    )


def test_a_kept_backbone_stays_and_acts_both_ways(config: FinetuneConfig, pretrained: Path) -> None:
    config = whole(config, keep_backbone=True, train="head", steps=2)
    finetune.main(config)
    kept, before = checkpoint.load(config.out, "policy"), checkpoint.load(pretrained)
    for name, value in before.part("backbone").items():
        assert torch.equal(kept.part("backbone")[name], value)
    assert load_policy(config.out).parts.model.read == 3  # type: ignore[union-attr]
    more = replace(config, init=config.out, out=config.out + "2", keep_self_flow=0.1, train="full")
    finetune.main(replace(more, steps=1))  # a policy that kept all can be pretrained further


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train": "all"}, "choose one of full, head, last, lora"),
        ({"train": "lora", "init": None}, "give init="),
        ({"keep_self_flow": 0.5}, r"layout\.future=0"),
        ({"layout": LAYOUT}, "keep_backbone=true"),
        ({"layout": LAYOUT, "keep_self_flow": 0.5, "train": "head"}, "train=full, last or lora"),
        ({"layout": LAYOUT, "keep_backbone": True, "pretraining": {"gama": 1}}, "gama: no such"),
        ({"pretraining": {"gamma": 1.0}}, "only keep_self_flow and keep_backbone"),
        ({"select_command": "run {chekpoint}"}, "'chekpoint'"),
    ],
)
def test_mistakes_are_one_line(keys: dict, said: str, config: FinetuneConfig) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        replace(config, **keys)
    assert "\n" not in str(caught.value)


def test_what_init_no_longer_has(config: FinetuneConfig, tmp_path: Path) -> None:
    finetune.main(replace(config, steps=1))
    again = whole(config, init=config.out, out=str(tmp_path / "x"), keep_backbone=True)
    with pytest.raises(UserError, match="no later blocks"):
        finetune.check(again)
    select = whole(config, out=again.out, keep_backbone=True, select_minutes=1.0)
    with pytest.raises(UserError, match="task=none"):
        finetune.check(replace(select, select_tasks=["none"]))
    with pytest.raises(UserError, match="attention"):
        finetune.check(
            whole(config, out=again.out, keep_backbone=True, pretraining={"attention": "full"})
        )


def test_the_command_line_gives_the_same_config() -> None:
    made = compose(
        FinetuneConfig,
        "finetune",
        [
            *("init=x", "train=lora", "lora.rank=4", "layout.future=1", "keep_self_flow=0.5"),
            *("+pretraining.gamma=0.5", "select_tasks=[open_top_drawer]"),
        ],
    )
    assert (made.lora, made.kept.gamma) == (LoraSize(4, 16.0), 0.5)
    assert made.kept.text_dropout == TrainConfig().text_dropout
