"""Flow matching and Self-Flow's objectives against closed forms, in float64."""

import math

import pytest
import torch
from torch import Tensor

from selfflow.worldmodel import flow
from selfflow.worldmodel.flow import Schedule
from selfflow.worldmodel.transformer import Modality, ModelConfig

N = 4000
KS_LIMIT = 1.95 / math.sqrt(N)  # Kolmogorov-Smirnov at a false-alarm rate of 1e-3


def config(video_mask: float = 0.25, action_mask: float = 0.5) -> ModelConfig:
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
            Modality("video", 3, 6, "target", (1, 2, 3), video_mask),
            Modality("action", 2, 4, "target", (4, 1, 1), action_mask),
        ),
    )


def clean(batch: int = N) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        m.name: torch.randn(batch, m.length, m.channels, generator=g, dtype=torch.float64)
        for m in config().modalities
    }


def draw(schedule: Schedule, c: ModelConfig | None = None) -> flow.Noised:
    return flow.draw(clean(), c or config(), schedule, torch.Generator().manual_seed(2))


def distance(sample: Tensor, cdf) -> float:
    """Kolmogorov-Smirnov's largest gap between the sample's distribution and a known one."""
    expected = cdf(sample.sort().values)
    steps = torch.arange(len(sample) + 1, dtype=expected.dtype) / len(sample)
    return float(torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs()).max())


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


CDFS = {
    "uniform": lambda t: t,
    "logit_normal": lambda t: normal_cdf(torch.logit(t) - math.log(2.95)),
}


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize("objective", ["vanilla", "dual", "self_flow"])
def test_every_tokens_time_has_the_marginal_p(objective: str, distribution: str) -> None:
    noised = draw(Schedule(objective, distribution, shift=2.95))
    per_token = noised.tau.gather(1, noised.group)
    for token in (3, 5, 9, 12):  # two of video, two of actions
        assert distance(per_token[:, token], CDFS[distribution]) < KS_LIMIT


def test_shifting_a_time_and_shifting_its_logit_agree() -> None:
    g = torch.Generator
    plain = flow.sample_time((100,), g().manual_seed(0), "logit_normal", 1.0, torch.float64)
    shifted = flow.sample_time((100,), g().manual_seed(0), "logit_normal", 4.63, torch.float64)
    assert torch.allclose(shifted, 4.63 * plain / (1 + 3.63 * plain))


def test_two_times_are_independent_and_not_sorted() -> None:
    tau = draw(Schedule("dual")).tau
    assert (tau[:, 1] < tau[:, 2]).double().mean() == pytest.approx(0.5, abs=0.04)
    assert torch.corrcoef(tau[:, 1:].T)[0, 1].abs() < 0.06
    vanilla = draw(Schedule("vanilla")).tau
    assert torch.equal(vanilla[:, 1], vanilla[:, 2])


def test_mask_ratio_is_each_modalitys_own_and_bernoulli() -> None:
    group = draw(Schedule("dual")).group
    assert (group[:, :3] == flow.CONDITION).all()
    video, action = group[:, 3:9] == flow.S, group[:, 9:] == flow.S
    assert video.double().mean() == pytest.approx(0.25, abs=0.01)
    assert action.double().mean() == pytest.approx(0.5, abs=0.02)
    # an exact count would have no variance over samples
    assert video.sum(1).double().var() == pytest.approx(6 * 0.25 * 0.75, rel=0.1)
    assert set(group[:, 3:].unique().tolist()) == {flow.T, flow.S}


def test_tokens_lie_on_the_path_and_velocity_points_to_noise() -> None:
    tokens, noised = clean(), draw(Schedule("dual"))
    per_token = noised.tau.gather(1, noised.group).split([1, 2, 6, 4], 1)
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
    tokens, noised = clean(), draw(Schedule(context_noise=0.2))
    assert distance(noised.tau[:, 0] / 0.2, lambda t: t) < KS_LIMIT
    assert torch.equal(noised.tokens["text"], tokens["text"])
    moved = (noised.tokens["context"] - tokens["context"]).square().mean()
    # x_t - x0 = t (x1 - x0) with unit variances: E = 2 E[t^2] = 2 · 0.04 / 3
    assert moved == pytest.approx(2 * 0.04 / 3, rel=0.1)


def test_teacher_is_at_the_cleaner_time_with_the_same_noise() -> None:
    tokens, student = clean(), draw(Schedule(context_noise=0.2))
    teacher = flow.teacher_view(student, tokens, config())
    cleaner = torch.minimum(student.tau[:, 1], student.tau[:, 2])
    assert torch.equal(teacher.tau, torch.stack([student.tau[:, 0], cleaner, cleaner], 1))
    t = cleaner[:, None, None]
    for name in ("video", "action"):
        x1 = student.velocity[name] + tokens[name]
        assert torch.allclose(teacher.tokens[name], (1 - t) * tokens[name] + t * x1)
    assert torch.equal(teacher.tokens["context"], student.tokens["context"])


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
    with pytest.raises(ValueError, match="self_flow"):
        Schedule("selfflow")
    with pytest.raises(ValueError, match="logit_normal"):
        Schedule(distribution="normal")
    with pytest.raises(ValueError, match="context_noise"):
        Schedule(context_noise=1.5)
