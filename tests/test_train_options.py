"""What pretraining can be told: more modalities, teachers, texts, other weights; and a dry run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from selfflow.configs.entry import compose
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import UserError
from selfflow.datasets.text import TableEncoder
from selfflow.datasets.windows import Mixture
from selfflow.policies import finetune
from selfflow.policies.finetune import FinetuneConfig
from selfflow.worldmodel import batches, checkpoint, encode, train
from selfflow.worldmodel.batches import Inputs
from selfflow.worldmodel.codec import CodecConfig
from selfflow.worldmodel.latents import LatentStore
from selfflow.worldmodel.layout import Extra, Layout
from selfflow.worldmodel.train_config import ModelSize, TrainConfig


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(store: Path, out: Path, **changes: object) -> TrainConfig:
    """Two steps of a small model."""
    plain = TrainConfig(
        data=[str(store)],
        out=str(out),
        steps=2,
        batch=4,
        precision="fp32",
        threads=1,
        model=ModelSize(hidden=32, depth=4, heads=2, mlp_ratio=2.0),
        layout=Layout(32, 32, 16, chunk=4, stride=2),
    )
    return replace(plain, **changes)


def read(config: TrainConfig, size: int) -> Inputs:
    """One batch of the config's data as tokens, without statistics."""
    sources, weights = open_sources(config.sources)
    batch = Mixture(sources, weights, train.request(config), 0).batch(0, size)
    codec = batches.codec_of(config.layout)
    return train.read_with(config, sources, {}, codec, None).tokens(batch)


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_batch_is_split_in_order(store: Path) -> None:
    config = tiny(store, Path("unused"))
    sources, weights = open_sources(config.sources)
    whole = Mixture(sources, weights, train.request(config), 0).batch(0, 6)
    parts = batches.split(whole, 3)
    assert [i for part in parts for i in part.ids] == whole.ids
    assert np.array_equal(np.concatenate([part.frames for part in parts]), whole.frames)


def test_a_config_adds_a_modality_that_the_data_measure(store: Path, tmp_path: Path) -> None:
    added = {"opening": Extra(key="drawers", channels=3, length=5, mask_ratio=0.2, weight=0.5)}
    config = tiny(store, tmp_path, extra=added)
    inputs = read(config, 64)
    assert inputs.tokens["opening"].shape == (64, 5, 3)
    assert not inputs.valid["opening"].all()  # windows that run over the episode's end
    train.main(config)
    rows = log(tmp_path)
    assert all(np.isfinite(row["opening"]) for row in rows)
    total = rows[0]["video"] + rows[0]["action"] + 0.5 * rows[0]["opening"] + 0.8 * rows[0]["rep"]
    assert rows[0]["loss"] == pytest.approx(total, rel=1e-5)
    wrong = replace(config, extra={"opening": replace(added["opening"], channels=2)})
    with pytest.raises(UserError, match="measures 3 values of drawers a step, not 2"):
        read(wrong, 1)


def test_repa_aligns_with_a_frozen_encoder_of_the_clean_frames(store: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**size, intermediate_size=16, image_size=32, patch_size=8)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    processor = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"height": 32, "width": 32},
    }
    processor |= {"image_processor_type": "ViTImageProcessor"}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    made = tiny(store, tmp_path / "out", objective="repa", teacher=str(tmp_path / "vit"))
    train.main(made)
    assert all(np.isfinite(row["rep"]) for row in log(tmp_path / "out"))
    with pytest.raises(ValueError, match="external teacher goes with objective=repa"):
        replace(made, objective="vanilla")


def test_a_run_starts_from_another_runs_weights(store: Path, tmp_path: Path) -> None:
    train.main(tiny(store, tmp_path / "first"))
    given = checkpoint.load(tmp_path / "first").part("backbone")
    config = tiny(store, tmp_path / "second", init=str(tmp_path / "first"), objective="vanilla")
    train.check(config)
    student, _ = train.build(config, torch.device("cpu"))
    assert all(torch.equal(v, given[k]) for k, v in student.backbone.state_dict().items())
    wide = replace(config, model=ModelSize(48, 4, 2, 2.0))
    with pytest.raises(UserError, match="hidden=32"):
        train.check(wide)
    with pytest.raises(UserError, match="reads text by hash384"):
        train.check(replace(config, text="minilm"))


def test_an_added_modality_must_be_measured(store: Path, tmp_path: Path) -> None:
    config = tiny(store, tmp_path / "out", extra={"a": Extra("drawer", 3, 5)})
    with pytest.raises(UserError, match=r"extra\.a: no source of the data measures key=drawer"):
        train.main(config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="several modalities of one key"):
        replace(config, extra={"a": Extra("drawers", 3, 5), "b": Extra("drawers", 3, 2)})


