"""Every objective's noise levels, targets and teacher inputs are what the paper says."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfflow.worldmodel import flow
from selfflow.worldmodel.batches import Inputs
from selfflow.worldmodel.flow import OBJECTIVES, Schedule
from selfflow.worldmodel.layout import Layout
from selfflow.worldmodel.loop import LoopConfig, State, generator
from selfflow.worldmodel.objective import Student, losses
from selfflow.worldmodel.train_config import TrainConfig
from selfflow.worldmodel.transformer import Modality, ModelConfig

N = 4000
KS_LIMIT = 1.95 / math.sqrt(N)  # Kolmogorov-Smirnov at a false-alarm rate of 1e-3
SHIFT = 2.95
SHIFTS = {"uniform": 1.0, "logit_normal": SHIFT, "plateau_logit_normal": SHIFT}
ONE = (1, 1, 1)
CONFIG = ModelConfig(
    12,
    2,
    2,
    1.0,
    "prefix",
    (
        Modality("text", 2, 1, "condition", ONE),
        Modality("context", 3, 2, "condition", (1, 1, 2)),
        Modality("image", 3, 8, "target", (1, 2, 4), 0.25),
        Modality("video", 3, 20, "target", (5, 2, 2), 0.1),
        Modality("action", 2, 4, "target", (4, 1, 1), 0.5),
    ),
)
LENGTHS = [m.length for m in CONFIG.modalities]
RATIOS = {"image": 0.25, "video": 0.1, "action": 0.5}
CDFS = {
    "uniform": lambda t: t,
    "logit_normal": lambda t: 0.5 * (1 + torch.erf((t.logit() - math.log(SHIFT)) / math.sqrt(2))),
}
UNMASKED = [name for name in OBJECTIVES if name != "full_masking"]


def clean() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        m.name: torch.randn(N, m.length, m.channels, generator=g, dtype=torch.float64)
        for m in CONFIG.modalities
    }


CLEAN = clean()


def draw(objective: str, seed: int = 2, **schedule: Any) -> flow.Noised:
    """One noising of the same clean tokens."""
    generator = torch.Generator().manual_seed(seed)
    return flow.draw(CLEAN, CONFIG, Schedule(objective, **schedule), generator)


def target_times(noised: flow.Noised) -> Tensor:
    return noised.token_times[:, CONFIG.prefix_length :]


def distance(sample: Tensor, cdf) -> float:
    """Kolmogorov-Smirnov's largest gap between the sample's distribution and a known one."""
    expected = cdf(sample.sort().values)
    steps = torch.arange(len(sample) + 1, dtype=expected.dtype) / len(sample)
    return float(torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs()).max())


@pytest.mark.parametrize("distribution", CDFS)
@pytest.mark.parametrize("objective", UNMASKED)
def test_every_tokens_time_has_the_marginal_p(objective: str, distribution: str) -> None:
    times = target_times(draw(objective, distribution=distribution, shift=SHIFTS[distribution]))
    for token in (0, 5, 9, 25, 31):  # image, video, actions
        assert distance(times[:, token], CDFS[distribution]) < KS_LIMIT


@pytest.mark.parametrize("distribution", CDFS)
def test_full_masking_is_the_mixture_with_pure_noise(distribution: str) -> None:
    noised = draw("full_masking", distribution=distribution, shift=SHIFTS[distribution])
    per_modality = noised.token_times.split(LENGTHS, 1)[2:]
    for ratio, times in zip(RATIOS.values(), per_modality, strict=True):
        gone = times == 1
        assert gone.double().mean() == pytest.approx(ratio, abs=0.02)
        first, left = times[:, 0], times[:, 0][~gone[:, 0]]
        assert distance(left, CDFS[distribution]) < 1.95 / math.sqrt(len(left))
        # (1 - R) p + R delta_1 is R away from p just below 1
        assert distance(first, CDFS[distribution]) == pytest.approx(ratio, abs=0.03)
    for name, times in zip(RATIOS, per_modality, strict=True):
        x1 = CLEAN[name] + noised.velocity[name]
        assert torch.allclose(noised.tokens[name][times == 1], x1[times == 1], atol=1e-12)


@pytest.mark.parametrize("objective", ["dual", "self_flow"])
def test_two_times_are_independent_and_not_sorted(objective: str) -> None:
    t, s = draw(objective).tau[:, 1:].T
    assert (t < s).double().mean() == pytest.approx(0.5, abs=0.04)
    assert torch.corrcoef(torch.stack([t, s]))[0, 1].abs() < 0.06
    for low in (0.0, 0.5):  # given t, s has still the whole of p
        near = s[(t >= low) & (t < low + 0.5)]
        assert distance(near, CDFS["uniform"]) < 1.95 / math.sqrt(len(near))


@pytest.mark.parametrize("objective", ["vanilla", "sra", "repa"])
def test_one_time_for_all_targets(objective: str) -> None:
    times = target_times(draw(objective))
    assert (times == times[:, :1]).all()


def test_diffusion_forcing_draws_every_token_apart() -> None:
    noised = draw("diffusion_forcing", context_noise=0.2)
    assert noised.group is None
    assert noised.tau.shape == (N, sum(LENGTHS))
    times = target_times(noised)
    assert torch.corrcoef(times.T).fill_diagonal_(0).abs().max() < 0.08
    conditions = noised.tau[:, : CONFIG.prefix_length]
    assert (conditions == conditions[:, :1]).all()
    assert distance(conditions[:, 0] / 0.2, CDFS["uniform"]) < KS_LIMIT


@pytest.mark.parametrize("objective", ["dual", "self_flow", "full_masking"])
def test_mask_ratio_is_each_modalitys_own_and_bernoulli(objective: str) -> None:
    group = draw(objective).group
    assert group is not None
    assert (group[:, : CONFIG.prefix_length] == flow.CONDITION).all()
    parts = group.split(LENGTHS, 1)[2:]
    for ratio, part in zip(RATIOS.values(), parts, strict=True):
        masked = (part == flow.S).double()
        assert ((part == flow.S) | (part == flow.T)).all()
        assert masked.mean() == pytest.approx(ratio, abs=0.02)
        # an exact count would have no variance over samples, tubes or blocks a larger one
        want = masked.shape[1] * ratio * (1 - ratio)
        assert masked.sum(1).var() == pytest.approx(want, rel=0.12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_noise_path_and_target_velocity(objective: str) -> None:
    noised = draw(objective, context_noise=0.2)
    for m, times in zip(CONFIG.modalities, noised.token_times.split(LENGTHS, 1), strict=True):
        if m.role == "condition":
            continue
        x0, t = CLEAN[m.name], times[..., None]
        x1 = x0 + noised.velocity[m.name]
        assert torch.allclose(noised.tokens[m.name], (1 - t) * x0 + t * x1, atol=1e-12)
        assert distance(x1[:, 0, 0], lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2)))) < KS_LIMIT


def test_objectives_differ_in_nothing_else() -> None:
    """From one generator: the same t, mask, condition and noise."""
    reference = draw("dual", context_noise=0.2)
    for objective in OBJECTIVES:
        other = draw(objective, context_noise=0.2)
        for name, velocity in reference.velocity.items():
            assert torch.equal(other.velocity[name], velocity)
        assert torch.equal(other.tokens["context"], reference.tokens["context"])
        if other.group is not None:
            assert torch.equal(other.group, reference.group)
            assert torch.equal(other.tau[:, :2], reference.tau[:, :2])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_teacher_sees_the_same_noise_at_the_least_time(objective: str) -> None:
    student = draw(objective, context_noise=0.2, align="ema")
    teacher = flow.teacher_view(student, CLEAN, CONFIG)
    t, s = student.tau[:, 1], student.tau[:, 2]
    least = {"two": torch.minimum(t, s), "own": target_times(student).amin(1)}
    cleaner = least.get(OBJECTIVES[objective][0], t)
    assert torch.equal(student.teacher_time, cleaner)
    assert (cleaner[:, None] <= target_times(student)).all()
    assert torch.equal(target_times(teacher), cleaner[:, None].expand(-1, 32))
    assert torch.equal(teacher.token_times[:, :3], student.token_times[:, :3])
    for name in RATIOS:
        x1 = CLEAN[name] + student.velocity[name]
        tau = cleaner[:, None, None]
        want = (1 - tau) * CLEAN[name] + tau * x1
        assert torch.allclose(teacher.tokens[name], want, rtol=0, atol=1e-12)
    # conditions, their noise included, are the student's own
    assert all(teacher.tokens[name] is student.tokens[name] for name in ("text", "context"))


def test_sra_gap_makes_the_teacher_cleaner() -> None:
    at_once, ahead = draw("sra"), draw("sra", sra_gap=0.2)
    assert torch.equal(at_once.teacher_time, at_once.tau[:, 1])
    assert torch.equal(ahead.tau, at_once.tau)
    t = ahead.tau[:, 1]
    assert ahead.teacher_time.min() == 0  # max(0, t - U(0, g))
    inside = t >= 0.2
    gap = (t - ahead.teacher_time)[inside] / 0.2
    assert distance(gap, CDFS["uniform"]) < 1.95 / math.sqrt(len(gap))
    assert (ahead.teacher_time <= t).all()


def test_alignment_follows_the_objective_unless_named() -> None:
    want = {
        "vanilla": "none",
        "dual": "none",
        "self_flow": "ema",
        "sra": "ema",
        "repa": "external",
        "diffusion_forcing": "none",
        "full_masking": "none",
    }
    assert {name: Schedule(name).alignment for name in OBJECTIVES} == want
    assert Schedule("dual", align="external").alignment == "external"
    assert Schedule("self_flow", align="none").alignment == "none"
    assert Schedule("diffusion_forcing", align="ema").alignment == "ema"


class Recorder(nn.Module):
    """Stands where the student or its moving average does: notes what it is given."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.model, self.calls = model, []
        # as if it were its weights: every value that it answers
        self.feature = nn.Parameter(torch.randn(3, model.prefix_length + 15, 5, generator=g))

    def forward(self, seen: flow.Noised, valid: Any, block: int, rows: slice, raw: bool = False):
        self.calls.append((seen, valid, block, raw, torch.is_grad_enabled()))
        velocity = {m.name: seen.velocity[m.name] + 2 for m in self.model.targets}
        return velocity, None if block is None else self.feature[:, rows]


