"""Paired tests, corrections and powers against closed forms and published values."""

from math import comb, inf, pi, sqrt
from statistics import NormalDist

import pytest

from selfflow.eval import ablation_stats as stats


def test_mcnemar_is_the_sign_test_of_the_pairs_that_differ() -> None:
    one = [True] * 9 + [False] * 1 + [True] * 30
    other = [False] * 9 + [True] * 1 + [True] * 30
    wins, losses, p = stats.mcnemar(one, other)
    assert (wins, losses) == (9, 1)
    assert p == pytest.approx(2 * (1 + 10) / 1024)
    assert stats.mcnemar(other, one) == (1, 9, p)
    assert stats.sign_test(0, 0) == 1
    assert stats.sign_test(5, 5) == 1  # more than half twice: never above 1
    with pytest.raises(ValueError, match="zip"):
        stats.mcnemar([True], [])


def test_holm_steps_down_and_keeps_the_order() -> None:
    # the textbook case: 4, 3, 2, 1 times the sorted p, never falling
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 1.0]) == [1.0, 1.0]
    assert stats.holm([]) == []


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157)]
)
def test_students_t_has_its_published_quantiles(freedom: int, t: float) -> None:
    assert stats.t_inside(t, freedom) == pytest.approx(0.95, abs=1e-6)
    assert stats.t_quantile(0.95, freedom) == pytest.approx(t, abs=1e-5)


def test_students_t_in_closed_form() -> None:
    assert stats.t_inside(1.0, 1) == pytest.approx(0.5)  # Cauchy: 2 atan(t) / pi
    assert stats.t_inside(2.0, 2) == pytest.approx(2 / sqrt(6))  # t / sqrt(2 + t^2)
    assert stats.t_inside(1.0, 3) == pytest.approx(2 / pi * (pi / 6 + sqrt(3) / 4))
    assert stats.t_inside(1.96, 4001) == pytest.approx(0.95, abs=1e-3)  # almost normal


def test_paired_t_of_three_seeds() -> None:
    mean, low, high, p = stats.paired_t([1.0, 2.0, 3.0])
    half = 4.302653 / sqrt(3)
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half), abs=1e-5)
    assert p == pytest.approx(1 - sqrt(12) / sqrt(14))  # t = 2 sqrt(3), 2 degrees of freedom
    assert stats.paired_t([0.3]) == (0.3, -inf, inf, 1.0)
    assert stats.paired_t([0.5, 0.5])[1:] == (0.5, 0.5, 0.0)
    assert stats.paired_t([0.0, 0.0])[3] == 1


def power(pairs: int, rate: float, difference: float, alpha: float) -> float:
    """Of the exact test, by going through all outcomes of independent pairs."""
    p1, p2 = rate + difference / 2, rate - difference / 2
    up, down = p1 * (1 - p2), p2 * (1 - p1)
    total = 0.0
    for m in range(1, pairs + 1):
        apart = comb(pairs, m) * (up + down) ** m * (1 - up - down) ** (pairs - m)
        if apart < 1e-9:
            continue
        share = up / (up + down)
        for k in range(m + 1):
            if stats.sign_test(k, m - k) < alpha:
                total += apart * comb(m, k) * share**k * (1 - share) ** (m - k)
    return total


def test_the_detectable_difference_is_found_as_often_as_said() -> None:
    least = stats.detectable_success(150, 0.5)
    assert least == pytest.approx(0.16, abs=0.005)
    assert 0.72 < power(150, 0.5, least, 0.05) < 0.84  # the exact test is a little cautious
    # more episodes see less, a stricter alpha sees more
    assert stats.detectable_success(600, 0.5) < least < stats.detectable_success(150, 0.5, 0.007)
    assert stats.detectable_success(3, 0.5) == 1.0  # nothing is detectable by three pairs


def test_the_detectable_mean_grows_with_spread_and_shrinks_with_seeds() -> None:
    want = (4.302653 + 1.060660) * sqrt(2) * 0.01 / sqrt(3)
    assert stats.detectable_mean(3, 0.01) == pytest.approx(want, rel=1e-4)
    assert stats.detectable_mean(1, 0.01) == inf
    normal = NormalDist()
    many = (normal.inv_cdf(0.975) + normal.inv_cdf(0.8)) * sqrt(2) / sqrt(4000)
    assert stats.detectable_mean(4000, 1.0) == pytest.approx(many, rel=1e-3)
    assert stats.with_episodes(0.05, 0.5, 50) == pytest.approx(sqrt(0.0025 + 0.005))


def test_where_a_curve_comes_to_a_value() -> None:
    x, y = [100.0, 200.0, 300.0], [1.0, 0.5, 0.6]
    assert stats.first_reach(x, y, 0.75, rising=False) == pytest.approx(150)
    assert stats.first_reach(x, y, 0.4, rising=False) is None
    assert stats.first_reach(x, y, 2.0, rising=False) == 100  # at the first point, or before
    assert stats.first_reach(x, [0.1, 0.2, 0.4], 0.3, rising=True) == pytest.approx(250)
    assert stats.value_at(x, y, 250.0) == pytest.approx(0.55)
    assert stats.value_at(x, y, 50.0) is None
