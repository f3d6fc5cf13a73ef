"""The transformer: shapes, who may attend to whom, noise groups, kept prefixes, both families."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from selfflow.worldmodel import flow
from selfflow.worldmodel.layers import attend, sinusoids
from selfflow.worldmodel.transformer import Modality, ModelConfig, VideoActionTransformer

MODELS = Path(__file__).parents[1] / "configs" / "model"
MODALITIES = (
    Modality("text", 6, 2, "condition", (2, 1, 1), stream="text"),
    Modality("robot", 5, 1, "condition", (1, 1, 1)),
    Modality("proprio", 4, 1, "condition", (1, 1, 1)),
    Modality("context", 8, 12, "condition", (2, 2, 3), clock=(-1.0, 1.0)),
    Modality("video", 8, 6, "target", (1, 2, 3), 0.1, clock=(1.0, 1.0)),
    Modality("action", 8, 3, "target", (3, 1, 1), 0.1, clock=(0.0, 0.5)),
)
IMAGE = (Modality("image", 5, 6, "target", (1, 2, 3), 0.25),)
both_families = pytest.mark.parametrize("family", ["sit", "flux"])
both_attentions = pytest.mark.parametrize("attention", ["prefix", "full"])


def config(
    attention: str = "prefix", depth: int = 3, family: str = "sit", **changes
) -> ModelConfig:
    """flux: one double block, then single ones, and rotary positions."""
    c = ModelConfig(48, depth, 4, 2.0, attention, MODALITIES)
    if family == "flux":
        c = replace(c, family="flux", double_blocks=1, positions="rope")
    return replace(c, **changes)


def model(
    attention: str = "prefix", depth: int = 3, family: str = "sit", **changes
) -> VideoActionTransformer:
    """With every weight random: a fresh one is the identity and hides mistakes."""
    torch.manual_seed(0)
    made = VideoActionTransformer(config(attention, depth, family, **changes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1)
    return made


def inputs(batch: int = 2, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Tokens, three times a sample, and groups: conditions in 0, targets in 1 or 2."""
    g = torch.Generator().manual_seed(seed)
    tokens = {m.name: torch.randn(batch, m.length, m.channels, generator=g) for m in MODALITIES}
    prefix, total = config().prefix_length, sum(m.length for m in MODALITIES)
    group = torch.randint(1, 3, (batch, total), generator=g)
    group[:, :prefix] = 0
    return tokens, torch.rand(batch, 3, generator=g), group


def close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-5) -> bool:
    return all(torch.allclose(a[k], b[k], atol=atol) for k in a)


