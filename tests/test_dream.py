"""Sampling all targets together, on data whose velocity is known: a joint Gaussian."""

from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor, nn

from selfflow.worldmodel.dream import Sampling, dream
from selfflow.worldmodel.transformer import (
    Modality,
    ModelConfig,
    Prefix,
    Tokens,
    Valid,
    VideoActionTransformer,
)

MODALITIES = (
    Modality("text", 3, 1, "condition", (1, 1, 1)),
    Modality("context", 2, 4, "condition", (1, 2, 2)),
    Modality("video", 2, 4, "target", (1, 2, 2)),
    Modality("action", 3, 2, "target", (2, 1, 1)),
)
CONFIG = ModelConfig(12, 2, 2, 2.0, "prefix", MODALITIES)


class Gaussian:
    """The exact velocity E[x1 - x0 | x_tau] where (video, action) ~ N(mean(text), covariance)."""

    def __init__(self) -> None:
        one = (1, 1, 1)
        self.config = ModelConfig(
            12,
            1,
            1,
            1.0,
            "full",
            (
                Modality("text", 1, 1, "condition", one),
                Modality("video", 1, 2, "target", (2, 1, 1)),
                Modality("action", 1, 1, "target", one),
            ),
        )
        root = torch.tensor([[0.5, 0, 0], [0.3, 0.4, 0], [0.2, -0.6, 0.7]], dtype=torch.float64)
        self.covariance = root @ root.T
        self.slope = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)

    def mean(self, text: Tensor) -> Tensor:
        return text[:, 0] * self.slope

    def forward(self, tokens: Tokens, tau: Tensor, group: Tensor, valid: Valid = None) -> Tokens:
        text = tokens["text"]
        if valid and "text" in valid:
            text = torch.where(valid["text"][..., None], text, 0.0)
        own = tau[0][group[0]]
        assert own[0] == 0, "conditions are clean"
        t = own[1:].diag()
        left = torch.eye(3, dtype=torch.float64) - t
        mean = self.mean(text)
        x = torch.cat([tokens["video"], tokens["action"]], 1)[..., 0]
        total = left @ self.covariance @ left + t @ t
        gain = (t - self.covariance @ left) @ torch.linalg.inv(total)
        v = (x - mean @ left) @ gain.T - mean
        return {"video": v[:, :2, None], "action": v[:, 2:, None]}

    def prefix(self, tokens: Tokens, tau: Tensor, valid: Valid = None) -> Prefix:
        raise AssertionError("attention=full keeps no prefix")

    def decode(
        self, tokens: Tokens, tau: Tensor, group: Tensor, prefix: Prefix, valid: Valid = None
    ) -> Tokens:
        raise AssertionError("attention=full keeps no prefix")


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.cov(x.T)


N = 20_000
TEXT = torch.full((N, 1, 1), 2.0, dtype=torch.float64)


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling("euler", 200), marks=pytest.mark.slow),
        Sampling("heun", 30),
        Sampling("sde", 80),
    ],
)
def test_jointly_sampled_targets_have_the_joint_distribution(sampling: Sampling) -> None:
    model = Gaussian()
    found = dream(model, {"text": TEXT}, {}, sampling, seeded())
    mean, covariance = moments(torch.cat([found["video"], found["action"]], 1)[..., 0])
    assert torch.allclose(mean, model.mean(TEXT)[0], atol=0.04)
    assert torch.allclose(covariance, model.covariance, atol=0.04)


def test_given_actions_leave_the_conditional_distribution() -> None:
    model = Gaussian()
    action = torch.full((N, 1, 1), 1.5, dtype=torch.float64)
    found = dream(model, {"text": TEXT}, {}, Sampling("heun", 40), seeded(), {"action": action})
    assert torch.equal(found["action"], action)
    s, m = model.covariance, model.mean(TEXT)[0]
    mean, covariance = moments(found["video"][..., 0])
    assert torch.allclose(mean, m[:2] + s[:2, 2] / s[2, 2] * (1.5 - m[2]), atol=0.03)
    expected = s[:2, :2] - torch.outer(s[:2, 2], s[2, :2]) / s[2, 2]
    assert torch.allclose(covariance, expected, atol=0.03)


def test_guidance_moves_the_mean_by_its_scale() -> None:
    """Both velocities share the covariance, so the guided flow is that of scale · text."""
    model = Gaussian()
    found = dream(model, {"text": TEXT}, {}, Sampling("heun", 40, guidance=3.0), seeded())
    mean, covariance = moments(torch.cat([found["video"], found["action"]], 1)[..., 0])
    assert torch.allclose(mean, model.mean(3 * TEXT)[0], atol=0.04)
    assert torch.allclose(covariance, model.covariance, atol=0.04)


@pytest.fixture
def model() -> VideoActionTransformer:
    """Small, with no weight left at zero, so that every token matters to every other."""
    torch.manual_seed(0)
    made = VideoActionTransformer(CONFIG)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


class Uncached:
    """The same model, run whole at every step."""

    def __init__(self, model: VideoActionTransformer) -> None:
        self.config = replace(model.config, attention="full")
        self.forward, self.prefix, self.decode = model.forward, model.prefix, model.decode


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("names", [(), ("action",), ("video",)])
def test_the_cached_prefix_changes_nothing(
    model: VideoActionTransformer, guidance: float, names: tuple[str, ...]
) -> None:
    random = seeded(1)
    clean = {m.name: torch.randn(2, m.length, m.channels, generator=random) for m in MODALITIES}
    given = {name: clean[name] for name in names}
    tokens = {m.name: clean[m.name] for m in CONFIG.conditions}
    valid = {"context": torch.tensor([[True, True, False, True]] * 2)}
    sampling = Sampling("euler", 3, guidance=guidance)
    one = dream(model, tokens, valid, sampling, seeded(), given)
    other = dream(Uncached(model), tokens, valid, sampling, seeded(), given)
    for m in CONFIG.targets:
        assert torch.allclose(one[m.name], other[m.name], atol=1e-5)
        assert one[m.name].shape == (2, m.length, m.channels)


def test_the_same_seed_dreams_the_same(model: VideoActionTransformer) -> None:
    tokens = {m.name: torch.ones(1, m.length, m.channels) for m in CONFIG.conditions}
    one, same, other = (
        dream(model, tokens, {}, Sampling("sde", 3), seeded(s))["video"] for s in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_mistakes_are_named(model: VideoActionTransformer) -> None:
    tokens = {m.name: torch.ones(1, m.length, m.channels) for m in MODALITIES}
    with pytest.raises(ValueError, match="given depth: must be some, not all, of the targets"):
        dream(model, tokens, {}, Sampling(), seeded(), {"depth": tokens["video"]})
    both = {name: tokens[name] for name in ("video", "action")}
    with pytest.raises(ValueError, match="must be some, not all"):
        dream(model, tokens, {}, Sampling(), seeded(), both)
    with pytest.raises(ValueError, match="sampler=dpm: choose one of euler"):
        Sampling("dpm")
    with pytest.raises(ValueError, match="steps=1 must be 2 or more"):
        Sampling("sde", 1)