def step(**keys: Any) -> tuple[TrainConfig, Inputs, Recorder, Recorder, dict[str, Tensor]]:
    """One loss of worldmodel/objective.py on random tokens, a third of the targets absent."""
    config = TrainConfig(
        data=["none"],
        layout=Layout(32, 32, 16, future=2, chunk=7),
        text_dropout=0.5,
        context_noise=0.2,
        precision="fp32",
        **keys,
    )
    model, g = config.transformer, torch.Generator().manual_seed(0)
    tokens, valid, mask = {}, {}, {}
    for m in model.modalities:
        tokens[m.name] = torch.randn(3, m.length, m.channels, generator=g)
        if m.role == "target":
            valid[m.name] = torch.rand(3, m.length, generator=g) < 0.66
            mask[m.name] = valid[m.name][..., None].float()
    inputs = Inputs(tokens, valid, mask)
    student, average = Recorder(model, 1), Recorder(model, 2)
    aim = torch.ones(3, 8, 5) if config.noise.alignment == "external" else None
    values = losses(student, average, inputs, config, generator(0, 0), aim)
    return config, inputs, student, average, values


@pytest.mark.parametrize("objective", ["self_flow", "sra", "diffusion_forcing", "full_masking"])
def test_student_and_teacher_share_all_but_the_time(objective: str) -> None:
    config, inputs, student, average, _ = step(objective=objective, alignment="ema")
    (seen, valid, block, raw, gradient), (view, same, above, bare, none) = (
        student.calls[0],
        average.calls[0],
    )
    assert len(student.calls) == len(average.calls) == 1
    assert (block, above) == config.blocks
    assert (raw, bare, gradient, none) == (False, True, True, False)
    assert same is valid  # one draw of condition dropout
    assert not valid["text"].all()
    for m in config.transformer.modalities:
        if m.role == "condition":
            assert torch.equal(view.tokens[m.name], seen.tokens[m.name])
            continue
        x0 = inputs.tokens[m.name]
        tau = seen.teacher_time[:, None, None]
        want = (1 - tau) * x0 + tau * (x0 + seen.velocity[m.name])
        assert torch.allclose(view.tokens[m.name], want, atol=1e-5)
    assert (view.token_times[:, config.transformer.prefix_length :] <= tau[..., 0]).all()