def other_targets(tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    return tokens | {k: tokens[k] + 1.0 for k in ("video", "action")}


@both_families
@both_attentions
def test_velocity_has_the_targets_shapes_and_starts_at_zero(attention: str, family: str) -> None:
    tokens, tau, group = inputs()
    fresh = VideoActionTransformer(config(attention, family=family))
    velocity = fresh(tokens, tau, group)
    assert {k: v.shape for k, v in velocity.items()} == {
        k: tokens[k].shape for k in ("video", "action")
    }
    assert all((v == 0).all() for v in velocity.values())
    # and every block is the identity
    ends = [fresh.features(tokens, tau, group, block=n) for n in (1, 3)]
    assert torch.equal(*ends)


@both_families
def test_conditions_see_the_targets_only_with_full_attention(family: str) -> None:
    tokens, tau, group = inputs()
    count = config().prefix_length
    for attention, same in (("prefix", True), ("full", False)):
        m = model(attention, family=family)
        a, b = (m.features(t, tau, group, block=3) for t in (tokens, other_targets(tokens)))
        assert torch.equal(a[:, :count], b[:, :count]) == same
        assert not torch.allclose(a[:, count:], b[:, count:])


@both_families
def test_targets_see_the_conditions_and_one_another(family: str) -> None:
    tokens, tau, group = inputs()
    m = model(family=family)
    base = m(tokens, tau, group)["video"]
    for name in ("text", "robot", "proprio", "context", "action"):
        moved = m(tokens | {name: tokens[name] + 1.0}, tau, group)["video"]
        assert not torch.allclose(base, moved), name


@both_families
def test_decoding_on_a_kept_prefix_is_the_forward_pass(family: str) -> None:
    tokens, tau, group = inputs()
    m = model(family=family)
    count = config().prefix_length
    targets = {k: tokens[k] for k in ("video", "action")}
    kept = m.prefix({k: v for k, v in tokens.items() if k not in targets}, tau[:, 0])
    assert close(m(tokens, tau, group), m.decode(targets, tau, group[:, count:], kept))
    with pytest.raises(ValueError, match="attention=prefix"):
        model("full").decode(targets, tau, group[:, count:], kept)


@both_families
def test_two_part_attention_equals_one_masked_attention(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """prefix = full attention in which condition queries are masked from target keys."""
    tokens, tau, group = inputs()
    split = model("prefix", family=family)(tokens, tau, group)
    count = config().prefix_length
    mask = torch.ones(group.shape[1], group.shape[1], dtype=torch.bool)
    mask[:count, count:] = False
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v: real(q, k, v, attn_mask=mask),
    )
    assert close(split, model("full", family=family)(tokens, tau, group))


@both_families
@both_attentions
def test_features_are_taken_after_the_named_block(attention: str, family: str) -> None:
    tokens, tau, group = inputs()
    m = model(attention, family=family)
    velocity, feature = m.forward_with_feature(tokens, tau, group, block=2)
    assert feature is not None
    assert torch.allclose(feature, m.features(tokens, tau, group, block=2), atol=1e-6)
    assert close(velocity, m(tokens, tau, group))
    # a model of two blocks with the same weights ends where block 2 ends
    short = VideoActionTransformer(config(attention, 2, family))
    short.load_state_dict({k: v for k, v in m.state_dict().items() if "blocks.2" not in k})
    assert torch.allclose(feature, short.features(tokens, tau, group, block=2), atol=1e-6)
    for wrong in (0, 4):
        for read in (m.features, m.forward_with_feature):
            with pytest.raises(ValueError, match="block="):
                read(tokens, tau, group, block=wrong)


@both_families
def test_condition_features_are_the_prefix_part_of_features(family: str) -> None:
    tokens, tau, group = inputs()
    valid = {"proprio": torch.tensor([[True], [False]])}
    m = model(family=family)
    alone = m.condition_features(tokens, tau[:, 0], valid, block=2)
    together = m.features(tokens, tau, group, valid, block=2)
    assert torch.allclose(alone, together[:, : config().prefix_length], atol=1e-5)
    encoder = VideoActionTransformer(m.config.encoder(2))
    have = m.state_dict()
    encoder.load_state_dict({k: have[k] for k in encoder.state_dict()})
    assert torch.allclose(alone, encoder.condition_features(tokens, tau[:, 0], valid, 2), atol=1e-6)


@both_families
@both_attentions
def test_a_token_sees_its_own_groups_time(attention: str, family: str) -> None:
    tokens, tau, group = inputs()
    m = model(attention, family=family)
    per_token = tau.gather(1, group)
    every = torch.arange(group.shape[1]).expand_as(group)
    assert close(m(tokens, tau, group), m(tokens, per_token, every))  # G = L
    assert close(m(tokens, tau, group), m(tokens, per_token))  # without groups
    assert close(m(tokens, tau, torch.zeros_like(group)), m(tokens, tau[:, :1]))  # one for all
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


def test_attention_in_bf16_on_the_cpu_is_the_same_for_long_sequences() -> None:
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, n, 4, generator=g).bfloat16() for n in (700, 800, 800))
    want = attend(query.float(), key.float(), value.float())
    assert torch.allclose(attend(query, key, value).float(), want, atol=0.03)


@both_families
def test_checkpointing_changes_neither_loss_nor_gradients(family: str) -> None:
    tokens, tau, group = inputs()
    results = []
    for checkpointing in (False, True):
        m = model(family=family)
        m.activation_checkpointing = checkpointing
        velocity, feature = m.forward_with_feature(tokens, tau, group, block=2)
        assert feature is not None
        loss = feature.square().mean() + sum(v.square().mean() for v in velocity.values())
        loss.backward()
        results.append((loss, {k: p.grad for k, p in m.named_parameters()}))
    (loss, grads), (loss_again, grads_again) = results
    assert torch.equal(loss, loss_again)
    for (name, grad), again in zip(grads.items(), grads_again.values(), strict=True):
        assert (grad is None) == (again is None), name
        assert grad is None or torch.allclose(grad, again, atol=1e-7), name


