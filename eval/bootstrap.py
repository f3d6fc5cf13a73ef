"""Intervals by resampling whole episodes: frames of one episode are not independent.

All statistics of one report use the same resamples, so that a difference of two is paired.

E episodes, R resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A statistic of all episodes, its interval, and its value on every resample."""

    value: float
    low: float
    high: float
    draws: Float[np.ndarray, "R"]
    centred: bool = False  # value ± 1.96 standard errors, not percentiles


def resamples(episodes: int, count: int, seed: int) -> Int[np.ndarray, "R E"]:
    """How often each episode is drawn in each resample of as many episodes."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(episodes, np.full(episodes, 1 / episodes), count)


def mean(
    values: Float[np.ndarray, "N"], episode: Int[np.ndarray, "N"], weights: Int[np.ndarray, "R E"]
) -> Estimate:
    """The mean over all finite values, nan of none; `episode` numbers the rows 0 .. E - 1."""
    known = np.isfinite(values)
    sums, counts = (
        np.bincount(episode[known], of, weights.shape[1])
        for of in (values[known], np.ones(known.sum()))
    )

    def statistic(w: np.ndarray) -> np.ndarray:
        total = w @ counts
        return np.where(total > 0, w @ sums, np.nan) / np.maximum(total, 1)

    return estimate(statistic, weights)


def estimate(
    statistic: Callable[[Float[np.ndarray, "_ E"]], Float[np.ndarray, "_"]],
    weights: Int[np.ndarray, "R E"],
    centred: bool = False,
) -> Estimate:
    """`statistic` maps rows of episode weights to values.

    `centred` suits statistics that resampling itself moves, as a Fréchet distance, which grows
    when clips repeat: their percentiles may miss the value.
    """
    value = float(statistic(np.ones((1, weights.shape[1])))[0])
    return _interval(value, statistic(weights.astype(float)), centred)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """one - other on the same resamples."""
    return _interval(one.value - other.value, one.draws - other.draws, one.centred)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Their mean, resample by resample."""
    draws = np.mean([e.draws for e in estimates], axis=0)
    return _interval(float(np.mean([e.value for e in estimates])), draws, estimates[0].centred)


def _interval(value: float, draws: Float[np.ndarray, "R"], centred: bool) -> Estimate:
    if centred:
        half = 1.96 * float(np.std(draws))
        return Estimate(value, value - half, value + half, draws, centred)
    known = draws[np.isfinite(draws)] if np.isfinite(value) else np.array([np.nan])
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), draws)
