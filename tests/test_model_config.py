"""What describes a model: contradictions are refused, JSON is a round trip, old files are read."""

import json
from dataclasses import replace

import pytest

from selfflow.worldmodel.transformer import Modality, ModelConfig

MODALITIES = (
    Modality("text", 6, 2, "condition", (2, 1, 1), stream="text"),
    Modality("video", 8, 6, "target", (1, 2, 3), 0.1, clock=(1.0, 1.0)),
)


def config(**changes) -> ModelConfig:
    return replace(ModelConfig(48, 3, 4, 2.0, "prefix", MODALITIES), **changes)


def test_sizes_are_checked() -> None:
    text = Modality("text", 4, 1, "condition", (1, 1, 1), stream="text")
    other = Modality("other", 4, 1, "condition", (1, 1, 1))
    target = Modality("a", 4, 1, "target", (1, 1, 1))
    with pytest.raises(ValueError, match="grid"):
        Modality("x", 4, 5, "target", (1, 2, 2))
    with pytest.raises(ValueError, match="role"):
        Modality("x", 4, 1, "other", (1, 1, 1))
    with pytest.raises(ValueError, match="weight=-1"):
        Modality("x", 4, 1, "target", (1, 1, 1), weight=-1.0)
    with pytest.raises(ValueError, match="stream=audio"):
        Modality("x", 4, 1, "target", (1, 1, 1), stream="audio")
    with pytest.raises(ValueError, match="mask_ratio"):
        Modality("x", 4, 1, "target", (1, 1, 1), mask_ratio=0.6)
    for message, modalities, changes in (
        ("multiple of heads", (text,), {"heads": 5}),
        ("prefix or full", (text,), {"attention": "causal"}),
        ("sit or flux", (text,), {"family": "unet"}),
        ("sincos3d or sincos2d or rope", (text,), {"positions": "learned"}),
        ("conditions come first", (target, text), {}),
        ("at least one", (), {}),
        ("stream=text come first", (other, text), {}),
        ("repeat", (text, text), {}),
        ("classes=-1", (text,), {"classes": -1}),
        ("mlp_ratio=0", (text,), {"mlp_ratio": 0.0}),
        ("multiple of 6", (text,), {"heads": 6, "positions": "rope"}),
        ("multiple of 4", (text,), {"hidden": 54, "heads": 2, "positions": "sincos2d"}),
        ("0 .. 0 for family=sit", (text,), {"double_blocks": 1}),
        ("0 .. 3 for family=flux", (text,), {"family": "flux", "double_blocks": 4}),
        ("needs a modality of stream=text", (other,), {"family": "flux", "double_blocks": 1}),
    ):
        with pytest.raises(ValueError, match=message):
            config(modalities=modalities, **changes)


def test_config_survives_json() -> None:
    for c in (config(), config(family="flux", positions="rope", classes=3)):
        assert ModelConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c


def test_config_of_an_older_version_is_read() -> None:
    """It has no family, positions, streams or clocks: those take their defaults."""
    old = {"name": "text", "channels": 4, "length": 1, "role": "condition", "grid": [1, 1, 1]}
    sizes = {"hidden": 48, "depth": 2, "heads": 4, "mlp_ratio": 2.0, "attention": "prefix"}
    c = ModelConfig.from_dict(sizes | {"modalities": [old]})
    assert (c.family, c.positions, c.classes) == ("sit", "sincos3d", 0)
    assert c.modalities[0] == Modality("text", 4, 1, "condition", (1, 1, 1))


def test_layers_for_distillation() -> None:
    def blocks(depth: int) -> tuple[int, int]:
        c = config(depth=depth)
        return c.block_at(0.3), c.block_at(0.7)

    assert blocks(28) == (8, 20)  # the paper's and the published code's
    assert blocks(21) == (6, 15)
    assert blocks(6) == (2, 4)
    assert blocks(15) == (5, 11)  # 4.5 and 10.5 go up, not to even
    assert blocks(45) == (14, 32)
    assert config(depth=1).block_at(0.3) == 1


def test_an_encoder_keeps_the_double_blocks_that_it_has() -> None:
    whole = config(depth=4, family="flux", double_blocks=3)
    assert [whole.encoder(n).double_blocks for n in (1, 2, 3, 4)] == [1, 2, 3, 3]