def test_latents_resume_exactly_and_an_external_teacher_still_sees_pixels(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"data=[{store}]", f"out={tmp_path / 'latents'}", "codec.kind=patch", "patch=16"]
    encode.main(compose(encode.EncodeConfig, "encode", [*keys, "height=32", "width=32"]))
    added = {"opening": Extra(key="drawers", channels=3, length=5)}
    made = tiny(store, tmp_path / "a", latents=str(tmp_path / "latents"), extra=added, steps=4)
    made = replace(made, accumulate=2, save_every=2)
    train.main(made)
    whole, halves = log(tmp_path / "a"), replace(made, out=str(tmp_path / "b"))
    stop, save = iter(range(10)), checkpoint.save

    class Killed(Exception):
        pass

    def killed(*arguments: object, **named: object) -> Path:
        path = save(*arguments, **named)  # type: ignore[arg-type]
        if next(stop) == 0:
            raise Killed
        return path

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(Killed):
        train.main(halves)
    monkeypatch.setattr(checkpoint, "save", save)
    train.main(halves)
    assert [(r["loss"], r["grad_norm"]) for r in log(tmp_path / "b")] == [
        (r["loss"], r["grad_norm"]) for r in whole
    ]
    latents = LatentStore(made.latents or "")
    assert not train.request(made, latents).pictures
    assert train.request(replace(made, objective="repa", teacher="a/model"), latents).pictures


@pytest.mark.parametrize(
    "keys",
    [
        {"text_dropout": 2.0},
        {"student_at": 3.0, "teacher_at": 20.0},
        {"mfu": 0.0},
        {"gamma": -1.0},
        {"video_weight": -1.0},
        {"objective": "vanilla", "video_mask": 0.7},
        {"objective": "vanilla", "model": ModelSize(32, 4, 5)},
        {"time_shift": 2.95},
        {"shard_dtype": "bfloat16"},
    ],
)
def test_values_that_mean_nothing_are_refused(store: Path, tmp_path: Path, keys: dict) -> None:
    with pytest.raises(ValueError, match=r"must|needs|choose|is not within"):
        tiny(store, tmp_path, **keys)


def test_a_policy_reads_texts_and_latents_as_its_pretraining_did(
    store: Path, tmp_path: Path
) -> None:
    train.main(tiny(store, tmp_path / "pre", text="table", steps=1))
    config = FinetuneConfig(
        data=[str(store)],
        init=str(tmp_path / "pre"),
        out=str(tmp_path / "x"),
        device="cpu",
        text="table",
        model=ModelSize(32, 4, 2, 2.0),
        layout=Layout(32, 32, 16, future=0, chunk=4, stride=2),
    )
    finetune.check(config)
    with pytest.raises(UserError, match="reads minilm384 vectors, text=hash384"):
        finetune.check(replace(config, text="hash384"))
    other = replace(config.layout, codec=CodecConfig(scale=2.0))
    with pytest.raises(UserError, match=r"codec\.kind=patch, scale=1\.0; here it is patch, 2\.0"):
        finetune.check(replace(config, layout=other))
    cells = Layout(32, 32, 2, future=0, chunk=4, codec=CodecConfig("taesd"))
    with pytest.raises(ValueError, match="changes pixels, not latents"):
        replace(config, layout=cells, jitter=0.2)
    with pytest.raises(ValueError, match="read_at=4"):
        replace(config, read_at=4.0)
    with pytest.raises(ValueError, match="heads=5"):
        replace(config, model=ModelSize(32, 4, 5))


@pytest.mark.slow
def test_a_dry_run_needs_no_external_teacher(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"objective": "dual", "alignment": "external", "teacher": "a/model"}
    train.main(tiny(store, tmp_path, dry_run=True, **keys))
    assert "one step on the meta device" in capsys.readouterr().out


def test_a_checkpoint_carries_the_vectors_of_its_instructions(store: Path, tmp_path: Path) -> None:
    config = tiny(store, tmp_path, text="table")
    train.main(config)
    kept = checkpoint.load(tmp_path)
    assert kept.config["text_encoder"] == "minilm384"
    assert (kept.path / "text.safetensors").is_file()
    before = TableEncoder.load(kept.path / "text.safetensors")
    assert np.abs(before.embed(["open top drawer"])).max() > 0
    with pytest.raises(UserError, match=r"not in the table.*selfflow\[text\]"):
        before.embed(["dance the tango"])


def test_a_run_of_before_text_dropout_had_none(store: Path, tmp_path: Path) -> None:
    config = tiny(store, tmp_path, steps=1)
    train.main(config)
    path = tmp_path / "config.json"
    values = checkpoint.read_json(path)
    checkpoint.write_json(path, {k: v for k, v in values.items() if k != "text_dropout"})
    with pytest.raises(UserError, match=r"text_dropout \(was 0\.0, now 0\.1\)"):
        train.check(replace(config, steps=2))


@pytest.mark.slow
def test_a_dry_run_of_the_large_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    config = compose(TrainConfig, "train", ["experiment=rt1_675m", "dry_run=true"])
    train.check(config)
    train.main(config)
    said = capsys.readouterr().out
    assert "tokens per sample: 4489" in said
    assert "674.3 M parameters" in said
    assert "hours" in said
    assert not Path(config.out).exists()