COMPILE = """
import torch
from selfflow.worldmodel.transformer import Modality, ModelConfig, VideoActionTransformer

modalities = (
    Modality("text", 6, 2, "condition", (2, 1, 1), stream="text"),
    Modality("action", 6, 2, "target", (2, 1, 1)),
)
tokens = {m.name: torch.randn(2, m.length, 6) for m in modalities}
tau, group = torch.rand(2, 3), torch.tensor([[0, 0, 1, 2]] * 2)
valid = {"text": tau[:, :2] < 0.5}
for more in (("prefix", modalities), ("full", modalities, "flux", 1, "rope")):
    model = VideoActionTransformer(ModelConfig(12, 2, 2, 2.0, *more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        compiled = torch.compile(model.forward_with_feature, backend="eager", fullgraph=True)
        velocity, feature = compiled(tokens, tau, group, valid, 1)
        want, want_feature = model.forward_with_feature(tokens, tau, group, valid, 1)
    torch.testing.assert_close(velocity, want)
    torch.testing.assert_close(feature, want_feature)
"""


@pytest.mark.slow
def test_the_model_compiles_into_one_graph() -> None:
    # in a process of its own: the shape checks of these tests do not compile
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_text_has_its_own_weights_and_lies_at_the_origin() -> None:
    tokens, tau, group = inputs()
    m = model("full", family="flux")
    before = m.features(tokens, tau, group, block=1)
    with torch.no_grad():
        for name, bias in m.blocks[0].named_parameters():
            if name == "text.mlp_out.bias":
                bias += 1.0
    changed = (m.features(tokens, tau, group, block=1) != before).any(-1).all(0)
    assert changed.tolist() == [True] * 2 + [False] * (group.shape[1] - 2)
    rope = {name: layer.rope for name, layer in m.inputs.items()}
    assert torch.equal(rope["text"], torch.tensor([1.0] * 6 + [0.0] * 6).expand(2, 12))
    assert torch.equal(rope["action"][2], rope["video"][0])  # both at time 1, row 0, column 0
    assert not torch.equal(rope["action"][1], rope["video"][0])


@both_families
def test_a_label_is_added_to_the_time(family: str) -> None:
    changes = {"double_blocks": 0, "modalities": IMAGE, "classes": 4}
    m = model("full", family=family, **changes)
    image, tau = {"image": torch.randn(2, 6, 5)}, torch.rand(2, 6)
    label = torch.tensor([0, 2])
    a, b = m(image, tau, label=label), m(image, tau, label=torch.tensor([0, 1]))
    assert torch.allclose(a["image"][0], b["image"][0], atol=1e-6)
    assert not torch.allclose(a["image"][1], b["image"][1])
    # no label is the table's last row
    assert close(m(image, tau), m(image, tau, label=torch.tensor([3, 3])))
    # a label that moves the embedding as its time would is that time
    plain = VideoActionTransformer(replace(m.config, classes=0))
    plain.load_state_dict({k: v for k, v in m.state_dict().items() if k != "labels.weight"})
    with torch.no_grad():
        one, other = m.time(torch.tensor([[0.2], [0.9]]))
        m.labels.weight[1] = other - one
    moved = m(image, torch.full((2, 1), 0.2), label=torch.tensor([1, 1]))
    assert close(moved, plain(image, torch.full((2, 1), 0.9)))
    with pytest.raises(ValueError, match="classes=0"):
        plain(image, tau, label=label)


def test_a_model_without_conditions_has_no_prefix() -> None:
    m = model("prefix", modalities=IMAGE)
    image, tau = {"image": torch.randn(2, 6, 5)}, torch.rand(2, 1)
    assert close(m(image, tau), model("full", modalities=IMAGE)(image, tau))
    with pytest.raises(ValueError, match="no conditions"):
        m.prefix({}, tau[:, 0])


