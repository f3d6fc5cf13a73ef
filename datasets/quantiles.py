"""Mean, spread and quantiles of the columns of a stream of rows, in constant memory.

Up to EXACT rows are kept, and quantiles are numpy's own. Beyond, they come from counts in bins
whose width is a fixed share of the value (as in DDSketch, Masson et al., arXiv:1908.10693): a
quantile is then within ERROR of its own magnitude of the value at that rank, or within SMALLEST of
zero, whatever the distribution and the order of rows; it never leaves the column's range.
"""

import numpy as np
from jaxtyping import Float, Int

EXACT = 1_000_000  # rows kept: 60 MB of 15 columns
ERROR = 0.002  # relative, of a quantile beyond EXACT rows
SMALLEST, LARGEST = 1e-7, 1e4  # |values| are counted apart between these

_GROWTH = np.log((1 + ERROR) / (1 - ERROR))  # log of the ratio of neighbouring bins
_BINS = int(np.ceil(np.log(LARGEST / SMALLEST) / _GROWTH)) + 1  # of one sign


class Columns:
    """Totals of `width` columns. Values must be finite."""

    def __init__(self, width: int, exact: int = EXACT) -> None:
        self.n = 0
        self._width, self._exact = width, exact
        self._mean, self._squares = np.zeros(width), np.zeros(width)  # sum of squared deviations
        self._low, self._high = np.full(width, np.inf), np.full(width, -np.inf)
        self._kept: list[np.ndarray] = []
        self._counts: Int[np.ndarray, "_ _"] | None = None  # columns, bins; once rows are not kept

    def add(self, rows: Float[np.ndarray, "n {self._width}"]) -> None:
        """Counts some more rows."""
        if len(rows) == 0:
            return
        values, before = rows.astype(np.float64), self.n
        self.n += len(rows)
        mean = values.mean(0)
        away = mean - self._mean
        # Chan et al.'s update of mean and squared deviations by a batch
        self._squares += ((values - mean) ** 2).sum(0) + away**2 * before * len(rows) / self.n
        self._mean += away * len(rows) / self.n
        self._low = np.minimum(self._low, values.min(0))
        self._high = np.maximum(self._high, values.max(0))
        if self._counts is None and self.n <= self._exact:
            self._kept.append(rows.copy())
            return
        if self._counts is None:
            self._counts = np.zeros((self._width, 2 * _BINS + 1), np.int64)
            for kept in self._kept:
                self._count(kept)
            self._kept = []
        self._count(values)

    def mean(self) -> Float[np.ndarray, "_"]:
        """By column."""
        return self._mean.copy()

    def std(self) -> Float[np.ndarray, "_"]:
        """Of the population, as numpy's."""
        return np.sqrt(self._squares / max(self.n, 1))

    def low(self) -> Float[np.ndarray, "_"]:
        """Least value."""
        return self._low.copy()

    def high(self) -> Float[np.ndarray, "_"]:
        """Largest value."""
        return self._high.copy()

    def quantile(self, share: float) -> Float[np.ndarray, "_"]:
        """Value below which that share of rows lies, by column."""
        if self._counts is None:
            return np.quantile(np.concatenate(self._kept).astype(np.float64), share, axis=0)
        upto = self._counts.cumsum(1)
        at = (upto <= share * (self.n - 1)).sum(1)
        return _centres()[at].clip(self._low, self._high)

    def histogram(
        self, column: int, low: float, high: float, bins: int
    ) -> Int[np.ndarray, "{bins}"]:
        """Rows by equal parts of low .. high; what lies outside is in none."""
        if self._counts is None:
            values = np.concatenate([kept[:, column] for kept in self._kept])
            return np.histogram(values, bins, (low, high))[0]
        counts = np.histogram(_centres(), bins, (low, high), weights=self._counts[column])[0]
        return counts.astype(np.int64)

    def _count(self, rows: np.ndarray) -> None:
        assert self._counts is not None
        size = np.log(np.abs(rows).clip(SMALLEST, LARGEST) / SMALLEST) / _GROWTH
        place = np.where(np.abs(rows) < SMALLEST, 0, np.sign(rows) * (np.rint(size) + 1))
        index = place.astype(np.int64).clip(-_BINS, _BINS) + _BINS
        for column in range(self._width):
            self._counts[column] += np.bincount(index[:, column], minlength=2 * _BINS + 1)


def _centres() -> Float[np.ndarray, "_"]:
    """Value that each bin stands for."""
    sizes = SMALLEST * np.exp(_GROWTH * np.arange(_BINS))
    return np.concatenate([-sizes[::-1], [0.0], sizes])
