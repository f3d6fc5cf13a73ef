"""Statistics of an ablation: paired tests, correction for several of them, and what they can see.

Two arms are compared on the same evaluation seeds by McNemar's exact test, and over training seeds
by Student's t of the paired differences. Closed forms only, no tables.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import atan, comb, cos, isfinite, pi, sin, sqrt
from statistics import NormalDist, fmean, stdev

ALPHA, POWER = 0.05, 0.8


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> tuple[int, int, float]:
    """Pairs won by each side alone, and the exact two-sided p that the winners are a coin's.

    Raises ValueError where the two are not as long.
    """
    pairs = list(zip(one, other, strict=True))
    wins, losses = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    return wins, losses, sign_test(wins, losses)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of so many heads and tails of a fair coin; 1 without a throw."""
    n, k = wins + losses, min(wins, losses)
    tail = sum(comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p by Holm's step-down method: below alpha where the family's error rate is."""
    adjusted, before = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        before = adjusted[i] = max(before, min(1.0, (len(p) - rank) * p[i]))
    return adjusted


def t_inside(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's t with a whole number of degrees of freedom.

    Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    if freedom < 1 or t < 0:
        raise ValueError(f"t={t} must not be negative, freedom={freedom} at least 1")
    angle = atan(t / sqrt(freedom))
    c, s = cos(angle), sin(angle)
    if freedom % 2:
        term, total = c, c if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= c * c * (k - 1) / k
            total += term
        return 2 / pi * (angle + s * total)
    term = total = 1.0
    for k in range(2, freedom - 1, 2):
        term *= c * c * (k - 1) / k
        total += term
    return s * total


def t_quantile(inside: float, freedom: int) -> float:
    """The t within which |T| lies with this probability."""
    if not 0 <= inside < 1:
        raise ValueError(f"inside={inside}: must lie in 0 .. 1")
    low, high = 0.0, 1.0
    while t_inside(high, freedom) < inside:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, freedom) < inside else (low, middle)
    return high


def paired_t(differences: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, its 95 % interval, and two-sided p of a list of paired differences.

    Of one alone the interval is endless and p is 1; of equal ones the interval is a point.
    """
    n, mean = len(differences), fmean(differences)
    if n < 2:
        return mean, float("-inf"), float("inf"), 1.0
    error = stdev(differences) / sqrt(n)
    half = t_quantile(1 - ALPHA, n - 1) * error
    if error == 0:
        return mean, mean, mean, float(mean == 0)
    return mean, mean - half, mean + half, 1 - t_inside(abs(mean) / error, n - 1)


def detectable_success(
    pairs: int, rate: float = 0.5, alpha: float = ALPHA, power: float = POWER
) -> float:
    """Least difference of two success rates around `rate` that McNemar's test finds with `power`.

    Solves pairs = (z_(1-alpha/2) sqrt(q) + z_power sqrt(q - d²))² / d² for d (Connor 1987), where
    q, the share of pairs that differ, is that of two independent outcomes with rates rate ± d / 2:
    the most cautious case, since success on one seed does go with success on it again. 1 where not
    even the largest possible difference would do.
    """
    normal = NormalDist()
    z, w = normal.inv_cdf(1 - alpha / 2), normal.inv_cdf(power)
    largest = 2 * min(rate, 1 - rate)

    def needed(d: float) -> float:
        p1, p2 = rate + d / 2, rate - d / 2
        q = p1 * (1 - p2) + p2 * (1 - p1)
        return (z * sqrt(q) + w * sqrt(q - d * d)) ** 2 / (d * d)

    if needed(largest) > pairs:
        return 1.0
    low, high = 0.0, largest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle) > pairs else (low, middle)
    return high


def detectable_mean(
    trainings: int, spread: float, alpha: float = ALPHA, power: float = POWER
) -> float:
    """Least mean of paired differences over training seeds that Student's t finds with `power`.

    (t_(1-alpha/2) + t_power) sd / sqrt(trainings), both of trainings - 1 degrees of freedom, where
    sd = sqrt(2) spread: `spread` is one arm's deviation between training seeds, and nothing is
    assumed to be shared by two arms of one seed. Endless with one training.
    """
    if trainings < 2:
        return float("inf")
    freedom = trainings - 1
    quantiles = t_quantile(1 - alpha, freedom) + t_quantile(2 * power - 1, freedom)
    return quantiles * sqrt(2) * spread / sqrt(trainings)


def with_episodes(spread: float, rate: float, episodes: int) -> float:
    """Deviation of a measured success rate between training seeds: the true rates' own, and that of
    so many episodes."""
    return sqrt(spread**2 + rate * (1 - rate) / episodes)


def first_reach(x: Sequence[float], y: Sequence[float], aim: float, rising: bool) -> float | None:
    """Where a curve through the points first comes to `aim`, straight between them; None: never."""
    sign = 1 if rising else -1
    points = [(a, sign * (b - aim)) for a, b in zip(x, y, strict=True) if isfinite(b)]
    if points and points[0][1] >= 0:
        return points[0][0]
    for (a, below), (b, above) in pairwise(points):
        if above >= 0:
            return a + (b - a) * -below / (above - below)
    return None


def value_at(x: Sequence[float], y: Sequence[float], where: float) -> float | None:
    """The curve's value there, straight between its points; None outside of them."""
    for (a, ya), (b, yb) in pairwise(zip(x, y, strict=True)):
        if a <= where <= b:
            return ya + (yb - ya) * (where - a) / (b - a)
    return None
