"""Curves of the pretrainings, how soon each is where the reference ends; of success as well.

Minutes are steps times the median seconds of that run's steps, so that what else the machine did
for a while counts little.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from selfflow.eval.ablation_config import MAIN, REFERENCE
from selfflow.eval.ablation_plan import CURVE, PRETRAIN, Run
from selfflow.eval.ablation_records import Record, curve_of
from selfflow.eval.ablation_stats import first_reach, value_at
from selfflow.eval.chart import Line, Panel, Span, save_chart, save_rows
from selfflow.eval.report import wilson

Arms = dict[tuple[str, str], list[Run]]
KINDS = {"loss": ("held-out loss", False), "probe": ("probe R2, tau 0.5", True)}  # rises?
AXES = ("steps", "minutes")


def curve_tables(arms: Arms, records: dict[str, Record]) -> list[str]:
    """A table a size: when each pretraining reaches the reference's end, and where it is in the
    reference's time."""
    parts = []
    for size in dict.fromkeys(size for size, _ in arms):
        shown = pretrainings(arms, size)
        if REFERENCE not in shown:
            continue
        heads = ["pretraining", "s a step"]
        for _, (title, _) in KINDS.items():
            heads += [f"{title}: steps to {REFERENCE}'s end", "minutes", "in its time"]
        rows = [_row(name, runs, shown[REFERENCE], records) for name, runs in shown.items()]
        title = f"### Steps and minutes to {REFERENCE}'s end, {size}, by training seed"
        parts.append(f"{title}\n\n{markdown(heads, rows)}")
    return parts


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pretrainings(arms: Arms, size: str) -> dict[str, list[Run]]:
    """By name, each once: runs of one of the arms that start from it."""
    found: dict[str, list[Run]] = {}
    for (own, _), runs in arms.items():
        if own == size and any(job.kind == PRETRAIN for job in runs[0].jobs):
            found.setdefault(runs[0].job(PRETRAIN).name.split("/")[1], runs)
    return found


def points(
    run: Run, kind: str, axis: str, records: dict[str, Record]
) -> tuple[list[float], list[float]]:
    """Places on the axis and values of one run's curve."""
    steps, values = curve_of(records[run.job(CURVE).name], kind)
    each = _step_seconds(run, records) / 60
    return (steps if axis == "steps" else [step * each for step in steps]), values


def plot(path: Path, arms: Arms, records: dict[str, Record]) -> bool:
    """A row of panels a size; means over training seeds, bars from the least to the most. False
    where there is nothing to draw."""
    panels = []
    for size in dict.fromkeys(size for size, _ in arms):
        shown = pretrainings(arms, size)
        for kind, (title, _) in KINDS.items():
            for axis in AXES:
                lines = [_line(name, runs, kind, axis, records) for name, runs in shown.items()]
                panels.append(Panel(f"{title}, {size}", axis, lines))
    if not any(panel.lines for panel in panels):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    save_chart(panels, path, columns=len(KINDS) * len(AXES))
    return True


def rolled(runs: Sequence[Run], records: dict[str, Record]) -> dict[int, list[int]]:
    """1 or 0, success, of all episodes of an arm's runs, by step of the fine-tuning."""
    found: dict[int, list[int]] = {}
    for run in runs:
        for job in run.rollouts:
            step = int(job.name.rpartition("-")[2])
            found.setdefault(step, []).extend(records[job.name]["success"])
    return found


def plot_success(path: Path, arms: Arms, records: dict[str, Record]) -> bool:
    """A row an arm of the main size: rates over all training seeds with Wilson's intervals, and
    each seed's own; False where there is none."""
    rows: dict[str, dict[str, Span]] = {}
    for (size, arm), runs in arms.items():
        if size == MAIN:
            each = [rolled([run], records) for run in runs]
            rows[arm] = {
                f"after {step} steps of fine-tuning": _span(outcomes, [e[step] for e in each])
                for step, outcomes in rolled(runs, records).items()
            }
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_rows(rows, "success: Wilson 95 %, small lines are training seeds", path)
    return bool(rows)


def _span(outcomes: Sequence[int], parts: Sequence[Sequence[int]]) -> Span:
    low, high = wilson(sum(outcomes), len(outcomes))
    return Span(fmean(outcomes), low, high, [fmean(part) for part in parts])


def _line(name: str, runs: Sequence[Run], kind: str, axis: str, records: dict[str, Record]) -> Line:
    found = [points(run, kind, axis, records) for run in runs]
    x = [fmean(column) for column in zip(*(places for places, _ in found), strict=True)]
    columns = list(zip(*(values for _, values in found), strict=True))
    return Line(name, x, *([f(c) for c in columns] for f in (fmean, min, max)))


def _row(
    name: str, runs: Sequence[Run], reference: Sequence[Run], records: dict[str, Record]
) -> list[str]:
    """Seeds are paired: each is to reach the end of the reference with its own seed."""
    row = [name, f"{fmean(_step_seconds(run, records) for run in runs):.2f}"]
    for kind, (_, rising) in KINDS.items():
        steps, minutes, values = [], [], []
        for run, other in zip(runs, reference, strict=True):
            places, aims = points(other, kind, "minutes", records)
            x, y = points(run, kind, "steps", records)
            reached = first_reach(x, y, aims[-1], rising)
            each = _step_seconds(run, records) / 60
            first = "≤ " if reached == x[0] else ""  # there already where it is measured first
            steps.append("never" if reached is None else f"{first}{reached:.0f}")
            minutes.append("never" if reached is None else f"{first}{reached * each:.1f}")
            # a run that was over sooner stays at its end
            x, y = points(run, kind, "minutes", records)
            then = value_at(x, y, places[-1]) if places[-1] < x[-1] else y[-1]
            values.append("-" if then is None else f"{then:.3f}")
        row += [", ".join(cells) for cells in (steps, minutes, values)]
    return row


def _step_seconds(run: Run, records: dict[str, Record]) -> float:
    return float(records[run.job(PRETRAIN).name]["step_s"])
