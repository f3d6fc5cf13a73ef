"""The transformer: shapes, sizes, who may attend to whom, noise groups, kept prefixes."""

import pytest
import torch
from torch import Tensor

from selfflow.configs.entry import compose
from selfflow.worldmodel import flow
from selfflow.worldmodel.layers import Projector, attend, sinusoids
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.loop import generator
from selfflow.worldmodel.train import TrainConfig
from selfflow.worldmodel.transformer import Modality, ModelConfig, VideoActionTransformer

LAYOUT = Layout(height=32, width=48, patch=16, context=2, future=1, stride=2, chunk=3)


def config(attention: str = "prefix", depth: int = 3) -> ModelConfig:
    return ModelConfig(32, depth, 2, 2.0, attention, LAYOUT.modalities())


def model(attention: str = "prefix", depth: int = 3) -> VideoActionTransformer:
    """With every weight random: a fresh one is the identity and hides mistakes."""
    torch.manual_seed(0)
    made = VideoActionTransformer(config(attention, depth))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1)
    return made


def inputs(batch: int = 2, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Tokens, three times a sample, and groups: conditions in 0, targets in 1 or 2."""
    g = torch.Generator().manual_seed(seed)
    tokens = {
        m.name: torch.randn(batch, m.length, m.channels, generator=g) for m in LAYOUT.modalities()
    }
    prefix, total = config().prefix_length, sum(m.length for m in LAYOUT.modalities())
    group = torch.randint(1, 3, (batch, total), generator=g)
    group[:, :prefix] = 0
    return tokens, torch.rand(batch, 3, generator=g), group


def close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-5) -> bool:
    return all(torch.allclose(a[k], b[k], atol=atol) for k in a)


def other_targets(tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    return tokens | {k: tokens[k] + 1.0 for k in ("video", "action")}


@pytest.mark.parametrize("attention", ["prefix", "full"])
def test_velocity_has_the_targets_shapes_and_starts_at_zero(attention: str) -> None:
    tokens, tau, group = inputs()
    velocity = VideoActionTransformer(config(attention))(tokens, tau, group)
    assert {k: v.shape for k, v in velocity.items()} == {
        k: tokens[k].shape for k in ("video", "action")
    }
    assert all((v == 0).all() for v in velocity.values())


def test_conditions_see_the_targets_only_with_full_attention() -> None:
    tokens, tau, group = inputs()
    count = config().prefix_length
    for attention, same in (("prefix", True), ("full", False)):
        m = model(attention)
        a, b = (m.features(t, tau, group, block=3) for t in (tokens, other_targets(tokens)))
        assert torch.equal(a[:, :count], b[:, :count]) == same
        assert not torch.allclose(a[:, count:], b[:, count:])


def test_targets_see_the_conditions_and_one_another() -> None:
    tokens, tau, group = inputs()
    m = model()
    base = m(tokens, tau, group)["video"]
    for name in ("text", "robot", "proprio", "context", "action"):
        moved = m(tokens | {name: tokens[name] + 1.0}, tau, group)["video"]
        assert not torch.allclose(base, moved), name


def test_decoding_on_a_kept_prefix_is_the_forward_pass() -> None:
    tokens, tau, group = inputs()
    m = model()
    count = config().prefix_length
    targets = {k: tokens[k] for k in ("video", "action")}
    kept = m.prefix({k: v for k, v in tokens.items() if k not in targets}, tau[:, 0])
    assert close(m(tokens, tau, group), m.decode(targets, tau, group[:, count:], kept))
    with pytest.raises(ValueError, match="attention=prefix"):
        model("full").decode(targets, tau, group[:, count:], kept)


def test_two_part_attention_equals_one_masked_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """prefix = full attention in which condition queries are masked from target keys."""
    tokens, tau, group = inputs()
    split = model("prefix")(tokens, tau, group)
    count = config().prefix_length
    mask = torch.ones(group.shape[1], group.shape[1], dtype=torch.bool)
    mask[:count, count:] = False
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v: real(q, k, v, attn_mask=mask),
    )
    assert close(split, model("full")(tokens, tau, group))


@pytest.mark.parametrize("attention", ["prefix", "full"])
def test_features_are_taken_after_the_named_block(attention: str) -> None:
    tokens, tau, group = inputs()
    m = model(attention)
    velocity, feature = m.forward_with_feature(tokens, tau, group, block=2)
    assert feature is not None
    assert torch.allclose(feature, m.features(tokens, tau, group, block=2), atol=1e-6)
    assert close(velocity, m(tokens, tau, group))
    # a model of two blocks with the same weights ends where block 2 ends
    short = VideoActionTransformer(config(attention, depth=2))
    short.load_state_dict({k: v for k, v in m.state_dict().items() if "blocks.2" not in k})
    assert torch.allclose(feature, short.features(tokens, tau, group, block=2), atol=1e-6)
    for wrong in (0, 4):
        with pytest.raises(ValueError, match="block="):
            m.features(tokens, tau, group, block=wrong)


def test_condition_features_are_the_prefix_part_of_features() -> None:
    tokens, tau, group = inputs()
    valid = {"proprio": torch.tensor([[True], [False]])}
    m = model()
    alone = m.condition_features(tokens, tau[:, 0], valid, block=2)
    together = m.features(tokens, tau, group, valid, block=2)
    assert torch.allclose(alone, together[:, : config().prefix_length], atol=1e-5)
    encoder = VideoActionTransformer(m.config.encoder(2))
    have = m.state_dict()
    encoder.load_state_dict({k: have[k] for k in encoder.state_dict()})
    assert torch.allclose(alone, encoder.condition_features(tokens, tau[:, 0], valid, 2), atol=1e-6)


def test_a_token_sees_its_own_groups_time() -> None:
    tokens, tau, group = inputs()
    m = model()
    per_token = tau.gather(1, group)
    every = torch.arange(group.shape[1]).expand_as(group)
    assert close(m(tokens, tau, group), m(tokens, per_token, every))  # G = L
    equal = tau.clone()
    equal[:, 2] = equal[:, 1]
    assert close(m(tokens, equal, group), m(tokens, equal, group.clamp(max=1)))
    assert not close(m(tokens, tau, group), m(tokens, equal, group))


def test_invalid_tokens_are_replaced_whatever_they_hold() -> None:
    tokens, tau, group = inputs()
    valid = {"action": torch.tensor([[True, True, False], [False, False, False]])}
    m = model()
    changed = tokens["action"].clone()
    changed[~valid["action"]] = 1e3
    a, b = m(tokens, tau, group, valid), m(tokens | {"action": changed}, tau, group, valid)
    assert close(a, b)
    assert not close(a, m(tokens, tau, group))


def test_time_embedding_has_the_papers_sinusoids() -> None:
    code = sinusoids(torch.tensor([0.0, 0.5]), 256)
    assert torch.equal(code[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert torch.allclose(
        code[1, [0, 128]], torch.tensor([0.5]).cos().new_tensor([0.877583, 0.479426])
    )
    assert code[1, 127] == pytest.approx(1.0)  # frequency exp(-ln(10000) · 127 / 128)


def test_attention_in_bf16_on_the_cpu_is_the_same_attention() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g) for n in (5, 7, 7))
    want = attend(q, k, v)
    got = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), want, atol=0.03)


def test_sizes_are_checked() -> None:
    text = Modality("text", 4, 1, "condition", (1, 1, 1))
    with pytest.raises(ValueError, match="grid"):
        Modality("x", 4, 5, "target", (1, 2, 2))
    with pytest.raises(ValueError, match="role"):
        Modality("x", 4, 1, "other", (1, 1, 1))
    with pytest.raises(ValueError, match="mask_ratio"):
        Modality("x", 4, 1, "target", (1, 1, 1), mask_ratio=0.6)
    with pytest.raises(ValueError, match="multiple of heads"):
        ModelConfig(32, 2, 5, 4.0, "prefix", (text,))
    with pytest.raises(ValueError, match="prefix or full"):
        ModelConfig(32, 2, 2, 4.0, "causal", (text,))
    target = Modality("a", 4, 1, "target", (1, 1, 1))
    with pytest.raises(ValueError, match="conditions come first"):
        ModelConfig(32, 2, 2, 4.0, "full", (target, text))
    with pytest.raises(ValueError, match="repeat"):
        ModelConfig(32, 2, 2, 4.0, "full", (text, text))


def test_config_survives_json() -> None:
    import json

    c = config()
    assert ModelConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c


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


def count(c: ModelConfig) -> int:
    with torch.device("meta"):
        parts = (VideoActionTransformer(c), Projector(c.hidden))
        return sum(p.numel() for part in parts for p in part.parameters())


def test_parameter_counts() -> None:
    assert count(ModelConfig(192, 6, 6, 4.0, "prefix", Layout().modalities())) <= 6_000_000
    large = count(ModelConfig(1152, 28, 16, 4.0, "full", Layout().modalities()))
    assert large - 5_311_872 == pytest.approx(675e6, rel=0.02)  # the paper counts no projector


@pytest.mark.slow
def test_the_large_model_takes_a_step() -> None:
    keys = ["model=selfflow_675m", "attention=full", "data=x"]
    small = ["layout.height=32", "layout.width=32", "layout.chunk=4"]
    c = compose(TrainConfig, "train", keys + small)
    torch.manual_seed(0)
    m = VideoActionTransformer(c.transformer)
    assert sum(p.numel() for p in m.parameters()) > 660e6
    tokens = {x.name: torch.randn(1, x.length, x.channels) for x in c.transformer.modalities}
    mask = {x.name: torch.ones(1, x.length, 1) for x in c.transformer.targets}
    noised = flow.draw(tokens, c.transformer, c.noise, generator(c.seed, 0))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            velocity = m(noised.tokens, noised.tau, noised.group)
        return torch.stack(list(flow.flow_loss(velocity, noised.velocity, mask).values())).sum()

    before = loss()
    before.backward()
    torch.optim.SGD(m.parameters(), 1e-3).step()
    with torch.no_grad():
        assert loss() < before
