"""Times, noising, condition dropout and losses against closed forms, in float64."""

import math

import pytest
import torch
from torch import Tensor

from selfflow.worldmodel import flow
from selfflow.worldmodel.flow import Schedule
from selfflow.worldmodel.transformer import Modality, ModelConfig

N = 20_000
KS_LIMIT = 1.95 / math.sqrt(N)  # Kolmogorov-Smirnov at a false-alarm rate of 1e-3


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config() -> ModelConfig:
    one = (1, 1, 1)
    return ModelConfig(
        12,
        2,
        2,
        1.0,
        "prefix",
        (
            Modality("text", 2, 1, "condition", one),
            Modality("context", 3, 2, "condition", (1, 1, 2)),
            Modality("video", 3, 6, "target", (1, 2, 3), 0.25),
            Modality("action", 2, 4, "target", (4, 1, 1), 0.5),
        ),
    )


def clean(batch: int = 4000) -> dict[str, Tensor]:
    g = gen(1)
    return {
        m.name: torch.randn(batch, m.length, m.channels, generator=g, dtype=torch.float64)
        for m in config().modalities
    }


def distance(sample: Tensor, cdf) -> float:
    """Kolmogorov-Smirnov's largest gap between the sample's distribution and a known one."""
    expected = cdf(sample.sort().values)
    steps = torch.arange(len(sample) + 1, dtype=expected.dtype) / len(sample)
    return float(torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs()).max())


def logit_normal_cdf(t: Tensor, shift: float) -> Tensor:
    return 0.5 * (1 + torch.erf((torch.logit(t) - math.log(shift)) / math.sqrt(2)))


def plateau_cdf(t: Tensor, shift: float) -> Tensor:
    """From the definition, numerically: the density held at its maximum from there on."""
    grid = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    density = torch.exp(-((torch.logit(grid) - math.log(shift)) ** 2) / 2) / (grid * (1 - grid))
    density[density.argmax() :] = density.max()
    total = torch.cat([torch.zeros(1, dtype=torch.float64), density.cumsum(0) / density.sum()])
    return total[(t * 400_000).round().long()]  # to 2.5e-6 in t


CDFS = {
    "uniform": lambda t, shift: t,
    "logit_normal": logit_normal_cdf,
    "plateau_logit_normal": plateau_cdf,
}


@pytest.mark.parametrize("shift", [1.0, 2.95, 10.0])
@pytest.mark.parametrize("distribution", flow.DISTRIBUTIONS)
def test_times_have_their_distribution(distribution: str, shift: float) -> None:
    t = flow.sample_time((N,), gen(), distribution, shift, torch.float64)
    assert 0 <= t.min() <= t.max() <= 1
    assert distance(t, lambda t: CDFS[distribution](t, shift)) < KS_LIMIT


def test_plateau_quantile_is_continuous_and_reaches_both_ends() -> None:
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    t = flow.plateau_quantile(u, 10.0)
    assert t[0] == 0
    assert t[-1] == 1
    assert (t.diff() > 0).all()
    # flat density = constant slope of the quantile function, which is nowhere flatter
    slope = t.diff()
    assert slope[-1000:].max() - slope[-1000:].min() < 1e-12
    assert slope.min() == pytest.approx(float(slope[-1]), abs=1e-9)


@pytest.mark.parametrize("distribution", flow.DISTRIBUTIONS)
def test_a_share_of_the_times_is_close_to_noise(distribution: str) -> None:
    shift = 1.0 if distribution == "uniform" else 2.95
    t = Schedule("dual", distribution, shift, high_noise=0.05).sample((N,), gen(), torch.float64)

    def mixture(t: Tensor) -> Tensor:
        late = ((t - 0.95) / 0.05).clamp(0, 1)
        return 0.95 * CDFS[distribution](t, shift) + 0.05 * late

    assert distance(t, mixture) < KS_LIMIT
    more = Schedule("dual", distribution, shift, high_noise=0.5).sample((N,), gen(), torch.float64)
    assert distance(more, mixture) > 10 * KS_LIMIT


def test_shifting_a_time_and_shifting_its_logit_agree() -> None:
    plain = flow.sample_time((100,), gen(), "logit_normal", 1.0, torch.float64)
    shifted = flow.sample_time((100,), gen(), "logit_normal", 4.63, torch.float64)
    assert torch.allclose(shifted, 4.63 * plain / (1 + 3.63 * plain))


