"""Parameter counts of configs/model, on the meta device."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from selfflow.worldmodel.layers import Projector
from selfflow.worldmodel.transformer import Modality, ModelConfig, VideoActionTransformer

MODELS = Path(__file__).parents[1] / "configs" / "model"

WAN = (  # 49 frames of 208 x 320 pixels in 48 channels, 6 actions
    Modality("text", 384, 1, "condition", (1, 1, 1), stream="text"),
    Modality("proprio", 10, 1, "condition", (1, 1, 1)),
    Modality("video", 48, 13 * 16 * 20, "target", (13, 16, 20), 0.1),
    Modality("action", 8, 6, "target", (6, 1, 1), 0.1),
)
PIXELS = (  # what tiny trains on
    Modality("text", 384, 1, "condition", (1, 1, 1)),
    Modality("robot", 17, 1, "condition", (1, 1, 1)),
    Modality("proprio", 10, 1, "condition", (1, 1, 1)),
    Modality("context", 768, 80, "condition", (1, 8, 10)),
    Modality("video", 768, 80, "target", (1, 8, 10), 0.1),
    Modality("action", 8, 8, "target", (8, 1, 1), 0.1),
)


def build(name: str, modalities: tuple[Modality, ...]) -> VideoActionTransformer:
    size = yaml.safe_load((MODELS / f"{name}.yaml").read_text())
    with torch.device("meta"):
        return VideoActionTransformer(ModelConfig(**size, attention="full", modalities=modalities))


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "millions", "within"),
    [
        ("small", 33, 0.03),  # SiT-S
        ("base", 130, 0.02),  # SiT-B
        ("selfflow_675m", 675, 0.02),
        ("selfflow_625m", 625, 0.03),
    ],
)
def test_sizes_are_the_papers(name: str, millions: float, within: float) -> None:
    # as the paper counts: without the projector, which only training has
    model = build(name, WAN)
    total = count(model)
    print(f"{name}: {total:,}, of which blocks {count(model.blocks):,}")
    assert total / 1e6 == pytest.approx(millions, rel=within)


def test_tiny_has_at_most_six_million_with_its_projector() -> None:
    model = build("tiny", PIXELS)
    with torch.device("meta"):
        total = count(model, Projector(model.config.hidden))
    print(f"tiny: {total:,}")
    assert total <= 6_000_000


def test_the_published_images_model_is_counted_to_the_weight() -> None:
    """SiT-XL/2 has 674,834,720 without projector and positions (shared/docs/self_flow.md, 3.3)."""
    size = yaml.safe_load((MODELS / "selfflow_675m.yaml").read_text())
    image = Modality("image", 16, 256, "target", (1, 16, 16), 0.25)
    config = ModelConfig(
        **size | {"positions": "sincos2d"}, attention="full", modalities=(image,), classes=1001
    )
    with torch.device("meta"):
        ours = count(VideoActionTransformer(config))
    # theirs predicts 16 more channels and throws them away; ours has an embedding and a null
    assert ours == 674_834_720 - 16 * (1152 + 1) + 2 * 1152


def test_every_size_states_every_field() -> None:
    files = sorted(MODELS.glob("*.yaml"))
    fields = {"hidden", "depth", "heads", "mlp_ratio", "family", "double_blocks", "positions"}
    assert {f.stem for f in files} == {"tiny", "small", "base", "selfflow_675m", "selfflow_625m"}
    for file in files:
        assert set(yaml.safe_load(file.read_text())) == fields, file.name


def test_the_robotics_backbone_has_the_papers_parts() -> None:
    model = build("selfflow_625m", WAN)
    kinds = [type(block).__name__ for block in model.blocks]
    assert kinds == ["DoubleBlock"] * 7 + ["SingleBlock"] * 14
    width = model.config.hidden // model.config.heads
    rope = model.inputs["video"].rope
    assert isinstance(rope, torch.Tensor)
    assert rope.shape == (13 * 16 * 20, width)  # cosines and sines of 3 x 12 angles
    assert width == 3 * 24
    shared = model.shared.modulation
    assert isinstance(shared, nn.Linear)
    assert shared.out_features == (6 + 6 + 3) * 1152
    assert (model.config.block_at(0.3), model.config.block_at(0.7)) == (6, 15)