def test_a_modality_is_a_config_entry() -> None:
    """Force: 16 readings of 6 channels within one chunk, with a mask ratio and a weight."""
    force = Modality("force", 6, 16, "target", (16, 1, 1), 0.5, 0.25, clock=(0.0, 1 / 16))
    m = model(family="flux", modalities=(*MODALITIES, force))
    generator = torch.Generator().manual_seed(0)
    tokens = inputs(batch=64)[0]
    tokens["force"] = torch.randn(64, 16, 6, generator=generator)
    noised = flow.draw(tokens, m.config, flow.Schedule(objective="dual"), generator)
    second = (noised.group[:, -16:] == flow.S).float().mean()
    assert second == pytest.approx(0.5, abs=0.06)  # its own R_M
    velocity = m(noised.tokens, noised.tau, noised.group)
    assert velocity["force"].shape == (64, 16, 6)
    mask = {t.name: torch.ones(64, t.length, 1) for t in m.config.targets}
    terms = flow.flow_loss(velocity, noised.velocity, mask)
    error = (velocity["force"] - noised.velocity["force"]).square().mean()
    assert torch.allclose(terms["force"], error)
    (force.weight * terms["force"]).backward()
    grad = m.inputs["force"].project.weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["selfflow_675m", "selfflow_625m"])
def test_the_large_models_take_a_step(name: str) -> None:
    size = yaml.safe_load((MODELS / f"{name}.yaml").read_text())
    c = ModelConfig(**size, attention="full", modalities=MODALITIES)
    torch.manual_seed(0)
    m = VideoActionTransformer(c, activation_checkpointing=True)
    assert sum(p.numel() for p in m.parameters()) > 600e6
    tokens = inputs(batch=1)[0]
    mask = {x.name: torch.ones(1, x.length, 1) for x in c.targets}
    noised = flow.draw(tokens, c, flow.Schedule(), torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            velocity = m(noised.tokens, noised.tau, noised.group)
        return torch.stack(list(flow.flow_loss(velocity, noised.velocity, mask).values())).sum()

    before = loss()
    before.backward()
    torch.optim.SGD(m.parameters(), 1e-3).step()
    with torch.no_grad():
        assert loss() < before


@both_attentions
def test_velocity_follows_from_predicted_data_at_each_tokens_own_time(attention: str) -> None:
    """x_t = x0 + t v, so v = (x_t - x0) / t, with t held above 0.05; actions stay as they were."""
    tokens, tau, group = inputs()
    tau[0, 1] = 0.01
    plain = model(attention)
    asked = tuple(replace(m, answer="data") if m.name == "video" else m for m in MODALITIES)
    told = model(attention, modalities=asked)
    count = config().prefix_length
    times = tau.gather(1, group)[:, count : count + 6, None]
    x0, velocity = plain(tokens, tau, group), told(tokens, tau, group)
    assert torch.allclose(
        velocity["video"], (tokens["video"] - x0["video"]) / times.clamp(min=0.05)
    )
    assert torch.equal(velocity["action"], x0["action"])
    one_time = told(tokens, tau[:, 1:2])  # one for all tokens
    x0 = plain(tokens, tau[:, 1:2])["video"]
    t = tau[:, 1, None, None].clamp(min=0.05)
    assert torch.allclose(one_time["video"], (tokens["video"] - x0) / t)
    if attention == "prefix":
        kept = told.prefix(tokens, tau[:, 0])
        targets = {k: tokens[k] for k in ("video", "action")}
        assert close(told.decode(targets, tau, group[:, count:], kept), velocity)


@both_families
@both_attentions
def test_a_teacher_of_one_time_by_role_saves_work_and_answers_the_same(
    attention: str, family: str
) -> None:
    tokens, tau, group = inputs()
    roles, m = (group > 0).long(), model(attention, family=family)
    plain = m.features(tokens, tau[:, :2], roles, block=2)
    fast = m.features(tokens, tau[:, :2], roles, block=2, by_role=True)
    assert torch.allclose(plain, fast, atol=1e-5)