def test_tokens_lie_on_the_path_and_velocity_points_to_noise() -> None:
    tokens = clean()
    noised = flow.draw(tokens, config(), Schedule("dual"), gen())
    per_token = noised.token_times.split([1, 2, 6, 4], 1)
    for name, tau in zip(("text", "context", "video", "action"), per_token, strict=True):
        if name in ("text", "context"):
            assert torch.equal(noised.tokens[name], tokens[name])
            continue
        x1 = noised.velocity[name] + tokens[name]
        t = tau[..., None]
        assert torch.allclose(noised.tokens[name], (1 - t) * tokens[name] + t * x1)
        assert x1.mean().abs() < 0.02
        assert x1.std() == pytest.approx(1, abs=0.02)


def test_context_noise_moves_the_context_alone() -> None:
    tokens = clean()
    noised = flow.draw(tokens, config(), Schedule(context_noise=0.2), gen())
    assert distance(noised.tau[:, 0] / 0.2, lambda t: t) < 1.95 / math.sqrt(4000)
    assert torch.equal(noised.tokens["text"], tokens["text"])
    moved = (noised.tokens["context"] - tokens["context"]).square().mean()
    # x_t - x0 = t (x1 - x0) with unit variances: E = 2 E[t^2] = 2 · 0.04 / 3
    assert moved == pytest.approx(2 * 0.04 / 3, rel=0.1)


def test_dropout_takes_whole_conditions_of_whole_samples() -> None:
    tokens = clean()
    given = torch.rand(4000, 2, generator=gen(3)) < 0.5
    valid = {"context": given, "video": torch.ones(4000, 6, dtype=torch.bool)}
    shares = {"text": 0.1, "context": 0.4, "video": 0.0}
    after = flow.dropped(tokens, valid, shares, gen())
    assert torch.equal(valid["context"], given)  # the batch's own is left alone
    assert after["video"] is valid["video"]
    assert (~after["text"]).double().mean() == pytest.approx(0.1, abs=0.02)
    kept = after["context"].any(1)
    assert torch.equal(after["context"], given & kept[:, None])
    assert kept.double().mean() == pytest.approx(0.6 * 0.75, abs=0.03)
    both = (~after["text"][:, 0] & ~kept).double().mean()
    assert both == pytest.approx(0.1 * 0.55, abs=0.02)  # drawn apart
    again = flow.dropped(tokens, valid, shares, gen())
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert flow.dropped(tokens, valid, {"text": 0.0}, gen()) == valid


def test_dropped_labels_become_the_null_class() -> None:
    label = torch.arange(4000) % 10
    after = flow.dropped_label(label, 10, 0.1, gen())
    null = after == 10
    assert null.double().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(after[~null], label[~null])
    assert torch.equal(flow.dropped_label(label, 10, 0.0, gen()), label)
    assert (flow.dropped_label(label, 10, 1.0, gen()) == 10).all()


def test_flow_loss_is_the_mean_over_what_the_mask_leaves() -> None:
    target = {"video": torch.zeros(2, 3, 2), "action": torch.zeros(2, 2, 2)}
    velocity = {
        "video": torch.arange(12.0).view(2, 3, 2).requires_grad_(),
        "action": torch.ones(2, 2, 2, requires_grad=True),
    }
    mask = {
        "video": torch.tensor([[1.0, 0, 0], [0, 1, 0]])[..., None],
        "action": torch.zeros(2, 2, 2),
    }
    losses = flow.flow_loss(velocity, target, mask)
    assert losses["video"].item() == pytest.approx((0 + 1 + 64 + 81) / 4)
    assert losses["action"] == 0
    (losses["video"] + losses["action"]).backward()
    assert velocity["video"].grad is not None
    assert (velocity["video"].grad[0, 1:] == 0).all()
    assert (velocity["action"].grad == 0).all()


def test_representation_loss_is_over_all_valid_tokens_and_spares_the_teacher() -> None:
    student = torch.tensor([[[1.0, 0.0], [2.0, 2.0], [5.0, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.0, 3.0], [1.0, 1.0], [9.0, 9.0]]], requires_grad=True)
    valid = torch.tensor([[True, True, False]])
    loss = flow.representation_loss(student, teacher, valid)
    assert loss.item() == pytest.approx(1 - (0 + 1) / 2)
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert (student.grad[0, 2] == 0).all()


def test_wrong_words_name_the_choices() -> None:
    with pytest.raises(ValueError, match="self_flow, sra, repa, diffusion_forcing"):
        Schedule("selfflow")
    with pytest.raises(ValueError, match="plateau_logit_normal"):
        Schedule(distribution="normal")
    with pytest.raises(ValueError, match="auto, none, ema, external"):
        Schedule(align="teacher")
    for name in ("context_noise", "high_noise", "sra_gap"):
        with pytest.raises(ValueError, match=name):
            Schedule(**{name: 1.5})
    with pytest.raises(ValueError, match="shift"):
        Schedule(shift=0.0)
    with pytest.raises(ValueError, match="choose distribution=logit_normal"):
        Schedule(shift=2.95)  # which uniform times would ignore
