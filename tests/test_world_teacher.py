"""A trained world model as the frozen teacher of objective=repa."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfflow.configs.entry import compose
from selfflow.worldmodel import train
from selfflow.worldmodel.checkpoint import RunError, last, load
from selfflow.worldmodel.codec import make_codec
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.model_config import ModelConfig
from selfflow.worldmodel.train_config import TrainConfig
from selfflow.worldmodel.transformer import VideoActionTransformer
from selfflow.worldmodel.world_teacher import make_teacher

SMALL = "model.hidden=24 model.depth=3 model.heads=2 layout.height=32 layout.width=32"
SMALL += " layout.context=2 batch=4 threads=1 warmup=1"
CPU = torch.device("cpu")


def small(store: Path, out: Path, *overrides: str) -> TrainConfig:
    given = [*SMALL.split(), f"data={store}", f"out={out}", *overrides]
    return compose(TrainConfig, "train", given)


@pytest.fixture(scope="module")
def teacher_run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    train.main(small(store, out, "objective=vanilla", "steps=2"))
    return out


def test_a_feature_is_the_models_own_of_that_frame_alone(teacher_run: Path) -> None:
    teacher = make_teacher(str(teacher_run), 0.7, (32, 32), CPU)
    frames = torch.randint(0, 256, (2, 3, 32, 32, 3), dtype=torch.uint8)
    found = teacher.features(frames)
    assert found.shape == (2, 3, 2, 2, 24)
    assert not found.requires_grad

    given = load(teacher_run)
    config = ModelConfig.from_dict(given.config["model"])
    layout = Layout.from_dict(given.config["layout"])
    model = VideoActionTransformer(config)
    model.load_state_dict(given.part("backbone"))
    shown = make_codec(layout.codec, 32, 32, layout.patch).encode(frames[1:, 2:])
    tokens = {m.name: torch.randn(1, m.length, m.channels) for m in config.conditions}
    valid = {name: torch.zeros(1, x.shape[1], dtype=torch.bool) for name, x in tokens.items()}
    tokens["context"][:, 4:], valid["context"][:, 4:] = shown, True  # the frame shown last
    whole = model.condition_features(tokens, torch.zeros(1), valid, 2)  # block 0.7 of 3
    assert torch.allclose(found[1, 2].flatten(0, 1), whole[0, -4:], atol=1e-5)


def test_training_aims_at_it_and_leaves_it_alone(
    teacher_run: Path, store: Path, tmp_path: Path
) -> None:
    before = load(teacher_run).weights
    config = small(store, tmp_path, "objective=repa", f"teacher={teacher_run}", "steps=2")
    train.main(config)
    assert all(torch.equal(x, load(teacher_run).weights[k]) for k, x in before.items())
    row = (tmp_path / "log.jsonl").read_text().splitlines()[-1]
    assert '"cosine"' in row
    assert last(tmp_path) is not None


def test_another_picture_size_is_refused(teacher_run: Path, store: Path, tmp_path: Path) -> None:
    config = small(store, tmp_path / "run", "objective=repa", f"teacher={teacher_run}")
    wide = replace(config, layout=replace(config.layout, width=64))
    with pytest.raises(RunError, match="sees 32 x 32 pixels, this run 32 x 64"):
        train.build(wide, CPU)