def test_representation_loss_is_over_all_valid_targets_masked_or_not() -> None:
    config, inputs, student, average, values = step(objective="self_flow", video_mask=0.4)
    first = config.transformer.prefix_length
    group = student.calls[0][0].group[:, first:]
    valid = torch.cat([inputs.valid["video"], inputs.valid["action"]], 1)
    assert (group[valid] == flow.S).any()
    assert (group[valid] == flow.T).any()
    cosine = nn.functional.cosine_similarity(student.feature, average.feature, dim=-1)[:, first:]
    assert values["rep"].item() == pytest.approx(1 - cosine[valid].mean().item(), abs=1e-6)
    # every velocity is 2 off
    assert values["video"].item() == values["action"].item() == pytest.approx(4)
    assert values["loss"].item() == pytest.approx(8 + 0.8 * values["rep"].item())
    values["loss"].backward()
    assert average.feature.grad is None
    reached = student.feature.grad.norm(dim=-1) > 0
    assert torch.equal(reached[:, first:], valid)
    assert not reached[:, :first].any()


def test_an_external_teacher_speaks_of_video_alone() -> None:
    config, inputs, student, average, values = step(objective="repa", teacher="a/model")
    first = config.transformer.prefix_length
    cosine = nn.functional.cosine_similarity(student.feature, torch.ones(5), dim=-1)
    valid = inputs.valid["video"]
    want = 1 - cosine[:, first : first + 8][valid].mean().item()
    assert values["rep"].item() == pytest.approx(want, abs=1e-6)
    assert not average.calls


