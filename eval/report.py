"""Numbers from episodes: success with its interval, percentiles, a summary and a table."""

from collections import Counter
from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
from rich.table import Table

from selfflow.eval.rollout import Episode

READINGS = ("success", "early_stop", "ever")


def wilson(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a rate; z = 1.96 gives 95 %. (0, 1) without trials."""
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    if trials == 0:
        return 0.0, 1.0
    p, n = successes / trials, trials
    centre = p + z * z / (2 * n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    # Exact at the ends, where rounding would give -1e-17 or 0.9999…
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


def percentile(values: Sequence[float | int], q: float | int) -> float:
    """The q-th percentile, linear between neighbours; nan of nothing."""
    return float(np.percentile(values, q)) if len(values) else float("nan")


def summarize(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Counts, rates and medians over episodes; seconds in ms where the key says so."""
    latencies = [s for e in episodes for s in e.latencies]
    n = len(episodes)
    reached = [e.first_success for e in episodes if e.success and e.first_success is not None]
    successes = {reading: sum(getattr(e, reading) for e in episodes) for reading in READINGS}
    names = sorted({name for e in episodes for name in e.progress})
    return {
        "episodes": n,
        "successes": successes["success"],
        "success_rate": successes["success"] / n if n else None,
        "wilson_95": wilson(successes["success"], n),
        "successes_by_reading": {
            "last_step": successes["success"],
            "early_stop": successes["early_stop"],
            "ever": successes["ever"],
        },
        "median_steps": percentile([e.steps for e in episodes], 50) if n else None,
        "median_first_success": percentile(reached, 50) if reached else None,
        "decisions": len(latencies),
        "latency_ms_p50": 1000 * percentile(latencies, 50) if latencies else None,
        "latency_ms_p95": 1000 * percentile(latencies, 95) if latencies else None,
        "reasons": dict(Counter(e.reason for e in episodes)),
        "progress_mean": {
            name: float(np.mean([e.progress[name] for e in episodes if name in e.progress]))
            for name in names
        },
        "clipped": sum(e.clipped for e in episodes),
        "ik_failed": sum(e.ik_failed for e in episodes),
        "limited": dict(sum((Counter(e.limited) for e in episodes), Counter())),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One column a summary; each needs also task, backend, placement and policy."""
    out = Table(title="Closed-loop evaluation", title_justify="left", show_header=False)
    out.add_column(style="bold")
    cells = [_cells(row) for row in rows]
    for _ in rows:
        out.add_column()
    for label in cells[0]:
        out.add_row(label, *(column.get(label, "-") for column in cells))
    return out


def shading(row: dict[str, Any]) -> str:
    """ibl, or ray tracing with its rays a pixel; "-" where the simulator has one shading only."""
    samples = row.get("samples")
    return row.get("shader", "-") + (f", {samples} rays a pixel" if samples else "")


def _cells(row: dict[str, Any]) -> dict[str, str]:
    low, high = row["wilson_95"]
    readings = row["successes_by_reading"]
    some = row["latency_ms_p50"] is not None
    return {
        "task": row["task"],
        "backend": row["backend"],
        "placement": row["placement"],
        "shading": shading(row),
        "policy": row.get("checkpoint") or row["policy"],
        **({"photographs": "seen in training"} if row.get("photographs_seen") else {}),
        "successes / episodes": f"{row['successes']} / {row['episodes']}",
        "Wilson 95 % interval": f"{100 * low:.1f} % to {100 * high:.1f} %",
        "at a decision / ever": f"{readings['early_stop']} / {readings['ever']} successes",
        "median episode length": f"{row['median_steps']:g} steps" if some else "-",
        "decision latency p50 / p95": (
            f"{row['latency_ms_p50']:.1f} ms / {row['latency_ms_p95']:.1f} ms" if some else "-"
        ),
    }
