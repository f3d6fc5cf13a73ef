"""Every solver on a flow whose solution is known: data N(m, s²), noise N(0, 1)."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from selfflow.worldmodel.sampler import SOLVERS, euler, guided, heun, pack, sde, times, unpack

MEAN, SCALE = 0.7, 0.3  # m, s


def velocity(x: Tensor, t: float) -> Tensor:
    """E[x1 - x0 | x_t = x]: x_t is N((1 - t) m, (1 - t)² s² + t²)."""
    variance = (1 - t) ** 2 * SCALE**2 + t**2
    return (x - (1 - t) * MEAN) * (t - (1 - t) * SCALE**2) / variance - MEAN


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def moments(monkeypatch: pytest.MonkeyPatch, steps: int, last: float) -> tuple[float, float]:
    """Mean and variance at the end of `sde`, exactly: for this velocity its result is a constant
    plus a weighted sum of its random draws, whose weights are read off one by one.
    """
    count = steps  # the start and steps - 1 kicks; sample k has draw k at 1, all others at 0
    draws = list(torch.eye(count + 1, count, dtype=torch.float64).T)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *a, **k: draws.pop(0))
        end = sde(velocity, draws.pop(0), steps, last=last)
    assert not draws
    return float(end[-1]), float((end[:-1] - end[-1]).square().sum())


def orders(errors: list[float]) -> list[float]:
    """Of convergence, from errors at doubled steps."""
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_the_ordinary_solvers(name: str, order: int, shift: float) -> None:
    noise = torch.randn(50, generator=generator(), dtype=torch.float64)
    exact = MEAN + noise * SCALE  # the flow keeps quantiles
    ends = [SOLVERS[name](velocity, noise, n, shift) for n in (128, 256, 512)]
    assert orders([float((end - exact).norm()) for end in ends]) == pytest.approx(
        [order, order], abs=0.12
    )


def test_weak_order_of_the_stochastic_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [moments(monkeypatch, n, last=1 / n) for n in (256, 512, 1024)]
    # the mean keeps to a straight line with score 0, so that it is exact with any number of steps
    assert [mean for mean, _ in ends] == pytest.approx([MEAN] * 3, abs=1e-12)
    errors = [abs(variance - SCALE**2) for _, variance in ends]
    assert orders(errors) == pytest.approx([1, 1], abs=0.1)


def test_stochastic_samples_have_the_datas_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    g = generator()
    noise = torch.randn(20_000, generator=g, dtype=torch.float64)
    end = sde(velocity, noise, 250, generator=g)  # the published setting
    assert end.mean() == pytest.approx(MEAN, abs=0.01)
    assert end.std() == pytest.approx(SCALE, rel=0.05)
    mean, variance = moments(monkeypatch, 250, last=0.04)
    error = 4 * SCALE / math.sqrt(len(noise))
    assert float(end.mean()) == pytest.approx(mean, abs=error)
    assert float(end.std()) == pytest.approx(math.sqrt(variance), abs=error)
    again = sde(velocity, noise, 250, generator=generator())
    other = sde(velocity, noise, 250, generator=generator())
    assert torch.equal(again, other)


def test_published_stochastic_sampler_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """250 points of u = 0 .. 0.96, 249 noisy steps, a noise-free one of 0.04; score written out."""
    seen, g = [], generator()
    noise = torch.randn(8, generator=g, dtype=torch.float64)
    u = torch.linspace(0, 0.96, 250, dtype=torch.float64)
    x, kicks = noise, generator()
    torch.randn(8, generator=kicks, dtype=torch.float64)
    for i in range(250):
        v = -velocity(x, float(1 - u[i]))
        score = (u[i] * v - x) / (1 - u[i])
        w = 1 - u[i]
        step = u[i + 1] - u[i] if i < 249 else torch.tensor(0.04, dtype=torch.float64)
        x = x + (v + w * score) * step
        if i < 249:
            kick = torch.randn(8, generator=kicks, dtype=torch.float64)
            x = x + torch.sqrt(2 * w * step) * kick

    def model(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        return velocity(x, t)

    assert torch.allclose(sde(model, noise, 250, generator=g), x, atol=1e-5)
    assert seen == pytest.approx((1 - u).tolist(), abs=1e-6)


def test_how_often_each_solver_asks_the_model() -> None:
    for name, calls in (("euler", 10), ("heun", 19), ("sde", 10)):
        asked = []
        noise = torch.zeros(1)
        SOLVERS[name](lambda x, t, to=asked: to.append(t) or x, noise, 10, 2.0, generator())
        assert len(asked) == calls
        assert all(a >= b for a, b in pairwise(asked))


@pytest.mark.parametrize("solver", [euler, heun])
def test_a_constant_velocity_is_exact_in_one_step(solver) -> None:
    x0, x1 = torch.randn(5, generator=generator()), torch.ones(5)
    assert torch.allclose(solver(lambda x, t: x1 - x0, x1, 1), x0)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("solver", [euler, heun])
def test_one_possible_datum_is_reached_though_the_model_knows_no_noise_at_its_end(
    solver, steps: int
) -> None:
    def field(x: Tensor, t: float) -> Tensor:
        # E[x1 - x0 | x_t = x] where x0 is always MEAN; at t = 0 x says nothing of x1
        return (x - MEAN) / t if t > 0 else -x

    noise = torch.randn(5, generator=generator(), dtype=torch.float64)
    assert torch.allclose(solver(field, noise, steps), torch.full_like(noise, MEAN))


def test_times_fall_from_one_to_zero_and_shift_towards_noise() -> None:
    assert torch.equal(times(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    for shift in (1.78, 6.93, 15.0):
        shifted = times(4, shift)
        assert shifted[0] == 1
        assert shifted[-1] == 0
        assert shifted[2] == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))
        assert (shifted[1:-1] > times(4)[1:-1]).all()
        # shifting adds log(alpha) to a time's logit
        added = shifted[1:-1].logit() - times(4)[1:-1].logit()
        assert added == pytest.approx(torch.full((3,), math.log(shift)), abs=1e-5)


def test_times_with_a_last_step_of_its_own() -> None:
    t = times(250, last=0.04)
    assert t.shape == (251,)
    assert t.diff()[:-1] == pytest.approx(torch.full((249,), -0.96 / 249), abs=1e-6)
    assert t[-2:].tolist() == pytest.approx([0.04, 0])
    shifted = times(250, 15.0, 0.04)
    assert shifted[[0, -2, -1]].tolist() == pytest.approx([1, 0.04, 0])
    assert (shifted[1:-2] > t[1:-2]).all()
    assert times(1, 2.0, 0.04).tolist() == [1, 0]


def test_wrong_numbers_are_refused() -> None:
    for wrong in ({"steps": 0}, {"shift": 0.0}, {"last": 1.0}, {"last": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            times(**{"steps": 4} | wrong)


def test_guidance_between_low_and_high() -> None:
    def conditional(x: Tensor, t: float) -> Tensor:
        return 2 * x

    def unconditional(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x - 1

    x, asked = torch.tensor([3.0]), []
    both = guided(conditional, unconditional, 3.5, 0.2, 0.7)
    for t in (0.2, 0.5, 0.7):
        assert both(x, t).item() == pytest.approx(2 + 3.5 * (6 - 2))
    assert asked == [0.2, 0.5, 0.7]
    for t in (0.0, 0.19, 0.71, 1.0):
        assert both(x, t).item() == 6
    assert asked == [0.2, 0.5, 0.7]
    off = guided(conditional, unconditional, 1.0)
    assert off(x, 0.5).item() == 6
    assert guided(conditional, unconditional, 0.0)(x, 1.0).item() == 2
    assert asked == [0.2, 0.5, 0.7, 1.0]


def test_guided_gaussians_have_a_closed_form() -> None:
    """Velocities of N(m, s²) and N(0, s²) differ by a term in t alone, so guidance moves the mean
    of the samples to scale · m and leaves their spread."""
    noise = torch.randn(50, generator=generator(), dtype=torch.float64)
    both = guided(velocity, lambda x, t: velocity(x + (1 - t) * MEAN, t) + MEAN, 2.5)
    assert torch.allclose(heun(both, noise, 400), 2.5 * MEAN + SCALE * noise, atol=1e-3)


def test_packing_tokens() -> None:
    tokens = {"video": torch.randn(2, 6, 3), "action": torch.randn(2, 4, 5)}
    x = pack(tokens)
    assert x.shape == (2, 38)
    back = unpack(x, tokens)
    assert list(back) == ["video", "action"]
    assert all(torch.equal(back[name], tokens[name]) for name in tokens)