def test_an_external_teachers_features_may_lie_on_another_device() -> None:
    # a teacher answers on the frames' device, the CPU; the meta device stands for a GPU
    config, inputs, *_ = step(objective="repa", teacher="a/model")
    with torch.device("meta"):
        student = Student(config.transformer, aim=5)
    there = inputs.to(torch.device("meta"))
    values = losses(student, student, there, config, generator(0, 0), torch.ones(3, 8, 5))
    assert values["rep"].device.type == "meta"


@pytest.mark.parametrize("objective", ["vanilla", "dual", "diffusion_forcing", "full_masking"])
def test_without_alignment_nobody_teaches(objective: str) -> None:
    _, _, student, average, values = step(objective=objective)
    assert set(values) == {"loss", "video", "action"}
    assert student.calls[0][2] is None
    assert not average.calls


def test_moving_average_moves_every_optimiser_step() -> None:
    config = LoopConfig(lr=0.1, warmup=0, ema=0.9, ema_warmup=False, accumulate=2, batch=2)
    torch.manual_seed(0)
    state = State(nn.Linear(3, 1), config)
    for _ in range(3):
        before = state.average.weight.clone()
        for _ in range(config.accumulate):
            state.backward({"loss": state.student(torch.ones(1, 3)).square().mean()})
            assert torch.equal(state.average.weight, before)
        state.update(config.batch)
        assert not torch.equal(state.average.weight, before)
        assert torch.allclose(state.average.weight, 0.9 * before + 0.1 * state.student.weight)
